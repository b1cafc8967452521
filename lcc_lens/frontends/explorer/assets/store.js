// The page's data, unpacked on first use, and the reader's choices.

const { runs, results, docs } = JSON.parse(byId("data").textContent);
const KINDS = { float32: Float32Array, uint8: Uint8Array, int32: Int32Array };

/** A packed array as { shape, values }. */
function unpack(packed) {
  if (packed.values === undefined) {
    const text = atob(packed.data),
      bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    packed.values = new KINDS[packed.dtype](bytes.buffer);
    packed.data = null;
  }
  return packed;
}

/** The row of an array [layer, head, ...] that belongs to a head. */
function rowOf(packed, { layer, head }) {
  const { shape, values } = unpack(packed);
  const size = shape.slice(2).reduce((a, b) => a * b, 1);
  const start = (layer * shape[1] + head) * size;
  return values.subarray(start, start + size);
}

const shape = runs[0].heads;
const hasMap = shape !== null;

/** Current choices: run (0, 1, or "difference"), view, active head, open head or layer, heads found by the search. */
const state = {
  run: 0,
  view: "changed",
  active: { layer: 0, head: 0 },
  open: null,
  layer: null,
  found: null,
  example: 0,
  text: 0,
  query: null,
};

const nameOf = ({ layer, head }) => `L${layer}H${head}`;

/** A head by its name; null if the model has none of that name. */
function headOf(name) {
  const match = /^L(\d{1,4})H(\d{1,4})$/i.exec(name.trim());
  if (!match || !hasMap) return null;
  const head = { layer: Number(match[1]), head: Number(match[2]) };
  return head.layer < shape.layers && head.head < shape.heads ? head : null;
}

/** A layer by its name, such as L3; null if the model has none of that name. */
function layerOf(name) {
  const match = /^L(\d{1,4})$/i.exec(name.trim());
  return match && hasMap && Number(match[1]) < shape.layers ? Number(match[1]) : null;
}

const isDifference = () => state.run === "difference";
/** The run whose details are shown. */
const shownRun = () => runs[isDifference() ? 1 : state.run];
const viewOf = (run, key) => run.views.find((view) => view.key === key);

/** The views of the run, or those that both runs have. */
function offeredViews() {
  const own = shownRun().views;
  return isDifference() ? own.filter((view) => viewOf(runs[0], view.key)) : own;
}

/** The current view: title, unit, meaning, and one value per head in model order. */
function shownView() {
  const views = offeredViews();
  const view = views.find(({ key }) => key === state.view) ?? views[0];
  const values = unpack(view.value).values;
  if (!isDifference()) return { ...view, values, isDiverging: false };
  const before = unpack(viewOf(runs[0], view.key).value).values;
  const values2 = values.map((value, i) => value - before[i]);
  const meaning = `${runs[1].name} minus ${runs[0].name}. ${view.meaning}`;
  return { ...view, values: values2, meaning, isDiverging: true, unit: view.unit === "%" ? "points" : view.unit };
}

/** The ends of the colour scale of a view. */
function scaleOf(view) {
  const found = view.values.filter(Number.isFinite);
  const most = found.reduce((a, b) => Math.max(a, b), -Infinity),
    least = found.reduce((a, b) => Math.min(a, b), Infinity);
  if (found.length === 0) return { low: 0, high: 1 };
  if (view.isDiverging) {
    const end = Math.max(Math.abs(least), Math.abs(most)) || 1;
    return { low: -end, high: end };
  }
  const low = view.stderr === null ? Math.min(0, least) : least;
  return { low, high: most > low ? most : low + 1 };
}

/** A value of a view as text, with its unit. */
const formatted = (view, value) =>
  view.unit === "points"
    ? `${number(value, "%", true).replace("\u00a0%", "")} points`
    : number(value, view.unit, view.isDiverging) +
      (view.unit && view.unit !== "%" && Number.isFinite(value) ? ` ${view.unit}` : "");

/** All heads with a value, highest first; ties in model order. */
function ranking(view) {
  const heads = [...view.values].map((value, i) => ({
    value,
    layer: Math.floor(i / shape.heads),
    head: i % shape.heads,
  }));
  const size = ({ value }) => (view.isDiverging ? Math.abs(value) : value);
  return heads.filter(({ value }) => Number.isFinite(value)).sort((a, b) => size(b) - size(a));
}

/** The index of a head among the restored heads; -1 if it was not restored. */
const restoredPlace = (run, head) => (run.restored ? run.restored.heads.indexOf(nameOf(head)) : -1);
