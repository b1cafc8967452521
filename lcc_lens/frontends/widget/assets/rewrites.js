// Versions of the prompt: their merits, and how likely each makes the dense model's answer in the pruned one.

/** The part that rewrites the prompt; a click on a version makes it the prompt and reads it. */
function rewriting(model, ask) {
  const write = el("button", { type: "button", class: "rewrite" }, "Rewrite the prompt");
  const note = el("p", { class: "quiet verdict" }), place = el("div", { class: "place-rewrites" });
  const root = part("Versions of the prompt", "rewrites", el("div", { class: "row2 tight" }, write), note, place);
  write.addEventListener("click", () => ask({ do: "rewrite", prompt: model.get("prompt") }));

  function draw() {
    const { rows, names, verdict, prompt } = model.get("rewrites");
    if (!rows) return (note.textContent = "Merits and likelihoods of other ways to write it appear here.");
    note.textContent = prompt === model.get("prompt") ? verdict : "Of the prompt before; press Rewrite.";
    const head = el("tr", {}, ["prompt", ...names, "over raw"].map((name) => el("th", {}, name)));
    const body = rows.map((row) =>
      el("tr", { class: row.chosen ? "chosen-version" : null },
        el("td", {}, version(row)),
        row.merits.map((score) => el("td", { title: row.lowered }, score.toFixed(2))),
        el("td", {}, row.source === "raw" ? "" : formatted(row.margin))));
    place.replaceChildren(el("table", { class: "tokens versions" }, el("thead", {}, head), el("tbody", {}, body)));
  }
  const version = (row) =>
    [el("button", { type: "button", class: "version", title: row.text, onclick: () => ask({ do: "read", prompt: row.text }) },
      row.text), el("span", { class: "quiet" }, row.source)];
  return { root, draw, follow: ({ isBusy }) => (write.disabled = isBusy) };
}
