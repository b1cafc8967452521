// Choose many heads: all above a threshold of the map's view, or the first in a selector's order.

/** Controls for threshold and selector; `onShow` previews a set while dragging, the others choose it. */
function picking(fixed, map, { onShow, onChoose, onSelect }) {
  const n = fixed.layers * fixed.heads - fixed.removed.length;
  const bar = el("input", { type: "range", min: 0, max: 1000, value: 1000, class: "threshold" }),
    least = el("b", {});
  const names = Object.keys(fixed.rankings);
  const selector = el("select", { class: "selector" }, names.map((name) => el("option", {}, name)));
  const count = el("input", { type: "range", min: 1, max: n, value: Math.ceil(n / 4), class: "count" }),
    counted = el("b", {});

  const limit = () => {
    const known = map.view().values.filter((value) => value !== null);
    const [low, high] = [Math.min(...known), Math.max(...known)];
    return low + ((high - low) * Number(bar.value)) / 1000;
  };
  const above = () => {
    const value = limit();
    const places = map.view().values.flatMap((v, place) => (v !== null && v >= value ? [place] : []));
    return new Set(places.map((place) => labelOf(place, fixed.heads)).filter((label) => !map.removed.has(label)));
  };
  const first = () => new Set(fixed.rankings[selector.value].slice(0, Number(count.value)));
  const say = () => {
    least.textContent = ` \u2265 ${formatted(limit(), map.view().unit)}`;
    counted.textContent = ` ${count.value} of ${n}`;
  };
  const showing = (read) => () => (say(), onShow(read()));
  const settle = () => (say(), onSelect(first(), { selector: selector.value, n: Number(count.value) }));

  bar.addEventListener("input", showing(above));
  bar.addEventListener("change", () => onChoose(above()));
  count.addEventListener("input", showing(first));
  count.addEventListener("change", settle);
  selector.addEventListener("change", settle);
  /** Put both sliders where the chosen heads are: at the lowest chosen value, and at their number. */
  function follow(chosen) {
    const known = map.view().values.filter((value) => value !== null);
    const [low, high] = [Math.min(...known), Math.max(...known)];
    const values = [...chosen].map((label) => map.view().values[placeOf(label, fixed.heads)] ?? high);
    const lowest = values.length ? Math.min(...values) : high;
    bar.value = String(Math.floor((1000 * (lowest - low)) / (high - low || 1)));
    if (values.length) count.value = String(values.length);
    say();
  }
  map.pick.addEventListener("change", () => follow(map.chosen()));
  say();
  const root = el(
    "div",
    { class: "row2" },
    field("Threshold", bar, least),
    field("Heads", count, counted),
    field("Selector", selector),
  );
  return { root, follow };
}
