// The layer x head map: a click picks one head, dragging picks a box; colours are custom properties.

const placeOf = (label, n) => {
  const [, layer, head] = /^L(\d+)H(\d+)$/.exec(label);
  return Number(layer) * n + Number(head);
};
const labelOf = (place, n) => `L${Math.floor(place / n)}H${place % n}`;

/**
 * The map and the select for its view. `chosen` is a set of labels; `onChoose` is called with the next one.
 * Returns the part, and `paint` to redraw it when the choice or the view changes.
 */
function headMap(fixed, onChoose) {
  const { layers, heads, views } = fixed,
    removed = new Set(fixed.removed);
  let chosen = new Set(),
    from = null,
    active = 0;
  const cells = Array.from({ length: layers * heads }, (_, place) =>
    el("div", { role: "gridcell", class: "cell", tabindex: place ? "-1" : "0", "data-place": place }),
  );
  const axis = (i, n) => (n <= 20 || i % (n <= 40 ? 2 : 5) === 0 ? String(i) : "");
  const header = (role, text) => el("div", { role, class: "axis" }, text);
  const row = (first, others) => el("div", { role: "row", class: "row" }, first, others);
  const top = Array.from({ length: heads }, (_, h) => header("columnheader", axis(h, heads)));
  const rows = Array.from({ length: layers }, (_, layer) =>
    row(header("rowheader", axis(layer, layers)), cells.slice(layer * heads, (layer + 1) * heads)),
  );
  const grid = el(
    "div",
    {
      class: "grid",
      role: "grid",
      "aria-multiselectable": "true",
      "aria-label": "Heads: rows are layers, columns heads",
    },
    row(header("columnheader", ""), top),
    rows,
  );
  grid.style.setProperty("--heads", heads);
  grid.style.setProperty("--layers", layers);
  const pick = el("select", { class: "view", "aria-label": "View of the map", onchange: () => paint() },
    views.map(({ key, title }) => el("option", { value: key }, title)));
  const readout = el("div", { class: "pointed" }),
    ends = el("div", { class: "ends" }),
    meaning = el("p", { class: "quiet meaning" });

  const view = () => views.find(({ key }) => key === pick.value) ?? views[0];
  const placeAt = (event) => {
    const cell = document.elementFromPoint(event.clientX, event.clientY)?.closest?.(".cell");
    return cell && grid.contains(cell) ? Number(cell.dataset.place) : null;
  };
  const boxTo = (place) => {
    const [rows, columns] = [(p) => Math.floor(p / heads), (p) => p % heads].map((read) =>
      [read(from), read(place)].sort((a, b) => a - b),
    );
    return cells.flatMap((_, p) => {
      const [layer, head] = [Math.floor(p / heads), p % heads];
      return layer >= rows[0] && layer <= rows[1] && head >= columns[0] && head <= columns[1] ? [p] : [];
    });
  };
  const present = (places) => places.map((p) => labelOf(p, heads)).filter((label) => !removed.has(label));
  const toggled = (place) => {
    const next = new Set(chosen);
    for (const label of present([place])) next.delete(label) || next.add(label);
    return next;
  };
  const mark = (places) => cells.forEach((cell, p) => cell.classList.toggle("boxed", places.includes(p)));

  grid.addEventListener("pointerdown", (event) => {
    from = placeAt(event);
    if (from === null || event.button !== 0) return (from = null);
    event.preventDefault(); // no text is marked while dragging
    grid.setPointerCapture(event.pointerId);
    cells[from].focus({ preventScroll: true });
  });
  grid.addEventListener("pointermove", (event) => {
    const place = placeAt(event);
    if (place !== null) point(place);
    if (from !== null && place !== null) mark(place === from ? [] : boxTo(place));
  });
  grid.addEventListener("pointerup", (event) => {
    const place = placeAt(event);
    if (from !== null && place !== null)
      onChoose(place === from ? toggled(place) : new Set([...(event.shiftKey ? chosen : []), ...present(boxTo(place))]));
    from = null;
    mark([]);
  });
  grid.addEventListener("pointercancel", () => mark([(from = null)]));
  grid.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -heads, ArrowDown: heads }[event.key];
    if (step === undefined && event.key !== " " && event.key !== "Enter") return;
    event.preventDefault();
    event.stopPropagation(); // the notebook has keys of its own
    if (step === undefined) return onChoose(toggled(active));
    if (cells[active + step]) cells[active + step].focus();
  });
  grid.addEventListener("focusin", (event) => {
    cells[active].tabIndex = -1;
    active = Number(event.target.dataset.place);
    cells[active].tabIndex = 0;
    point(active);
  });

  function point(place) {
    const label = labelOf(place, heads);
    readout.textContent =
      `${label}: ${formatted(view().values[place], view().unit)}` + (removed.has(label) ? ", removed by pruning" : "");
  }
  function paint(next = chosen) {
    chosen = next;
    const { values, unit, title } = view(),
      known = values.filter((value) => value !== null);
    const low = Math.min(...known, Infinity),
      high = Math.max(...known, -Infinity);
    cells.forEach((cell, place) => {
      const label = labelOf(place, heads),
        value = values[place];
      cell.style.setProperty("--v", value === null ? 0 : ((value - low) / (high - low || 1)).toFixed(3));
      cell.classList.toggle("blank", value === null);
      cell.setAttribute("aria-selected", String(chosen.has(label)));
      cell.setAttribute("aria-label", `${label}, ${title} ${formatted(value, unit)}`);
    });
    const [least, most] = [low, high].map((value) => el("span", {}, formatted(value, unit)));
    ends.replaceChildren(least, el("span", { class: "scale" }), most);
    meaning.textContent = view().meaning;
  }
  readout.textContent = "Click a head, drag a box, or hold Shift to add a box.";
  const root = part("Heads", "heads", field("View", pick), grid, ends, readout, meaning);
  return { root, paint, view, pick, removed, chosen: () => chosen };
}
