// Controls above the map: the view, the run, map or table.

/** Show a view by its key; set once the controls are there. */
let chooseView = () => {};

function buildControls(box) {
  const select = el("select", {
    id: "view",
    on: {
      change: () => {
        state.view = select.value;
        headTable.sort = null;
        refresh();
      },
    },
  });
  const fill = () => {
    select.replaceChildren(...offeredViews().map((view) => el("option", { value: view.key }, view.title)));
    if (!offeredViews().some(({ key }) => key === state.view)) state.view = offeredViews()[0].key;
    select.value = state.view;
  };
  const choice = (pressed, label, click) =>
    el("button", { type: "button", "aria-pressed": String(pressed), on: { click } }, label);
  const runChoices =
    runs.length < 2
      ? []
      : [
          [0, runs[0].name],
          [1, runs[1].name],
          ["difference", "Difference"],
        ];
  const runButtons = runChoices.map(([run, label]) =>
    choice(run === state.run, label, () => {
      state.run = run;
      runButtons.forEach((button, i) => button.setAttribute("aria-pressed", String(runChoices[i][0] === run)));
      fill();
      refresh();
      drawMore();
    }),
  );
  let isTable = false;
  const shows = [choice(true, "Map", () => setTable(false)), choice(false, "Table", () => setTable(true))];
  const setTable = (table) => {
    isTable = table;
    shows.forEach((button, i) => button.setAttribute("aria-pressed", String((i === 1) === table)));
    refresh();
  };
  const refresh = () => {
    draw();
    box.classList.toggle("as-table", isTable);
    box.querySelector(".table-box")?.remove();
    if (isTable) box.append(buildTable(refresh));
  };
  fill();
  const node = el(
    "div",
    { class: "controls" },
    el("label", {}, el("span", { class: "quiet" }, "Show"), select),
    runButtons.length ? el("div", { class: "segments", role: "group", "aria-label": "Run" }, runButtons) : null,
    el("div", { class: "segments", role: "group", "aria-label": "Map or table" }, shows),
    el(
      "div",
      { class: "segments", role: "group", "aria-label": "Take away" },
      el(
        "button",
        {
          type: "button",
          id: "csv",
          title: "Download the numbers of every head",
          on: { click: () => download(`${shownRun().name}_heads.csv`, headsCsv()) },
        },
        "CSV",
      ),
      el(
        "button",
        { type: "button", id: "python", title: "What is on screen as code", on: { click: openCode } },
        "Python",
      ),
    ),
  );
  chooseView = (key) => {
    select.value = key;
    select.dispatchEvent(new Event("change"));
  };
  const nextView = () => {
    select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
    select.dispatchEvent(new Event("change"));
  };
  return { node, nextView, toggleTable: () => setTable(!isTable), isTable: () => isTable };
}
