// The loss curve: training loss as a line, held-out loss as points.

/** Points are [number, loss, held-out loss or null]. */
function lossCurve(points, levels = {}) {
  if (points.length === 0) return el("p", { class: "quiet empty" }, "The loss curve appears here with the first step.");
  const [width, height, left, right, top, bottom] = [460, 170, 46, 12, 12, 30];
  const held = points.filter(([, , value]) => value !== null);
  const lines = Object.entries(levels);
  const losses = [...points.flatMap(([, loss, value]) => [loss, value]), ...lines.map(([, value]) => value)].filter(
    (value) => value !== null,
  );
  const first = points[0][0],
    last = points.at(-1)[0];
  let [low, high] = [Math.min(...losses), Math.max(...losses)];
  if (high - low < 1e-9) [low, high] = [low - 0.05, high + 0.05];
  const px = (n) => left + ((n - first) / (last - first || 1)) * (width - left - right);
  const py = (loss) => top + (1 - (loss - low) / (high - low)) * (height - top - bottom);
  const line = (among, index) =>
    among.map((point, i) => `${i ? "L" : "M"}${px(point[0]).toFixed(1)} ${py(point[index]).toFixed(1)}`).join("");
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "curve", role: "img", "data-steps": last,
    "aria-label": `Loss over ${last} steps, last held-out loss ${formatted(held.at(-1)?.[2] ?? null)}` });
  for (const value of [low, (low + high) / 2, high])
    root.append(
      svg("line", { class: "rule", x1: left, x2: width - right, y1: py(value), y2: py(value) }),
      svg("text", { class: "tick", x: left - 6, y: py(value) + 4, "text-anchor": "end" }, formatted(value)),
    );
  for (const [name, value] of lines)
    root.append(
      svg("line", { class: `level ${name}`, x1: left, x2: width - right, y1: py(value), y2: py(value) }),
      svg("text", { class: `tick level ${name}`, x: width - right, y: py(value) - 3, "text-anchor": "end" }, name),
    );
  root.append(
    svg("path", { class: "loss", d: line(points, 1) }),
    svg("path", { class: "held", d: line(held, 2) }),
    ...held.map(([n, , value]) => {
      const title = svg("title", {}, `step ${n}: ${formatted(value, "nats")}`);
      return svg("circle", { class: "held", cx: px(n), cy: py(value), r: 3 }, title);
    }),
    svg("text", { class: "tick", x: left, y: height - 8 }, `step ${first}`),
    svg("text", { class: "tick", x: width - right, y: height - 8, "text-anchor": "end" }, String(last)),
    svg("text", { class: "tick strong", x: left + 70, y: height - 8 }, `\u25cf held-out`),
    svg("text", { class: "tick", x: left + 150, y: height - 8 }, "\u2014 training, nats per token"),
  );
  return root;
}
