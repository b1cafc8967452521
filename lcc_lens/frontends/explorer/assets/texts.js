// A few texts in the dense, the pruned and the restored model: attention and output of a head by token.

const shownText = (run) => run.texts[Math.min(state.text, run.texts.length - 1)];

/** A head's `norm` or `difference` at every token of a text in one model, in units of activations. */
function sizesOf(text, quantity, model, { layer, head }) {
  const {
      shape: [, tokens, layers, heads],
      values,
    } = unpack(text[quantity]),
    most = unpack(text.most).values[layer * heads + head];
  return Array.from(
    { length: tokens },
    (_, token) => (values[((model * tokens + token) * layers + layer) * heads + head] / 255) * most,
  );
}

/** Relative change of a head at every token of a text, in percent; null where the dense output is zero. */
function changesOf(text, model, head) {
  const dense = sizesOf(text, "norm", 0, head);
  return sizesOf(text, "difference", model, head).map((value, token) =>
    dense[token] > 0 ? (100 * value) / dense[token] : null,
  );
}

/** The select of a text; `onChoose` is called after another one is chosen. */
function textChoice(run, onChoose) {
  const choice = el(
    "select",
    {
      id: "text-choice",
      "aria-label": "Text",
      on: {
        change: () => {
          state.text = Number(choice.value);
          state.query = null;
          onChoose();
        },
      },
    },
    run.texts.map(({ title, kind }, place) =>
      el("option", { value: place }, kind === "prompt" ? `“${title}”` : title),
    ),
  );
  choice.value = String(Math.min(state.text, run.texts.length - 1));
  return choice;
}

function textSection(run, head, redraw) {
  if (run.texts.length === 0) return null;
  const text = shownText(run);
  const points = (values) => values.map((value, token) => [token, value]).filter(([, value]) => value !== null);
  const chart = (series, label, unit) =>
    curves({ series, label, unit, xTitle: "token", height: 150, fromZero: true });
  const changed = text.models.slice(1).map((kind, i) => ({ kind, points: points(changesOf(text, i + 1, head)) }));
  const lengths = text.models.map((kind, i) => ({ kind, points: points(sizesOf(text, "norm", i, head)) }));
  const key = (names) => keyOf(names.map((name) => [name, name]));
  return el(
    "section",
    { class: "texts" },
    el(
      "div",
      { class: "bar-row" },
      el("h3", {}, "Attention pattern"),
      textChoice(run, () => redraw("text-choice")),
    ),
    patternPart(text, head, () => redraw(document.activeElement?.id)),
    el(
      "div",
      { class: "bar-row" },
      el("h3", {}, "Output by token"),
      el(
        "button",
        {
          type: "button",
          class: "small",
          id: "tokens-csv",
          on: { click: () => download(`${nameOf(head)}_tokens.csv`, tokenCsv(text, head)) },
        },
        "CSV",
      ),
    ),
    el("p", { class: "quiet" }, "Relative change, |dense − model| / |dense|"),
    chart(changed, `Relative change of ${nameOf(head)} at every token`, "%"),
    el("p", { class: "quiet" }, "Length of the output, |z|"),
    chart(lengths, `Length of the output of ${nameOf(head)} at every token`, ""),
    key(text.models),
  );
}

/** A head's numbers at every token of a text. */
function tokenCsv(text, head) {
  const columns = text.models.flatMap((name, model) => [
    [`norm_${name}`, sizesOf(text, "norm", model, head)],
    ...(model ? [[`difference_${name}`, sizesOf(text, "difference", model, head)]] : []),
  ]);
  const rows = text.pieces.map((piece, i) => [i, piece, ...columns.map(([, values]) => values[i].toPrecision(4))]);
  return csv(["position", "token", ...columns.map(([name]) => name)], rows);
}

const MOST_NEXT = 8;

/** Next tokens of the run's prompts, model by model. */
function promptCard(run, onShow) {
  const prompts = run.texts.map((text, place) => ({ text, place })).filter(({ text }) => text.kind === "prompt");
  if (prompts.length === 0) return null;
  return el(
    "section",
    { class: "card wide prompts" },
    el("h2", {}, "Next token"),
    prompts.map(({ text, place }) => {
      const most = Math.max(...text.next.slice(0, MOST_NEXT).flatMap((row) => text.models.map((name) => row[name])));
      const cell = (row, name) =>
        el(
          "td",
          {},
          el("span", { class: `length ${name}`, vars: { "--v": (row[name] / most).toFixed(3) } }),
          number(100 * row[name], "%"),
        );
      return el(
        "div",
        { class: "prompt" },
        el(
          "div",
          { class: "bar-row" },
          el("p", { class: "asked" }, text.title),
          el(
            "button",
            { type: "button", class: "small", on: { click: () => onShow(place) } },
            "What changed in each head",
          ),
        ),
        el(
          "table",
          { class: "plain" },
          el(
            "thead",
            {},
            el("tr", {}, el("td"), text.models.map((name) => el("th", { scope: "col", class: name }, name))),
          ),
          el(
            "tbody",
            {},
            text.next.slice(0, MOST_NEXT).map((row) =>
              el(
                "tr",
                {},
                el("th", { scope: "row" }, el("span", { class: "chip" }, visible(row.token))),
                text.models.map((name) => cell(row, name)),
              ),
            ),
          ),
        ),
      );
    }),
  );
}
