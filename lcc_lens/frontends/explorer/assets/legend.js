// Legend of the map: the colour scale, the unit, and one line about the head under the pointer.

const legend = {};

function buildLegend() {
  legend.ends = [0, 1, 2].map(() => el("span"));
  legend.bar = el("div", { class: "scale" });
  legend.title = el("b");
  legend.meaning = el("p", { class: "meaning" });
  legend.readout = el("p", { class: "readout", id: "readout" });
  return el(
    "div",
    { class: "legend" },
    legend.readout,
    legend.bar,
    el("div", { class: "ends" }, legend.ends),
    legend.meaning,
  );
}

function paintLegend(view) {
  const { low, high } = scaleOf(view);
  legend.bar.classList.toggle("diverging", view.isDiverging);
  [low, (low + high) / 2, high].forEach((value, i) => {
    legend.ends[i].textContent = formatted(view, value);
  });
  legend.meaning.replaceChildren(
    el("b", {}, `${view.title}${view.unit ? ` (${view.unit})` : ""}: `),
    view.meaning,
    view.examples ? ` From ${view.examples} examples.` : "",
    shownRun().restored?.heads.length ? " A dot marks restored heads." : "",
  );
  paintReadout(view, null);
}

/** The line about one head: the one under the pointer, else the open or active one. */
function paintReadout(view, head) {
  const shown = head ?? state.open ?? state.active,
    value = view.values[shown.layer * shape.heads + shown.head];
  const moved = shownRun().heads.moved[nameOf(shown)];
  legend.readout.replaceChildren(
    el("b", {}, nameOf(shown)),
    ` ${view.title.toLowerCase()} ${formatted(view, value)}`,
    moved ? ` · ${moved} in the dense model` : "",
  );
}
