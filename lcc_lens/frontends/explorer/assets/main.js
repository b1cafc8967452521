// What happens when: opening and closing heads, the address, the start.

/** Draw whatever depends on the choices; keeps the open head open. */
function draw() {
  const view = shownView();
  paintMap(view);
  paintLegend(view);
  if (state.open) drawHead(state.open, { onClose: closePanel, onStep: stepHead });
  else if (state.layer !== null) drawLayer(state.layer, { onClose: closePanel, onStep: stepLayer });
  else drawRanking(view);
}

function showHead(head) {
  state.active = head;
  state.open = head;
  state.layer = null;
  paintReadout(shownView(), null);
  showPanel(nameOf(head));
}

function showLayer(layer) {
  state.active = { layer, head: state.active.head };
  state.open = null;
  state.layer = layer;
  showPanel(`Layer ${layer}`);
}

/** Draw the panel of what is open, and keep the focus in it. */
function showPanel(title) {
  const panel = byId("panel"),
    focused = panel.contains(document.activeElement) ? document.activeElement.id || "panel-title" : null;
  markMap();
  draw();
  document.body.classList.add("has-head");
  shieldRest();
  panel.scrollTop = 0;
  if (focused || isNarrow.matches) byId(focused ?? "panel-title")?.focus({ preventScroll: true });
  document.title = `${title} · ${runs[0].source.pruned_name}`;
  announce(`${title} opened`);
}

const isPanelOpen = () => state.open !== null || state.layer !== null;

/** On a narrow screen the open head covers the rest, which then takes no focus. */
function shieldRest() {
  for (const part of document.querySelectorAll(".top, .verdict, #map-side, #more"))
    part.inert = isNarrow.matches && isPanelOpen();
}

/** Open a head by its address, so that back, forward and copied links work. */
function openHead(head, { replace = false } = {}) {
  const address = `#${nameOf(head)}`;
  showHead(head);
  if (location.hash === address) return;
  if (replace) history.replaceState(null, "", address);
  else location.hash = address;
}

function openLayer(layer) {
  location.hash = `#L${layer}`;
}

function closePanel() {
  if (!isPanelOpen()) return;
  history.pushState(null, "", location.href.split("#")[0]);
  hidePanel();
  cellOf(state.active).focus({ preventScroll: true });
}

function hidePanel() {
  state.open = null;
  state.layer = null;
  document.body.classList.remove("has-head");
  shieldRest();
  document.title = `${runs[0].source.pruned_name}: effect of pruning`;
  draw();
}

/** The next or previous head in model order. */
function stepHead(by) {
  const n = shape.layers * shape.heads,
    place = (state.active.layer * shape.heads + state.active.head + by + n) % n;
  openHead({ layer: Math.floor(place / shape.heads), head: place % shape.heads }, { replace: true });
}

function stepLayer(by) {
  const layer = (state.layer + by + shape.layers) % shape.layers;
  history.replaceState(null, "", `#L${layer}`);
  showLayer(layer);
}

const stepOpen = (by) => (state.layer === null ? stepHead(by) : stepLayer(by));

function followAddress() {
  const name = location.hash.slice(1),
    head = headOf(name),
    layer = layerOf(name);
  if (head && !(state.open && nameOf(state.open) === nameOf(head))) showHead(head);
  else if (layer !== null && state.layer !== layer) showLayer(layer);
  else if (isPanelOpen() && location.hash === "") hidePanel();
}

/** Move the head under the keys; an open panel follows. */
function move(rows, columns) {
  const clamp = (value, most) => Math.max(0, Math.min(most - 1, value));
  state.active = {
    layer: clamp(state.active.layer + rows, shape.layers),
    head: clamp(state.active.head + columns, shape.heads),
  };
  markMap();
  cellOf(state.active).focus({ preventScroll: isNarrow.matches });
  if (state.open) openHead(state.active, { replace: true });
  else paintReadout(shownView(), null);
}

function start() {
  const toggleTheme = setUpTheme();
  buildFigures();
  buildHelp();
  buildCode();
  let controls = null;
  if (hasMap) {
    const box = byId("map-side");
    controls = buildControls(box);
    box.append(
      controls.node,
      buildMap(openHead, (head) => paintReadout(shownView(), head)),
      buildLegend(),
    );
    draw();
  } else byId("explorer").hidden = true;
  drawMore();
  const searchBox = setUpSearch({
    onOpen: openHead,
    onFound: (found) => {
      state.found = found;
      if (hasMap) paintMap(shownView());
    },
  });
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
