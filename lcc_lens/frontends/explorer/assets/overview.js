// The whole run: key figures, top heads, training, layers, evaluation, provenance.

const MOST_RANKED = 18;

function buildFigures() {
  if (runs.length > 1) byId("figures").replaceWith(comparison());
  else
    byId("figures").append(
      ...runs[0].verdict.figures.map(({ name, value, note, head }) =>
        el(
          "li",
          {},
          el("span", { class: "name" }, name),
          el("span", { class: "big" }, value),
          el("span", { class: "quiet" }, head ? el("a", { href: `#${head}` }, note) : note),
        ),
      ),
    );
  byId("notes").append(
    ...runs.flatMap((run) => run.notes.map((note) => el("li", {}, runs.length > 1 ? `${run.name}: ${note}` : note))),
  );
  const { source } = runs[0];
  byId("models").textContent = `${source.dense_name} → ${runs.map((run) => run.source.pruned_name).join(" | ")}`;
}

/** The panel while no head is open: the top heads of the view. */
function drawRanking(view) {
  const heads = ranking(view).slice(0, MOST_RANKED),
    most = Math.max(...heads.map(({ value }) => Math.abs(value)), 1e-12);
  byId("panel").replaceChildren(
    el(
      "div",
      { class: "panel-head" },
      el(
        "h2",
        { id: "panel-title" },
        view.isDiverging ? "Heads that differ most" : `Highest: ${view.title.toLowerCase()}`,
      ),
    ),
    el("p", { class: "quiet" }, "Choose a head here or on the map; a layer by its number."),
    el(
      "ol",
      { class: "ranking" },
      heads.map((head) =>
        rankedHead(view, head, most),
      ),
    ),
  );
}

/** A head with its value as a bar; a link that opens it. */
const rankedHead = (view, head, most) =>
  el(
    "li",
    {},
    el(
      "a",
      { href: `#${nameOf(head)}` },
      el("b", {}, nameOf(head)),
      el("span", {
        class: `length ${head.value < 0 ? "less" : ""}`,
        vars: { "--v": (Number.isFinite(head.value) ? Math.abs(head.value) / most : 0).toFixed(3) },
      }),
      el("span", { class: "value" }, formatted(view, head.value)),
      el("span", { class: "hint" }, hintOf(head)),
    ),
  );

/** The first tokens of a head's first component. */
function hintOf(head) {
  const run = shownRun(),
    found = run.tokens ? tokensOf(run, head, 0) : null;
  return found
    ? found.promoted
        .slice(0, 3)
        .map(({ text }) => visible(text))
        .join("  ")
    : "";
}

function trainingCard(run) {
  if (!run.training) return null;
  const { step, loss, validation } = run.training,
    { losses } = run.restored;
  const pairs = (values) => step.map((s, i) => [s, values[i]]).filter(([, value]) => Number.isFinite(value));
  const series = [
    { points: pairs(loss), kind: "quiet-line" },
    { points: pairs(validation), kind: "restored", dots: true },
  ];
  const levels = ["dense", "pruned"]
    .filter((name) => name in losses)
    .map((name) => ({ value: losses[name], kind: name, name }));
  const drawn = series.filter(({ points }) => points.length > 0);
  if (drawn.length === 0) return null;
  return el(
    "section",
    { class: "card" },
    el("h2", {}, "Training"),
    curves({ width: CARD_WIDTH, series: drawn, levels, label: "Loss by optimiser step", xTitle: "optimiser step" }),
    keyOf([
      ["quiet-line", "training batches"],
      ["restored", "validation"],
    ]),
    el("p", { class: "quiet" }, "Nats per response token."),
  );
}

function layerCard(run) {
  if (!run.layers) return null;
  const kinds = ["heads", "mlp", "resid"];
  const series = run.layers.map(({ value }, i) => ({
    points: [...unpack(value).values].map((v, layer) => [layer, v]),
    kind: kinds[i],
  }));
  return el(
    "section",
    { class: "card" },
    el("h2", {}, "Change by layer"),
    curves({
      width: CARD_WIDTH,
      series,
      unit: "%",
      label: "Change by layer and site",
      xTitle: "layer",
      fromZero: true,
    }),
    keyOf(run.layers.map(({ title }, i) => [kinds[i], title])),
    el("p", { class: "quiet" }, "|dense − pruned| / |dense|, root mean square."),
  );
}

const sourceCard = (run) =>
  el(
    "section",
    { class: "card" },
    el("h2", {}, "Provenance"),
    el(
      "dl",
      { class: "source" },
      Object.entries(run.source.rows).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
    ),
  );

/** Results of an evaluation, one row per model. */
function resultsCard() {
  if (!results) return null;
  return el(
    "section",
    { class: "card wide" },
    el("h2", {}, "Evaluation"),
    el(
      "table",
      { class: "plain" },
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          el("td"),
          results.columns.map((title) => el("th", { scope: "col" }, title)),
        ),
      ),
      el(
        "tbody",
        {},
        results.rows.map(({ name, cells }) =>
          el(
            "tr",
            {},
            el("th", { scope: "row" }, name),
            cells.map((text) => el("td", {}, text)),
          ),
        ),
      ),
    ),
    results.recovered.length
      ? el("p", { class: "quiet" }, `Recovered log-likelihood on data that no step of training has seen: ${results.recovered.join(", ")}.`)
      : null,
  );
}

/** Both runs side by side. */
function comparison() {
  const names = [...new Set(runs.flatMap((run) => run.verdict.figures.map(({ name }) => name)))];
  const cell = (run, name) => run.verdict.figures.find((figure) => figure.name === name);
  const text = (figure) => (figure ? figure.value + (figure.head ? ` (${figure.head})` : "") : "–");
  return el(
    "div",
    { class: "card wide" },
    el(
      "table",
      { class: "plain" },
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          el("td"),
          runs.map((run) => el("th", { scope: "col" }, run.name)),
        ),
      ),
      el(
        "tbody",
        {},
        [
          ["verdict", (run) => run.verdict.headline],
          ...names.map((name) => [name, (run) => text(cell(run, name))]),
        ].map(([name, of]) =>
          el(
            "tr",
            {},
            el("th", { scope: "row" }, name),
            runs.map((run) => el("td", {}, of(run))),
          ),
        ),
      ),
    ),
  );
}

/** Show on the map what changed on a prompt. */
function showPrompt(place) {
  state.text = place;
  chooseView(`text-${place}-pruned`);
  byId("explorer").scrollIntoView();
}

function drawMore() {
  const run = shownRun();
  byId("more").replaceChildren(...[promptCard(run, showPrompt), resultsCard(), layerCard(run), trainingCard(run), sourceCard(run)].filter(Boolean));
}
