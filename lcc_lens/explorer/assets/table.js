// The map as a table: every head with every number, sorted by the column that is asked for.

const headTable = { sort: null, descending: true };

function buildTable(onSort) {
  const views = offeredViews(), rows = ranking(shownView()), key = headTable.sort ?? shownView().key;
  const valueOf = (view, head) => (isDifference()
    ? unpack(view.value).values[head.layer * shape.heads + head.head] - unpack(viewOf(runs[0], view.key).value).values[head.layer * shape.heads + head.head]
    : unpack(view.value).values[head.layer * shape.heads + head.head]);
  const sortBy = views.find((view) => view.key === key);
  const direction = headTable.descending ? -1 : 1;
  if (key === "head") rows.sort((a, b) => -direction * (a.layer - b.layer || a.head - b.head));
  else if (sortBy) rows.sort((a, b) => direction * ((valueOf(sortBy, a) || 0) - (valueOf(sortBy, b) || 0)));
  const heading = (id, title, unit) => el("th", { scope: "col", "aria-sort": id === key ? (headTable.descending ? "descending" : "ascending") : "none" },
    el("button", { type: "button", on: { click: () => {
      headTable.descending = id === key ? !headTable.descending : true;
      headTable.sort = id;
      onSort();
    } } }, unit ? `${title} (${unit})` : title));
  return el("div", { class: "table-box", tabindex: "0", role: "region", "aria-label": "All heads as a table" },
    el("table", { class: "heads" },
      el("thead", {}, el("tr", {}, heading("head", "Head", ""), views.map((view) => heading(view.key, view.title, isDifference() && view.unit === "%" ? "points" : view.unit)))),
      el("tbody", {}, rows.map((head) => el("tr", {},
        el("th", { scope: "row" }, el("a", { href: `#${nameOf(head)}` }, nameOf(head))),
        views.map((view) => el("td", {}, number(valueOf(view, head), "", isDifference()))))))));
}
