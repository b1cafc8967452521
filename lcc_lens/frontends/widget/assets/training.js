// Controls for rank, scale, training and undo.

/** The training controls; `ask` sends a message. */
function training(fixed, ask) {
  const rankSays = el("b", {}),
    scaleSays = el("b", {});
  const most = fixed.most_rank || 1;
  const rank = el("input", { type: "range", class: "rank", min: 1, max: most, value: most }),
    scale = el("input", { type: "range", class: "scaling", min: 0, max: 2, step: 0.05, value: 1 });
  const rankOf = () => (Number(rank.value) === fixed.most_rank ? null : Number(rank.value));
  const say = () => {
    rankSays.textContent = rankOf() === null ? " all" : ` ${rank.value} of ${fixed.most_rank}`;
    scaleSays.textContent = ` \u00d7 ${Number(scale.value).toFixed(2)}`;
  };
  const steps = el("input", { type: "number", class: "steps", min: 1, max: 1000, value: 20 }),
    lr = el("input", { type: "number", class: "lr", min: 0, step: "any", placeholder: "default" });
  const button = (name, label, message, title) =>
    el("button", { type: "button", class: name, title, onclick: () => ask(message()) }, label);
  const train = () => ({ do: "train", steps: Number(steps.value), lr: lr.value === "" ? null : Number(lr.value) });
  const buttons = {
    train: button("train primary", "Train", train, "Train further and keep the best"),
    stop: button("stop", "Stop", () => ({ do: "stop" }), "Stop; a training keeps its best so far"),
    undo: button("undo", "Undo", () => ({ do: "undo" }), "Undo the last action"),
    redo: button("redo", "Redo", () => ({ do: "redo" }), "Redo the undone action"),
  };
  rank.addEventListener("input", say);
  rank.addEventListener("change", () => ask({ do: "rank", rank: rankOf() }));
  scale.addEventListener("input", say);
  scale.addEventListener("change", () => ask({ do: "scale", scale: Number(scale.value) }));
  const shown = el("div", { class: "drawing" }),
    estimate = el("p", { class: "quiet estimate" });
  let seconds = null,
    refit = null;
  const guess = () => {
    const parts = seconds === null ? [] : [`${steps.value} steps take about ${duration(seconds * Number(steps.value))}.`];
    if (refit !== 0) parts.unshift(refit === null ? "The refit comes first." : `The refit, which comes first, takes about ${duration(refit)}.`);
    estimate.textContent = parts.join(" ");
  };
  steps.addEventListener("input", guess);
  const sliders = el("div", { class: "row2" }, field("Rank", rank, rankSays), field("Scale", scale, scaleSays));
  const root = part(
    "Training",
    "training",
    sliders,
    el("div", { class: "row2 tight" }, field("Steps", steps), field("Learning rate", lr), ...Object.values(buttons)),
    estimate,
    shown,
  );
  /** Show the session's state, and enable the controls that apply to it. */
  function follow(state, { isBusy, hasHeads, isStoppable }, measured) {
    seconds = state.seconds_per_step ?? measured.seconds ?? null;
    refit = state.seconds_to_refit ?? measured.to_refit ?? null;
    guess();
    sliders.hidden = !state.has_scale;
    rank.value = state.rank ?? most;
    scale.value = state.scale;
    say();
    for (const input of [rank, scale]) input.disabled = isBusy || (input === rank && !state.heads.length);
    buttons.train.disabled = isBusy || !hasHeads || state.n_trained === 0;
    buttons.stop.disabled = !isStoppable;
    buttons.undo.disabled = isBusy || !state.can_undo;
    buttons.redo.disabled = isBusy || !state.can_redo;
  }
  return { root, follow, draw: (points, levels) => shown.replaceChildren(lossCurve(points, levels)) };
}
