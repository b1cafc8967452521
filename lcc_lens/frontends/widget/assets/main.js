// One view of the widget: shows the session's traits and sends the reader's actions as messages.

function render({ model, el: host }) {
  const fixed = model.get("fixed"),
    hasMap = fixed.layers > 0;
  let chosen = new Set(model.get("state").heads),
    later = null, // what to choose once the session is idle
    unheard = 0; // choices without an answer yet: their state would be older than what is shown
  let asked = ""; // a job that was asked for and has not been heard of yet
  const JOBS = { train: "training", read: "reading", export: "exporting", save: "saving", pin: "pinning", unpin: "reading",
    rewrite: "rewriting" };
  const ask = (message) => {
    asked = JOBS[message.do] ?? asked;
    model.send(message);
    if (asked) follow();
  };

  const status = el("span", { class: "status", role: "status" }),
    failure = el("p", { class: "failure", role: "alert" });
  const map = hasMap ? headMap(fixed, choose) : null;
  const picks = { onShow: (set) => map.paint(set), onChoose: choose, onSelect: choose };
  const many = hasMap ? picking(fixed, map, picks) : null;
  const train = training(fixed, ask),
    choice = methodChoice(fixed, ask),
    shown = readouts(model, ask, fixed.heads),
    versions = rewriting(model, ask),
    out = exporting(ask),
    keep = keeping(ask),
    code = codeOf();
  const n = el("span", { class: "chosen" });
  const source = `${fixed.pruned} (pruned), ${fixed.dense} (dense)`;
  const root = el(
    "div",
    { class: "lcc-restore" },
    el("header", {}, el("div", {}, el("h2", {}, "Restore"), el("p", { class: "quiet" }, source)), n, status),
    failure,
    el(
      "div",
      { class: "columns" },
      hasMap ? el("div", { class: "picked" }, map.root, many.root) : null,
      el("div", { class: "work" }, choice.root, train.root, shown.root, versions.root),
      el("div", { class: "end" }, keep.root, out.root, code.root),
    ),
  );

  /** Show a choice at once; send it to the session now, or once it is idle. */
  function choose(next, how = null) {
    chosen = next;
    later = next.size === 0 ? null : { do: "choose", ...(how ?? { heads: [...next] }) };
    if (later !== null && model.get("busy") === "reading") ask({ do: "skip" });
    settle();
    follow();
  }
  function settle() {
    if (later === null || model.get("busy")) return;
    unheard += 1;
    ask(later);
    later = null;
  }
  function adopt() {
    if (later === null && unheard === 0) chosen = new Set(model.get("state").heads);
  }
  function follow() {
    const state = model.get("state"),
      busy = model.get("busy") || asked;
    const onHeads = hasMap && state.on_heads;
    const now = {
      isBusy: busy !== "",
      isStoppable: busy !== "",
      hasHeads: !onHeads || chosen.size > 0,
    };
    map?.paint(chosen);
    many?.follow(chosen);
    if (hasMap) root.querySelector(".picked").classList.toggle("unused", !onHeads);
    n.textContent = onHeads ? `${chosen.size} ${chosen.size === 1 ? "head" : "heads"} chosen` : "";
    status.textContent = busy ? `${model.get("progress") || busy} \u2026` : "ready";
    root.classList.toggle("busy", now.isBusy);
    root.setAttribute("aria-busy", String(now.isBusy));
    failure.textContent = model.get("error");
    for (const one of [shown, versions, keep, out]) one.follow(now);
    choice.follow(state, now);
    const { seconds, to_refit, key } = model.get("readout");
    train.follow(state, now, key === state.key ? { seconds, to_refit } : {});
    shown.draw();
    code.draw(state.history, model.get("exported"));
  }
  const drawCurve = () => {
    const { levels, method } = model.get("readout"); // of the objective that the method trains on
    train.draw([...model.get("curve"), ...model.get("live")], method === model.get("state").method ? levels : {});
  };
  const heard = (message) => {
    asked = "";
    if (message.done === "choose") unheard = Math.max(0, unheard - 1); // another view may have asked
    adopt();
    follow();
  };
  const changes = {
    "change:state": () => (adopt(), drawCurve(), follow()),
    "change:busy": () => ((asked = ""), settle(), follow()),
    "change:progress": follow,
    "change:error": follow,
    "change:readout": () => (drawCurve(), follow()),
    "change:prompt": () => (shown.ask(), shown.draw(), versions.draw()),
    "change:rewrites": () => (versions.draw(), follow()),
    "change:exported": () => (out.draw(model.get("exported")), follow()),
    "change:curve": drawCurve,
    "change:live": drawCurve,
    "msg:custom": heard,
  };
  for (const [event, react] of Object.entries(changes)) model.on(event, react);
  out.draw(model.get("exported"));
  drawCurve();
  versions.draw();
  follow();
  host.append(root);
  for (const node of root.querySelectorAll("button, select, input, [tabindex]"))
    node.dataset.lmSuppressShortcuts = "true"; // keys typed here are no commands of JupyterLab's
  const unfollow = followTheme(root);
  return () => {
    unfollow();
    for (const [event, react] of Object.entries(changes)) model.off(event, react);
  };
}

export default { render };
