// The panel of one head.

/** The numbers at the top of the panel. */
function headNumbers(run, head) {
  const place = head.layer * shape.heads + head.head,
    valueOf = (view) => unpack(view.value).values[place];
  return el(
    "dl",
    { class: "numbers" },
    run.views
      .filter((view) => view.stderr === null && Number.isFinite(valueOf(view)))
      .map((view) => {
        const value = valueOf(view),
          other = runs.length > 1 ? viewOf(runs[run === runs[0] ? 1 : 0], view.key) : null;
        const beside = other ? ` vs ${number(unpack(other.value).values[place], view.unit)}` : "";
        return el(
          "div",
          { title: view.meaning },
          el("dt", {}, view.title),
          el("dd", {}, number(value, view.unit), beside ? el("span", { class: "quiet" }, beside) : null),
        );
      }),
  );
}

function spectrumSection(run, head) {
  const share = [...rowOf(run.heads.share, head)].map((value) => 100 * value);
  let sum = 0;
  const running = share.map((value) => (sum += value));
  return el(
    "section",
    {},
    el("h3", {}, "Singular spectrum of the difference"),
    bars({
      series: [{ values: share, kind: "pruned", name: "component" }],
      line: running,
      unit: "%",
      label: `Share of the squared difference by component; the first holds ${number(share[0], "%")}`,
      xTitle: `component (of ${run.heads.width})`,
    }),
    keyOf([
      ["pruned", "share of the squared difference"],
      ["sum", "cumulative share"],
    ]),
  );
}

function trainingSection(run, head) {
  if (!run.restored || run.restored.heads.length === 0) return null;
  const place = restoredPlace(run, head),
    title = el("h3", {}, "After training");
  if (place < 0) return el("section", {}, title, el("p", { class: "quiet" }, "This head was not restored."));
  const {
    shape: [, k],
    values,
  } = unpack(run.restored.magnitudes);
  const n = Math.min(k, run.heads.coefficient.shape[2]);
  const trained = [...values.subarray(place * k, place * k + n)],
    lost = [...rowOf(run.heads.coefficient, head).subarray(0, n)];
  const length = (packed) => number(unpack(packed).values[place]);
  return el(
    "section",
    {},
    title,
    el(
      "p",
      {},
      "The constant has length ",
      el("b", {}, length(run.restored.norm)),
      ", the mean difference ",
      el("b", {}, length(run.restored.mean)),
      ", the free offset ",
      el("b", {}, length(run.restored.offset)),
      ".",
    ),
    n > 0
      ? bars({
          series: [
            { values: lost, kind: "pruned", name: "lost, component" },
            { values: trained, kind: "restored", name: "trained, component" },
          ],
          label: "Magnitudes by component, lost and trained",
          unit: "",
          xTitle: "component",
        })
      : null,
    n > 0
      ? keyOf([
          ["pruned", "mean lost magnitude (α)"],
          ["restored", "trained magnitude (β)"],
        ])
      : null,
  );
}

/** Show a head in the panel. */
function drawHead(head, { onClose, onStep }) {
  const run = shownRun(),
    view = viewOf(run, "changed"),
    heads = ranking({ ...view, values: unpack(view.value).values, isDiverging: false });
  const rank = heads.findIndex((h) => h.layer === head.layer && h.head === head.head) + 1;
  const badge = run.heads.removed.includes(nameOf(head))
    ? "removed by pruning"
    : restoredPlace(run, head) >= 0
      ? "restored"
      : null;
  const step = (by, label, sign) =>
    el(
      "button",
      { type: "button", class: "tool", id: `step${by}`, "aria-label": label, on: { click: () => onStep(by) } },
      sign,
    );
  const redraw = (focused) => {
    drawHead(head, { onClose, onStep });
    byId(focused)?.focus({ preventScroll: true });
  };
  byId("panel").replaceChildren(
    el(
      "div",
      { class: "panel-head" },
      el("h2", { id: "panel-title", tabindex: "-1" }, nameOf(head)),
      badge ? el("span", { class: `badge ${badge === "restored" ? "good" : ""}` }, badge) : null,
      el(
        "span",
        { class: "quiet grow" },
        rank ? `changed more than ${Math.floor((100 * (heads.length - rank)) / heads.length)} % of heads` : "",
        runs.length > 1 ? ` · ${run.name}` : "",
      ),
      step(-1, "Previous head", "‹"),
      step(1, "Next head", "›"),
      el(
        "button",
        { type: "button", class: "tool", id: "close", "aria-label": "Close this head", on: { click: onClose } },
        "×",
      ),
    ),
    headNumbers(run, head),
    tokenSection(run, head),
    textSection(run, head, redraw) ?? "",
    exampleSection(run, head, () => redraw(document.activeElement?.id)) ?? "",
    spectrumSection(run, head),
    trainingSection(run, head) ?? "",
    scoreSection(run, head) ?? "",
  );
}
