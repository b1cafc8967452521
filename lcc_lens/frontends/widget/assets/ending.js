// The verified export, and the session as code.

/** The export controls. */
function exporting(ask) {
  const out = el("input", { type: "text", class: "out", value: "out/restored", "aria-label": "Folder to export to" });
  const overwrite = el("input", { type: "checkbox", class: "overwrite" });
  const go = el("button", { type: "button", class: "export" }, "Export");
  const result = el("p", { class: "exported", role: "status" });
  out.addEventListener("keydown", (event) => event.stopPropagation()); // the notebook has keys of its own
  go.addEventListener("click", () => ask({ do: "export", out: out.value, overwrite: overwrite.checked }));
  const root = part(
    "Export",
    "exporting",
    el(
      "div",
      { class: "row2 tight" },
      field("Folder", out),
      go,
      el("label", { class: "check" }, overwrite, "overwrite"),
    ),
    result,
  );
  const draw = ({ path, difference, effect }) => {
    if (!path) return;
    result.textContent =
      `Written to ${path} and loaded again: its logits differ from the restored model's by at most ` +
      `${formatted(difference)}; the restoration changes the pruned model's by up to ${formatted(effect)}.`;
  };
  return { root, draw, follow: ({ isBusy, hasHeads }) => (go.disabled = isBusy || !hasHeads) };
}

/** Save the session, go on from a saved one, or read a saved restoration beside this one. */
function keeping(ask) {
  const run = el("input", { type: "text", class: "run", value: "runs/session", "aria-label": "Run folder" });
  run.addEventListener("keydown", (event) => event.stopPropagation()); // the notebook has keys of its own
  const button = (name, label, action, title) =>
    el("button", { type: "button", class: name, title, onclick: () => ask({ do: action, run: run.value }) }, label);
  const buttons = {
    save: button("save", "Save", "save", "Write the restoration and the session's state"),
    load: button("load", "Load", "load", "Go on from a saved session"),
    compare: button("compare", "Compare", "pin", "Read the folder's restoration beside this one"),
  };
  const root = part("Save", "keeping", el("div", { class: "row2 tight" }, field("Run folder", run), ...Object.values(buttons)));
  const follow = ({ isBusy, hasHeads }) => {
    for (const one of Object.values(buttons)) one.disabled = isBusy;
    buttons.save.disabled = isBusy || !hasHeads;
  };
  return { root, follow };
}

/** The part with the session's history. */
function codeOf() {
  const lines = el("pre", { class: "history", tabindex: "0", "aria-label": "Code of the session" });
  const copy = el("button", { type: "button", class: "copy" }, "Copy");
  copy.addEventListener("click", () => navigator.clipboard?.writeText(lines.textContent));
  const root = part("Session as code", "coding", copy, lines);
  const draw = (history, exported) => {
    const shown = [...history, ...(exported.line ? [exported.line] : [])];
    lines.textContent = shown.length ? shown.join("\n") : "# every action adds its line here";
    lines.scrollTop = lines.scrollHeight;
  };
  return { root, draw };
}
