// Selector scores of a head: its score with its interval, among the scores of all heads.

function scoreSection(run, head) {
  const views = run.views.filter((view) => view.stderr !== null);
  if (views.length === 0) return null;
  return el(
    "section",
    {},
    el("h3", {}, "Selector scores"),
    el(
      "ul",
      { class: "scores" },
      views.map((view) => scoreRow(view, head)),
    ),
    el("p", { class: "quiet" }, "Each tick is a head; the bar spans ± 1.96 standard errors. Higher scores are restored first."),
  );
}

function scoreRow(view, head) {
  const values = unpack(view.value).values,
    place = head.layer * shape.heads + head.head;
  const value = values[place],
    error = unpack(view.stderr).values[place];
  const rank =
    ranking({ ...view, values, isDiverging: false }).findIndex((h) => h.layer === head.layer && h.head === head.head) +
    1;
  const text = `${measured(value, error)}${view.unit ? ` ${view.unit}` : ""}`;
  return el(
    "li",
    { title: view.meaning },
    el("span", { class: "name" }, view.title),
    strip(values, value, error, `${view.title} ${text}`),
    el("span", { class: "value" }, text),
    el("span", { class: "quiet rank" }, rank ? `${rank} of ${values.length}` : ""),
  );
}

/** All heads as ticks, this one as a dot with its interval. */
function strip(values, value, error, label) {
  const found = [...values].filter(Number.isFinite),
    half = Number.isFinite(error) ? 1.96 * error : 0;
  const low = found.reduce((a, b) => Math.min(a, b), value - half),
    high = found.reduce((a, b) => Math.max(a, b), value + half);
  const px = (v) => 4 + (192 * (v - low)) / (high - low || 1);
  const root = svg("svg", {
    class: "strip",
    viewBox: "0 0 200 20",
    role: "img",
    "aria-label": label,
    preserveAspectRatio: "none",
  });
  root.append(svg("path", { class: "others", d: found.map((v) => `M${px(v).toFixed(1)} 6v8`).join("") }));
  if (!Number.isFinite(value)) return root;
  if (half) root.append(svg("line", { class: "interval", x1: px(value - half), x2: px(value + half), y1: 10, y2: 10 }));
  root.append(svg("line", { class: "point", x1: px(value), x2: px(value), y1: 2, y2: 18 }));
  return root;
}
