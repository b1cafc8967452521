// What changed on the prompt: every head in the pruned and the restored model.

const MOST_CHANGED = 8;

/** The heads that pruning changed most on the prompt, with their change in every model. */
function changedHeads({ models, changes }, heads) {
  const names = models.slice(1);
  const order = changes.pruned
    .map((value, place) => [value ?? 0, place])
    .sort((a, b) => b[0] - a[0])
    .slice(0, MOST_CHANGED);
  const most = Math.max(...order.flatMap(([, place]) => names.map((name) => changes[name][place] ?? 0)), 1e-9);
  const rows = order.map(([, place]) =>
    el("tr", {}, el("td", {}, labelOf(place, heads)), names.map((name) =>
      el("td", {}, bar(name, (changes[name][place] ?? 0) / most), el("span", {}, formatted(changes[name][place], "%"))))));
  const head = el("tr", {}, el("th", {}, "head output changed by"), names.map((name) => el("th", { class: name }, name)));
  return el("table", { class: "tokens changed" }, el("thead", {}, head), el("tbody", {}, rows));
}
