// The layer x head map. Cell colours are custom properties, so a change of theme needs no redrawing.

const headMap = { cells: [], root: null };

/** Build the map once; `paintMap` colours it. */
function buildMap(onOpen, onPoint) {
  const corner = el("div", { role: "columnheader", class: "axis corner" }, "layer");
  const top = el(
    "div",
    { role: "row", class: "row" },
    corner,
    Array.from({ length: shape.heads }, (_, h) =>
      el("div", { role: "columnheader", class: "axis" }, axisLabel(h, shape.heads)),
    ),
  );
  const rows = Array.from({ length: shape.layers }, (_, layer) =>
    el(
      "div",
      { role: "row", class: "row" },
      el(
        "div",
        { role: "rowheader", class: "axis" },
        el(
          "a",
          { href: `#L${layer}`, tabindex: "-1", "aria-label": `Layer ${layer}` },
          axisLabel(layer, shape.layers, 16),
        ),
      ),
      Array.from({ length: shape.heads }, (_, head) => {
        const cell = el("div", {
          role: "gridcell",
          class: "cell",
          tabindex: "-1",
          "data-place": layer * shape.heads + head,
        });
        headMap.cells.push(cell);
        return cell;
      }),
    ),
  );
  headMap.root = el(
    "div",
    {
      id: "map",
      class: "map",
      role: "grid",
      tabindex: "-1",
      "aria-label": "Map of heads: rows are layers, columns are heads",
      "aria-rowcount": shape.layers + 1,
      "aria-colcount": shape.heads + 1,
      vars: { "--heads": shape.heads, "--layers": shape.layers },
    },
    top,
    rows,
  );
  const placed = (event) => {
    const cell = event.target.closest(".cell");
    if (!cell) return null;
    const place = Number(cell.dataset.place);
    return { layer: Math.floor(place / shape.heads), head: place % shape.heads };
  };
  headMap.root.addEventListener("click", (event) => {
    const head = placed(event);
    if (head) onOpen(head);
  });
  headMap.root.addEventListener("pointerover", (event) => onPoint(placed(event)));
  headMap.root.addEventListener("pointerleave", () => onPoint(null));
  headMap.root.addEventListener("focusin", (event) => onPoint(placed(event)));
  return headMap.root;
}

/** Axis labels: every number on a short axis, every second or fifth on a long one. */
function axisLabel(i, n, most = 20) {
  const step = n <= most ? 1 : n <= 2 * most ? 2 : 5;
  return i % step === 0 ? String(i) : "";
}

const cellOf = ({ layer, head }) => headMap.cells[layer * shape.heads + head];

/** Colour and describe every cell. */
function paintMap(view) {
  const run = shownRun(),
    scale = scaleOf(view),
    restored = new Set(run.restored?.heads ?? []);
  const removed = new Set(run.heads?.removed ?? []);
  headMap.root.classList.toggle("diverging", view.isDiverging);
  headMap.root.classList.toggle("searching", state.found !== null);
  headMap.cells.forEach((cell, i) => {
    const head = { layer: Math.floor(i / shape.heads), head: i % shape.heads },
      name = nameOf(head),
      value = view.values[i];
    const share = (value - scale.low) / (scale.high - scale.low);
    cell.style.setProperty("--v", Number.isFinite(share) ? share.toFixed(3) : "0");
    cell.classList.toggle("blank", !Number.isFinite(value));
    cell.classList.toggle("restored", restored.has(name));
    cell.classList.toggle("found", state.found?.has(name) ?? false);
    cell.setAttribute(
      "aria-label",
      `${name}, ${view.title} ${formatted(view, value)}` +
        (removed.has(name) ? ", removed by pruning" : "") +
        (restored.has(name) ? ", restored" : ""),
    );
  });
  markMap();
}

/** Mark the active head and the open one. */
function markMap() {
  for (const cell of headMap.root.querySelectorAll('[tabindex="0"], [aria-selected="true"]')) {
    cell.tabIndex = -1;
    cell.removeAttribute("aria-selected");
  }
  cellOf(state.active).tabIndex = 0;
  if (state.open) cellOf(state.open).setAttribute("aria-selected", "true");
}
