// The map as a table: every head with every view, sorted by one column.

const headTable = { sort: null, descending: true };

/** A head's value in a view, as the map shows it: of one run, or the difference. */
function valueIn(view, { layer, head }) {
  const place = layer * shape.heads + head,
    value = unpack(view.value).values[place];
  return isDifference() ? value - unpack(viewOf(runs[0], view.key).value).values[place] : value;
}

/** All heads, in model order or by a view; heads without a value come last. */
function sortedHeads(view) {
  const heads = Array.from({ length: shape.layers * shape.heads }, (_, i) => ({
    layer: Math.floor(i / shape.heads),
    head: i % shape.heads,
  }));
  if (!view) return headTable.descending ? heads.reverse() : heads;
  const last = headTable.descending ? -Infinity : Infinity,
    keyed = heads.map((head) => [Number.isFinite(valueIn(view, head)) ? valueIn(view, head) : last, head]);
  keyed.sort(([a], [b]) => (a === b ? 0 : a < b === headTable.descending ? 1 : -1));
  return keyed.map(([, head]) => head);
}

function buildTable(onSort) {
  const views = offeredViews(),
    key = headTable.sort ?? shownView().key,
    rows = sortedHeads(views.find((view) => view.key === key));
  const heading = (id, title, unit) =>
    el(
      "th",
      { scope: "col", "aria-sort": id === key ? (headTable.descending ? "descending" : "ascending") : "none" },
      el(
        "button",
        {
          type: "button",
          on: {
            click: () => {
              headTable.descending = id === key ? !headTable.descending : id !== "head";
              headTable.sort = id;
              onSort();
              document.querySelector('.heads [aria-sort$="scending"] button').focus();
            },
          },
        },
        unit ? `${title} (${unit})` : title,
      ),
    );
  return el(
    "div",
    { class: "table-box", tabindex: "0", role: "region", "aria-label": "All heads as a table" },
    el(
      "table",
      { class: "heads" },
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          heading("head", "Head", ""),
          views.map((view) =>
            heading(view.key, view.title, isDifference() && view.unit === "%" ? "points" : view.unit),
          ),
        ),
      ),
      el(
        "tbody",
        {},
        rows.map((head) =>
          el(
            "tr",
            {},
            el("th", { scope: "row" }, el("a", { href: `#${nameOf(head)}` }, nameOf(head))),
            views.map((view) => el("td", {}, number(valueIn(view, head), "", isDifference()))),
          ),
        ),
      ),
    ),
  );
}
