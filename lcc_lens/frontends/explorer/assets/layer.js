// The panel of one layer: its sites, its heads in the current view, and their attention patterns.

function drawLayer(layer, { onClose, onStep }) {
  const run = shownRun(),
    view = shownView(),
    heads = Array.from({ length: shape.heads }, (_, head) => ({ layer, head }));
  const step = (by, label, sign) =>
    el(
      "button",
      { type: "button", class: "tool", id: `step${by}`, "aria-label": label, on: { click: () => onStep(by) } },
      sign,
    );
  const redraw = (focused) => {
    drawLayer(layer, { onClose, onStep });
    byId(focused)?.focus({ preventScroll: true });
  };
  byId("panel").replaceChildren(
    el(
      "div",
      { class: "panel-head" },
      el("h2", { id: "panel-title", tabindex: "-1" }, `Layer ${layer}`),
      el("span", { class: "quiet grow" }, `${shape.heads} heads`, runs.length > 1 ? ` · ${run.name}` : ""),
      step(-1, "Previous layer", "‹"),
      step(1, "Next layer", "›"),
      el(
        "button",
        { type: "button", class: "tool", id: "close", "aria-label": "Close this layer", on: { click: onClose } },
        "×",
      ),
    ),
    el(
      "dl",
      { class: "numbers", title: "|dense − pruned| / |dense|, root mean square" },
      run.layers.map(({ title, value }) =>
        el("div", {}, el("dt", {}, `Change, ${title}`), el("dd", {}, number(unpack(value).values[layer], "%"))),
      ),
    ),
    el("section", {}, el("h3", {}, `Heads: ${view.title.toLowerCase()}`), headBars(view, heads)),
    layerPatterns(run, heads, redraw) ?? "",
  );
}

/** The heads of a layer with their values as bars. */
function headBars(view, heads) {
  const valueAt = ({ layer, head }) => view.values[layer * shape.heads + head],
    most = Math.max(...[...view.values].filter(Number.isFinite).map(Math.abs), 1e-12);
  return el(
    "ol",
    { class: "ranking" },
    heads.map((head) => rankedHead(view, { ...head, value: valueAt(head) }, most)),
  );
}

/** Every head's attention patterns in all models, small. */
function layerPatterns(run, heads, redraw) {
  if (run.texts.length === 0) return null;
  const text = shownText(run);
  const box = text.patterns
    ? el(
        "div",
        { class: "many-patterns" },
        heads.map((head) =>
          el(
            "a",
            { href: `#${nameOf(head)}`, "aria-label": `${nameOf(head)}: open` },
            el("b", {}, nameOf(head)),
            text.models.map((_, model) => patternCanvas(text, model, head)),
          ),
        ),
      )
    : el("p", { class: "quiet" }, "The model has no hook point for attention patterns (hook_pattern).");
  return el(
    "section",
    { class: "texts" },
    el("div", { class: "bar-row" }, el("h3", {}, "Attention patterns"), textChoice(run, () => redraw("text-choice"))),
    box,
    keyOf(text.models.map((name) => [name, name])),
  );
}
