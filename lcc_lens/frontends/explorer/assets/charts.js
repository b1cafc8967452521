// Small charts in SVG. Colours come from classes, so that they follow the theme.

const isNarrow = matchMedia("(max-width: 860px)");
/** Width of a card on most screens, so that text keeps its size. */
const CARD_WIDTH = 350;

/** Round steps for an axis that begins at or below `low` and ends at or above `high`. */
function ticks(low, high, n = 4) {
  const span = high - low || 1;
  const raw = span / n,
    power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const values = [];
  for (let t = Math.ceil(low / step) * step; t <= high + 1e-9 * span; t += step) values.push(Number(t.toPrecision(6)));
  return values;
}

/** A frame with axes; returns its root, its sizes, and the functions from values to pixels. */
function frame({
  width = isNarrow.matches ? CARD_WIDTH : 580,
  height = 170,
  x,
  y,
  label,
  left = 44,
  right = 10,
  unit = "",
  xTitle = "",
}) {
  const top = 10,
    bottom = 32,
    across = width - left - right,
    down = height - top - bottom;
  const px = (value) => left + ((value - x[0]) / (x[1] - x[0] || 1)) * across;
  const py = (value) => top + down - ((value - y[0]) / (y[1] - y[0] || 1)) * down;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": label });
  for (const tick of ticks(y[0], y[1])) {
    root.append(
      svg("line", { class: "rule", x1: left, x2: width - right, y1: py(tick), y2: py(tick) }),
      svg("text", { class: "tick", x: left - 6, y: py(tick) + 4, "text-anchor": "end" }, number(tick, unit)),
    );
  }
  root.append(svg("text", { class: "tick", x: left + across / 2, y: height - 4, "text-anchor": "middle" }, xTitle));
  return { root, px, py, base: top + down, left, across, top, width, right };
}

const pathOf = (points) => points.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");

/** Labels under chosen values of x. */
function xLabels({ root, px, base }, values, shown = String) {
  for (const value of values) {
    root.append(svg("text", { class: "tick", x: px(value), y: base + 14, "text-anchor": "middle" }, shown(value)));
  }
}

/** Bars side by side: series of { values, kind, name } over components counted from 1. */
function bars({ series, label, unit, xTitle, line = null, picked = null, onPick = null }) {
  const n = series[0].values.length;
  const all = series.flatMap((one) => [...one.values]).concat(line ?? []);
  const low = Math.min(0, ...all),
    high = Math.max(...all, low + 1e-12);
  const chart = frame({ x: [0.5, n + 0.5], y: [low, high * 1.04], label, unit, xTitle });
  const slot = chart.across / n,
    wide = Math.max(1, (slot * 0.76) / series.length);
  series.forEach(({ values, kind, name }, s) => {
    values.forEach((value, i) => {
      const x = chart.px(i + 1) - (wide * series.length) / 2 + s * wide;
      const [y0, y1] = [chart.py(Math.max(value, 0)), chart.py(Math.min(value, 0))];
      const bar = svg(
        "rect",
        { class: `bar ${kind}`, x, y: y0, width: wide, height: Math.max(0.5, y1 - y0) },
        svg("title", {}, `${name} ${i + 1}: ${number(value, unit)}`),
      );
      if (picked !== null) bar.classList.toggle("faint", picked !== i);
      if (onPick) bar.addEventListener("click", () => onPick(i));
      chart.root.append(bar);
    });
  });
  if (line)
    chart.root.append(
      svg("path", { class: "curve sum", d: pathOf(line.map((v, i) => [chart.px(i + 1), chart.py(v)])) }),
    );
  xLabels(
    chart,
    ticks(1, n, 6).filter((tick) => tick >= 1 && Number.isInteger(tick)),
  );
  return chart.root;
}

/** Curves over a shared x: series of { points: [[x, y]], kind, name, dots }, and level lines of { value, kind, name }. */
function curves({ width, series, levels = [], label, unit = "", xTitle, height = 220, fromZero = false }) {
  const points = series.flatMap((one) => one.points),
    ys = [...points.map((p) => p[1]), ...levels.map((l) => l.value)];
  const xs = points.map((p) => p[0]);
  const low = fromZero ? 0 : Math.min(...ys),
    high = Math.max(...ys),
    pad = 0.05 * (high - low || 1);
  const chart = frame({
    x: [Math.min(...xs), Math.max(...xs)],
    y: [low - (fromZero ? 0 : pad), high + pad],
    label,
    unit,
    xTitle,
    height,
    width,
  });
  for (const { value, kind, name } of levels) {
    chart.root.append(
      svg("line", {
        class: `level ${kind}`,
        x1: chart.left,
        x2: chart.width - chart.right,
        y1: chart.py(value),
        y2: chart.py(value),
      }),
      svg(
        "text",
        { class: `mark ${kind}`, x: chart.width - chart.right, y: chart.py(value) - 4, "text-anchor": "end" },
        name,
      ),
    );
  }
  for (const { points: own, kind, dots } of series) {
    const places = own.map(([a, b]) => [chart.px(a), chart.py(b)]);
    chart.root.append(svg("path", { class: `curve ${kind}`, d: pathOf(places) }));
    if (dots) chart.root.append(...places.map(([cx, cy]) => svg("circle", { class: `dot ${kind}`, cx, cy, r: 3 })));
  }
  xLabels(chart, ticks(Math.min(...xs), Math.max(...xs), 6).filter(Number.isInteger));
  return chart.root;
}

/** The legend of a chart. */
const keyOf = (entries) =>
  el(
    "ul",
    { class: "key" },
    entries.map(([kind, text]) => el("li", { class: kind }, text)),
  );
