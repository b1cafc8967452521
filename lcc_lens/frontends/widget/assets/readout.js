// Losses, next tokens and generations of the three models, side by side.

/** The part with losses, prompt, next tokens and generations. */
function readouts(model, ask, heads) {
  const prompt = el("input", { type: "text", class: "prompt", value: model.get("prompt"), "aria-label": "Prompt" });
  const atOnce = el("input", { type: "checkbox", class: "at-once" });
  atOnce.checked = model.get("reads_at_once");
  const read = el("button", { type: "button", class: "read" }, "Read");
  const pin = el("button", { type: "button", class: "pin", title: "Keep this restoration as one more column" }, "Pin");
  pin.addEventListener("click", () => ask({ do: isPinned() ? "unpin" : "pin" }));
  const isPinned = () => "pinned" in (model.get("readout").losses ?? {});
  const send = () => ask({ do: "read", prompt: prompt.value });
  read.addEventListener("click", send);
  prompt.addEventListener("keydown", (event) => {
    event.stopPropagation(); // the notebook has keys of its own
    if (event.key === "Enter") send();
  });
  const keep = (name, value) => (model.set(name, value), model.save_changes());
  prompt.addEventListener("change", () => keep("prompt", prompt.value));
  atOnce.addEventListener("change", () => keep("reads_at_once", atOnce.checked));
  const note = el("p", { class: "quiet note" }),
    places = ["losses", "tokens", "changed", "texts"].map((name) => el("div", { class: `place-${name}` }));
  const care = el("p", { class: "quiet care" });
  const asking = el("div", { class: "row2 tight asking" }, field("Prompt", prompt), read,
    el("label", { class: "check" }, atOnce, "after every action"), pin);
  const root = part("Dense, pruned, restored", "readouts", asking, note, places[0], care, ...places.slice(1));

  function draw() {
    const { losses, warning, seen, texts, key, prompt: asked } = model.get("readout");
    if (!losses) return (note.textContent = "Losses, next tokens and generations appear here after reading.");
    const isOld = key !== model.get("state").key || asked !== model.get("prompt");
    note.textContent = isOld ? "Outdated since the last action; press Read." : "Held-out loss in nats per token.";
    care.textContent = warning && !isOld ? `Read with care: ${warning}.` : "";
    const parts = [
      lossBars(losses),
      seen && tokenTable(seen),
      seen && heads ? changedHeads(seen, heads) : null,
      texts && generations(texts),
    ];
    parts.forEach((node, i) => {
      // until a part arrives, its old content stays
      if (node || !asked) places[i].replaceChildren(...(node ? [node] : []));
      places[i].classList.toggle("old", isOld || !node);
    });
  }
  return {
    root,
    draw,
    ask: () => (prompt.value = model.get("prompt")),
    follow: ({ isBusy, hasHeads }) => {
      read.disabled = isBusy;
      pin.disabled = isBusy || (!hasHeads && !isPinned());
      pin.textContent = isPinned() ? "Unpin" : "Pin";
    },
  };
}

/** Percent of the lost log-likelihood that a loss recovers; empty where nothing was lost. */
function recovered(losses, name) {
  const lost = losses.pruned - losses.dense;
  if (name === "dense" || name === "pruned" || lost <= 0) return "";
  return `${((100 * (losses.pruned - losses[name])) / lost).toFixed(0).replace("-", "\u2212")}\u00a0% recovered`;
}

function lossBars(losses) {
  const names = Object.keys(losses),
    most = Math.max(...Object.values(losses));
  return el("dl", { class: "losses" }, names.map((name) => [
    el("dt", { class: name }, name),
    el("dd", {}, bar(name, losses[name] / most), el("b", { class: `loss-${name}` }, losses[name].toFixed(3)),
      el("span", { class: `quiet recovered-${name}` }, recovered(losses, name))),
  ]).flat());
}

function bar(name, share) {
  const node = el("span", { class: `bar ${name}` });
  node.style.width = `${(100 * share).toFixed(1)}%`;
  return el("span", { class: "track" }, node);
}

function tokenTable({ tokens, models }) {
  const head = el("tr", {}, el("th", {}, "next token"), models.map((name) => el("th", { class: name }, name)));
  const most = Math.max(...tokens.flatMap((row) => models.map((name) => row[name])));
  const rows = tokens.map((row) =>
    el("tr", {}, el("td", {}, el("code", {}, visible(row.token))),
      models.map((name) => el("td", {}, bar(name, row[name] / most), el("span", {}, percent(row[name]))))));
  return el("table", { class: "tokens" }, el("thead", {}, head), el("tbody", {}, rows));
}

/** A token with visible spaces and line ends. */
const visible = (token) =>
  token.replaceAll(" ", "\u00b7").replaceAll("\n", "\u21b5").replaceAll("\t", "\u2192") || "\u2205";

const generations = (texts) =>
  el(
    "div",
    { class: "texts" },
    Object.keys(texts).map((name) => el("figure", { class: name }, el("figcaption", {}, name), el("p", {}, texts[name]))),
  );
