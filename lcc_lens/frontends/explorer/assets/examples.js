// Examples, coloured by one head's relative change at every token.

/** Relative change of a head at every token of an example, in percent. */
function lossesOf(example, { layer, head }) {
  const {
      shape: [n, , heads],
      values,
    } = unpack(example.loss),
    layers = example.loss.shape[1];
  return Array.from({ length: n }, (_, token) => values[(token * layers + layer) * heads + head]);
}

/** A change as text; the page stores at most 255 %. */
const percent = (value) => (value >= 255 ? "≥ " : "") + number(value, "%");

function exampleSection(run, head, redraw) {
  if (run.examples.length === 0) return null;
  const place = Math.min(state.example, run.examples.length - 1),
    example = run.examples[place];
  const loss = lossesOf(example, head),
    most = Math.max(...loss, 1);
  const readout = el("p", { class: "readout" });
  const say = (i) => {
    readout.replaceChildren(
      ...(i === null
        ? [worstTokens(example, loss)]
        : [el("b", {}, visible(example.pieces[i])), ` changed ${percent(loss[i])}`]),
    );
  };
  const text = el(
    "p",
    { class: "example", tabindex: "0", "aria-label": `Example ${place + 1}` },
    example.pieces.map((piece, i) =>
      el(
        "span",
        {
          class: i >= example.response ? "token response" : "token",
          "data-i": i,
          vars: { "--v": (loss[i] / most).toFixed(3) },
        },
        piece,
      ),
    ),
  );
  const at = (event) => (event.target.dataset.i === undefined ? null : Number(event.target.dataset.i));
  text.addEventListener("pointerover", (event) => say(at(event)));
  text.addEventListener("click", (event) => say(at(event)));
  text.addEventListener("pointerleave", () => say(null));
  say(null);
  const step = (by, label) =>
    el(
      "button",
      {
        type: "button",
        class: "tool",
        "aria-label": `${label} example`,
        id: `example-${label}`,
        disabled: place + by < 0 || place + by >= run.examples.length,
        on: {
          click: () => {
            state.example = place + by;
            redraw();
          },
        },
      },
      by < 0 ? "‹" : "›",
    );
  return el(
    "section",
    { class: "examples" },
    el(
      "div",
      { class: "bar-row" },
      el("h3", {}, "Change on the examples"),
      el(
        "div",
        { class: "stepper" },
        step(-1, "previous"),
        el("span", { class: "quiet" }, `${place + 1} of ${run.examples.length}`),
        step(1, "next"),
      ),
    ),
    text,
    readout,
    el("div", { class: "scale small" }),
    el(
      "div",
      { class: "ends" },
      el("span", {}, "unchanged"),
      el("span", {}, "|dense − pruned| / |dense|"),
      el("span", {}, percent(most)),
    ),
    el("p", { class: "quiet" }, "The answer is underlined."),
  );
}

/** The tokens at which the head changed most. */
function worstTokens(example, loss) {
  const order = loss
    .map((value, i) => i)
    .sort((a, b) => loss[b] - loss[a])
    .slice(0, 4);
  return el(
    "span",
    { class: "quiet" },
    "Largest at ",
    order.map((i, n) => [n ? ", " : "", el("b", {}, visible(example.pieces[i])), ` ${percent(loss[i])}`]).flat(),
  );
}
