// What is on screen as a file, and as Python.

const csvCell = (value) => (/[",\n\r]/.test(String(value)) ? `"${String(value).replace(/"/g, '""')}"` : String(value));
const csv = (columns, rows) => [columns, ...rows].map((row) => row.map(csvCell).join(",")).join("\n") + "\n";

/** Save a text as a file. */
function download(name, text) {
  const link = el("a", { download: name, href: URL.createObjectURL(new Blob([text], { type: "text/csv" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** Every head with every view of the shown run, or of the difference. */
function headsCsv() {
  const views = offeredViews();
  const heads = Array.from({ length: shape.layers * shape.heads }, (_, place) => ({
    layer: Math.floor(place / shape.heads),
    head: place % shape.heads,
  }));
  const rows = heads.map((head) => [
    head.layer,
    head.head,
    ...views.map((view) => {
      const value = valueIn(view, head);
      return Number.isFinite(value) ? Number(value.toPrecision(6)) : "";
    }),
  ]);
  return csv(["layer", "head", ...views.map(({ title, unit }) => (unit ? `${title} (${unit})` : title))], rows);
}

/** The lines that define `scan` and whatever else a view's code names. */
function sourceLines(run, view, head) {
  const record = run.source.rows,
    needsPair = view.prompt !== null || head !== null;
  return [
    `scan = lcc.Scan.load(${JSON.stringify(run.path)})`,
    ...(run.restored && (needsPair || view.code.includes("restoration"))
      ? [`restoration = lcc.Restoration.load(${JSON.stringify(run.path)})`]
      : []),
    ...(needsPair ? [`pair = lcc.load_pair(${JSON.stringify(record.dense)}, ${JSON.stringify(record.pruned)})`] : []),
    ...(view.prompt === null ? [] : [comparedLine(run, view.prompt)]),
  ];
}

const comparedLine = (run, prompt) =>
  `seen = lcc.compare_prompt(pair, ${JSON.stringify(prompt)}${run.restored ? ", restoration=restoration" : ""})`;

/** Python that computes what is on screen. */
function pythonCode() {
  const view = shownView(),
    imports = ["import lcc_lens as lcc"];
  if (view.code.includes("torch.")) imports.push("import torch");
  const comment = `  # ${view.title}${view.unit ? ` (${view.unit})` : ""}, one per layer and head`;
  if (isDifference()) {
    const body = sourceLines(runs[1], { ...view, prompt: view.prompt }, null);
    const lines = body.map((line) => `    ${line.split(JSON.stringify(runs[1].path)).join("run")}`);
    return [
      ...imports,
      "",
      "def value_of(run):",
      ...lines,
      `    return ${view.code}`,
      "",
      `value = value_of(${JSON.stringify(runs[1].path)}) - value_of(${JSON.stringify(runs[0].path)})${comment}`,
    ].join("\n");
  }
  const run = shownRun(),
    head = state.open;
  const lines = [...imports, "", ...sourceLines(run, view, head), `value = ${view.code}${comment}`];
  if (head) {
    lines.push(
      "",
      `head = lcc.Head(${head.layer}, ${head.head})`,
      "component = scan.components.coefficients[head][0] * scan.components.directions[head][0]",
      "tokens = lcc.promoted_tokens(pair.pruned, pair.tokenizer, head, component)",
    );
    const text = run.texts.length ? shownText(run) : null;
    if (text?.kind === "prompt") {
      if (view.prompt !== text.title) lines.push(comparedLine(run, text.title));
      lines.push("figure = lcc.plot_attention(seen, head)");
    }
  }
  return lines.join("\n");
}

function openCode() {
  byId("code-text").textContent = pythonCode();
  byId("code").showModal();
}

function buildCode() {
  const dialog = byId("code"),
    text = el("pre", { id: "code-text", tabindex: "0" });
  const copy = el("button", { type: "button", class: "primary", on: { click: () => copyText(text, copy) } }, "Copy");
  dialog.append(
    el("h2", { id: "code-title" }, "As Python"),
    text,
    el(
      "div",
      { class: "bar-row" },
      copy,
      el("button", { type: "button", class: "small", on: { click: () => dialog.close() } }, "Close"),
    ),
  );
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
}

/** Copy an element's text; where the browser keeps its clipboard to itself, the text is selected instead. */
async function copyText(node, button) {
  try {
    await navigator.clipboard.writeText(node.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(node);
    button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}
