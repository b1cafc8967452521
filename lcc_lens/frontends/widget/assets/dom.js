// Elements and formatted numbers. Text enters as text nodes only: a token or a generation may contain HTML.

/** An element with attributes, listeners (functions under `on...`) and children; null children are left out. */
function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** The same for a drawing. */
function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}

/** A number with three digits, and its unit. */
function formatted(value, unit = "") {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  const text = size !== 0 && size < 0.001 ? value.toExponential(1) : value.toFixed(digits);
  return text.replace("-", "\u2212") + (unit ? `\u00a0${unit}` : "");
}

/** Seconds, or minutes of a longer time. */
const duration = (seconds) => (seconds < 90 ? formatted(seconds, "s") : formatted(seconds / 60, "min"));

const percent = (share) => (share > 0 && share < 0.001 ? "<0.1\u00a0%" : `${(100 * share).toFixed(1)}\u00a0%`);

/** A label above a control. */
const field = (label, control, value = null) => el("label", { class: "field" }, el("span", {}, label, value), control);

/** A titled part of the widget. */
const part = (title, name, ...children) =>
  el("section", { class: `part ${name}` }, el("h3", {}, title), ...children);

