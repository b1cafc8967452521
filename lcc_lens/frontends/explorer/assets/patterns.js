// Attention patterns of a head: one square per model, rows are queries, columns keys.

const PATTERN_GAMMA = 0.6; // faint attention is shown darker than in proportion

/** A head's pattern in one model, in 255ths: the rows of its lower triangle, one after the other. */
function patternOf(text, model, { layer, head }) {
  const {
    shape: [, layers, heads, entries],
    values,
  } = unpack(text.patterns);
  const start = ((model * layers + layer) * heads + head) * entries;
  return values.subarray(start, start + entries);
}

const entryAt = (query, key) => (query * (query + 1)) / 2 + key;

/** The square of one model; `paint` draws it again in another theme. */
function patternCanvas(text, model, head) {
  const n = text.pieces.length,
    name = text.models[model],
    pattern = patternOf(text, model, head);
  const canvas = el("canvas", {
    class: `pattern ${name}`,
    width: n,
    height: n,
    role: "img",
    "aria-label": `Attention pattern of ${nameOf(head)} in the ${name} model`,
  });
  canvas.paint = () => {
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, n, n);
    pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
    for (let query = 0; query < n; query++)
      for (let key = 0; key <= query; key++) {
        pen.globalAlpha = (pattern[entryAt(query, key)] / 255) ** PATTERN_GAMMA;
        pen.fillRect(key, query, 1, 1);
      }
  };
  canvas.paint();
  return canvas;
}

const repaintPatterns = () => document.querySelectorAll("canvas.pattern").forEach((canvas) => canvas.paint());

/** The patterns of a head in all models, the entry under the pointer, and what the chosen token attends to. */
function patternPart(text, head, redraw) {
  if (!text.patterns)
    return el(
      "p",
      { class: "quiet" },
      "Attention patterns are missing: the model has no hook point for them (hook_pattern).",
    );
  const n = text.pieces.length,
    at = { query: Math.min(state.query ?? n - 1, n - 1), key: 0 };
  const readout = el("p", { class: "readout", "aria-live": "polite" });
  const value = (model, query, key) => number((100 * patternOf(text, model, head)[entryAt(query, key)]) / 255, "%");
  const say = (query, key) => {
    const all = text.models.map((name, model) => `${name} ${value(model, query, key)}`).join(", ");
    readout.replaceChildren(
      el("b", {}, visible(text.pieces[query])),
      ` (${query}) → `,
      el("b", {}, visible(text.pieces[key])),
      ` (${key}): ${all}`,
    );
  };
  const idle = () =>
    readout.replaceChildren(el("span", { class: "quiet" }, "Rows attend to columns. Click a row to list its largest."));
  const placed = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const place = (value) => Math.max(0, Math.min(n - 1, Math.floor(value * n)));
    const query = place((event.clientY - box.top) / box.height),
      key = place((event.clientX - box.left) / box.width);
    return key <= query ? { query, key } : null;
  };
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const squares = text.models.map((name, model) => {
    const canvas = patternCanvas(text, model, head);
    canvas.tabIndex = 0;
    canvas.id = `pattern-${name}`;
    canvas.addEventListener("pointermove", (event) => {
      const place = placed(event);
      place ? say(place.query, place.key) : idle();
    });
    canvas.addEventListener("pointerleave", idle);
    canvas.addEventListener("click", (event) => {
      const place = placed(event);
      if (!place) return;
      state.query = place.query;
      redraw();
    });
    canvas.addEventListener("keydown", (event) => {
      if (event.key === "Enter") {
        state.query = at.query;
        redraw();
      } else if (moves[event.key]) {
        at.query = Math.max(0, Math.min(n - 1, at.query + moves[event.key][0]));
        at.key = Math.max(0, Math.min(at.query, at.key + moves[event.key][1]));
        say(at.query, at.key);
      } else return;
      event.preventDefault();
      event.stopPropagation();
    });
    return el("figure", { class: name }, el("figcaption", {}, name), canvas);
  });
  idle();
  return el("div", {}, el("div", { class: "patterns" }, squares), readout, attended(text, head, at.query));
}

const MOST_ATTENDED = 4;

/** The tokens that one token attends to most, model by model. */
function attended(text, head, query) {
  const lists = text.models.map((name, model) => {
    const pattern = patternOf(text, model, head).subarray(entryAt(query, 0), entryAt(query, query) + 1);
    const keys = [...pattern.keys()].sort((a, b) => pattern[b] - pattern[a]).slice(0, MOST_ATTENDED);
    return el(
      "ol",
      { class: name },
      keys.map((key) =>
        el(
          "li",
          {},
          el("span", { class: "chip" }, visible(text.pieces[key])),
          ` ${number((100 * pattern[key]) / 255, "%")}`,
        ),
      ),
    );
  });
  return el(
    "div",
    { class: "attended" },
    el(
      "p",
      { class: "quiet" },
      "Token ",
      el("b", {}, `${query} “${visible(text.pieces[query])}”`),
      " attends most to:",
    ),
    el("div", { class: "patterns" }, lists),
  );
}
