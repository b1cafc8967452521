// Elements and formatted numbers. Text enters the page as text nodes only, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes, listeners (`on`), custom properties (`vars`) and children (nodes or text). */
function build(node, { on = {}, vars = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  for (const [name, listener] of Object.entries(on)) node.addEventListener(name, listener);
  for (const [name, value] of Object.entries(vars)) node.style.setProperty(name, value);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const el = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => build(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);

/** A number for display: few digits, a true minus sign, no line break before the unit. */
function number(value, unit = "", signed = false) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  let text;
  if (unit === "%") text = size >= 9.95 || size === 0 ? size.toFixed(0) : size.toFixed(1);
  else if (size !== 0 && (size < 1e-3 || size >= 1e5)) text = size.toExponential(1);
  else text = String(Number(size.toPrecision(3)));
  const sign = value < 0 && Number(text) !== 0 ? "−" : signed && Number(text) !== 0 ? "+" : "";
  return sign + text + (unit === "%" ? "\u00a0%" : "");
}

/** A value with its standard error, both to the error's second digit. */
function measured(value, error) {
  if (!Number.isFinite(value) || !Number.isFinite(error) || error === 0) return number(value);
  const digits = Math.max(0, 1 - Math.floor(Math.log10(error)));
  if (digits > 6) return `${number(value)} ± ${number(error)}`;
  return `${value.toFixed(digits).replace("-", "−")} ± ${error.toFixed(digits)}`;
}

/** The text of a token with visible spaces and line ends. */
function visible(text) {
  if (text === "") return "∅";
  return text
    .replace(/\r?\n/g, "⏎")
    .replace(/\t/g, "⇥")
    .replace(/^ /, "·")
    .replace(/^ +$/, (s) => "·".repeat(s.length));
}

/** Say something to screen readers. */
function announce(text) {
  byId("announcer").textContent = text;
}
