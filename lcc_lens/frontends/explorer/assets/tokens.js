// Tokens that a head's components promote and suppress.

/** One vector's tokens: { promoted, suppressed }, each a list of { text, logit }; null for a zero vector. */
function tokensOf(run, head, vector) {
  const [, , vectors, sides, k] = run.tokens.index.shape;
  const index = rowOf(run.tokens.index, head),
    logits = rowOf(run.tokens.logits, head);
  const side = (s) =>
    Array.from({ length: k }, (_, i) => {
      const place = (vector * sides + s) * k + i;
      return { text: run.tokens.texts[index[place]], logit: logits[place] };
    });
  return vector < vectors && index[vector * sides * k] >= 0 ? { promoted: side(0), suppressed: side(1) } : null;
}

/** The title of a vector. */
function vectorTitle(name) {
  if (name === "mean") return "Mean difference";
  return name === "learned" ? "Learned constant" : `Component ${name}`;
}

const chip = ({ text, logit }, kind, most) =>
  el(
    "li",
    {},
    el(
      "span",
      {
        class: `chip ${kind}`,
        vars: { "--v": (Math.abs(logit) / (most || 1)).toFixed(3) },
        title: `${JSON.stringify(text)}: ${number(logit, "", true)} logits`,
      },
      visible(text),
    ),
  );

function tokenSection(run, head) {
  const title = el("h3", {}, "Logit lens: tokens that its components promote");
  if (!run.tokens)
    return el("section", {}, title, el("p", { class: "quiet" }, "This run has no token tables."));
  const share = rowOf(run.heads.share, head);
  const rows = run.tokens.vectors
    .map((name, vector) => {
      const found = tokensOf(run, head, vector);
      if (!found) return null;
      const most = Math.max(...[...found.promoted, ...found.suppressed].map(({ logit }) => Math.abs(logit)));
      const note = /^\d+$/.test(name)
        ? `${number(100 * share[Number(name) - 1], "%")} of the difference`
        : name === "mean"
          ? "all components together"
          : "added by training";
      return el(
        "li",
        { class: `component ${name === "learned" ? "is-learned" : ""}` },
        el("h4", {}, vectorTitle(name), el("span", { class: "quiet" }, note)),
        el(
          "ul",
          { class: "chips", "aria-label": "promotes" },
          found.promoted.map((t) => chip(t, "up", most)),
        ),
        el(
          "ul",
          { class: "chips", "aria-label": "suppresses" },
          found.suppressed.map((t) => chip(t, "down", most)),
        ),
      );
    })
    .filter(Boolean);
  return el(
    "section",
    {},
    title,
    el(
      "p",
      { class: "quiet" },
      "Each vector is read alone through the output projection, final norm and unembedding: ",
      el("span", { class: "swatch up" }, "promoted"),
      " ",
      el("span", { class: "swatch down" }, "suppressed"),
    ),
    rows.length
      ? el("ul", { class: "components" }, rows)
      : el("p", { class: "quiet" }, "The output projection maps all of them to zero."),
  );
}
