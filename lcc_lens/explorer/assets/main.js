// What happens when: the address, the keys, the choices above the map.

const KEYS = [["← ↑ → ↓", "move over the map"], ["Enter", "open the head"], ["Esc", "close it"], ["/", "search"], ["[ ]", "previous and next head"],
  ["v", "next thing to show"], ["t", "map or table"], ["d", "dark or light"], ["?", "this help"]];

/** Draw whatever depends on the choices; keeps the open head open. */
function draw() {
  const view = shownView();
  paintMap(view);
  paintLegend(view);
  if (state.open) drawHead(state.open, { onClose: closeHead, onStep: stepHead });
  else drawRanking(view);
}

function showHead(head) {
  state.active = head;
  state.open = head;
  const panel = byId("panel"), focused = panel.contains(document.activeElement) ? document.activeElement.id || "panel-title" : null;
  markMap();
  paintReadout(shownView(), null);
  drawHead(head, { onClose: closeHead, onStep: stepHead });
  document.body.classList.add("has-head");
  shieldRest();
  panel.scrollTop = 0;
  if (focused || isNarrow.matches) byId(focused ?? "panel-title")?.focus({ preventScroll: true });
  document.title = `${nameOf(head)} · ${runs[0].source.pruned_name}`;
  announce(`${nameOf(head)} opened`);
}

/** On a narrow screen the open head covers the rest, which then takes no focus. */
function shieldRest() {
  for (const part of document.querySelectorAll(".top, .verdict, #map-side, #more")) part.inert = isNarrow.matches && state.open !== null;
}

/** Open a head by its address, so that back, forward and copied links work. */
function openHead(head, { replace = false } = {}) {
  const address = `#${nameOf(head)}`;
  showHead(head);
  if (location.hash === address) return;
  if (replace) history.replaceState(null, "", address);
  else location.hash = address;
}

function closeHead() {
  if (!state.open) return;
  const head = state.open;
  history.pushState(null, "", location.href.split("#")[0]);
  hideHead();
  cellOf(head).focus({ preventScroll: true });
}

function hideHead() {
  state.open = null;
  document.body.classList.remove("has-head");
  shieldRest();
  document.title = `${runs[0].source.pruned_name}: what pruning took`;
  draw();
}

/** The next or previous head in model order. */
function stepHead(by) {
  const n = shape.layers * shape.heads, place = (state.active.layer * shape.heads + state.active.head + by + n) % n;
  openHead({ layer: Math.floor(place / shape.heads), head: place % shape.heads }, { replace: true });
}

function followAddress() {
  const head = headOf(location.hash.slice(1));
  if (head && !(state.open && nameOf(state.open) === nameOf(head))) showHead(head);
  else if (state.open && location.hash === "") hideHead();
}

/** Move the head under the keys; an open panel follows. */
function move(rows, columns) {
  const clamp = (value, most) => Math.max(0, Math.min(most - 1, value));
  state.active = { layer: clamp(state.active.layer + rows, shape.layers), head: clamp(state.active.head + columns, shape.heads) };
  markMap();
  cellOf(state.active).focus({ preventScroll: isNarrow.matches });
  if (state.open) openHead(state.active, { replace: true });
  else paintReadout(shownView(), null);
}

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -1e6], End: [0, 1e6], PageUp: [-5, 0], PageDown: [5, 0] };

function onKey(event, { searchBox, toggleTheme, controls }) {
  const target = event.target, isTyping = target.matches?.("input, select, textarea") || byId("help").open;
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || isTyping) return;
  const isFree = target === document.body || target.closest?.(".map"), actions = {
    "/": searchBox.focus, "?": openHelp, d: toggleTheme, v: controls?.nextView, t: controls?.toggleTable, Escape: () => { searchBox.clear(); closeHead(); },
    "[": () => hasMap && stepHead(-1), "]": () => hasMap && stepHead(1) };
  if (MOVES[event.key] && isFree && hasMap && !controls.isTable()) move(...MOVES[event.key]);
  else if ((event.key === "Enter" || event.key === " ") && target.closest?.(".map")) openHead(state.active);
  else if (actions[event.key]) actions[event.key]();
  else return;
  event.preventDefault();
}

function openHelp() {
  byId("help").showModal();
}

function buildHelp() {
  const dialog = byId("help");
  dialog.append(el("h2", { id: "help-title" }, "Keys"),
    el("dl", { class: "keys" }, KEYS.map(([key, does]) => el("div", {}, el("dt", {}, key.split(" ").map((k) => el("kbd", {}, k))), el("dd", {}, does)))),
    el("p", { class: "quiet" }, "A head has its own address: add #L3H1 to this page's. Everything on this page is inside this file; it fetches nothing."),
    el("button", { type: "button", class: "primary", on: { click: () => dialog.close() } }, "Close"));
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  byId("help-open").addEventListener("click", openHelp);
}

/** The choices above the map: what to show, which run, map or table. */
function buildControls(box) {
  const select = el("select", { id: "view", on: { change: () => { state.view = select.value; headTable.sort = null; refresh(); } } });
  const fill = () => {
    select.replaceChildren(...offeredViews().map((view) => el("option", { value: view.key }, view.title)));
    if (!offeredViews().some(({ key }) => key === state.view)) state.view = offeredViews()[0].key;
    select.value = state.view;
  };
  const choice = (pressed, label, click) => el("button", { type: "button", "aria-pressed": String(pressed), on: { click } }, label);
  const runChoices = runs.length < 2 ? [] : [[0, runs[0].name], [1, runs[1].name], ["difference", "Difference"]];
  const runButtons = runChoices.map(([run, label]) => choice(run === state.run, label, () => {
    state.run = run;
    runButtons.forEach((button, i) => button.setAttribute("aria-pressed", String(runChoices[i][0] === run)));
    fill();
    refresh();
    drawMore();
  }));
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
  const node = el("div", { class: "controls" },
    el("label", {}, el("span", { class: "quiet" }, "Show"), select),
    runButtons.length ? el("div", { class: "segments", role: "group", "aria-label": "Run" }, runButtons) : null,
    el("div", { class: "segments", role: "group", "aria-label": "Map or table" }, shows));
  const nextView = () => {
    select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
    select.dispatchEvent(new Event("change"));
  };
  return { node, nextView, toggleTable: () => setTable(!isTable), isTable: () => isTable };
}

function start() {
  const toggleTheme = setUpTheme();
  buildFigures();
  buildHelp();
  let controls = null;
  if (hasMap) {
    const box = byId("map-side");
    controls = buildControls(box);
    box.append(controls.node, buildMap(openHead, (head) => paintReadout(shownView(), head)), buildLegend());
    draw();
  } else byId("explorer").hidden = true;
  drawMore();
  const searchBox = setUpSearch({ onOpen: openHead, onFound: (found) => { state.found = found; if (hasMap) paintMap(shownView()); } });
  document.addEventListener("keydown", (event) => onKey(event, { searchBox, toggleTheme, controls }));
  window.addEventListener("hashchange", followAddress);
  isNarrow.addEventListener("change", shieldRest);
  show();
  followAddress();
}

const show = () => document.documentElement.classList.remove("drawing");
try {
  start();
} finally {
  show();
}
