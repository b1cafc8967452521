// Keyboard shortcuts and the help dialog.

const KEYS = [
  ["← ↑ → ↓", "move over the map"],
  ["Enter", "open the head"],
  ["Esc", "close it"],
  ["/", "search"],
  ["[ ]", "previous and next head or layer"],
  ["l", "open its layer"],
  ["v", "next view"],
  ["t", "map or table"],
  ["d", "dark or light"],
  ["?", "this help"],
];

const WORDS = [
  ["z", "A head's output before the output projection W_O (hook_z)."],
  ["relative change", "|z dense − z pruned| / |z dense|, root mean square over positions."],
  ["component", "A right singular vector of the difference, scaled by its mean coefficient."],
  ["constant", "What a restoration adds to z at every position; it folds into a bias."],
  ["recovered", "(pruned − restored) / (pruned − dense), of the loss in nats per token."],
  ["validation responses", "Chose which parameters training kept; the evaluation uses others."],
];

const DOC_PAGES = [
  ["guide.html", "guide"],
  ["method.html", "method"],
  ["api/lens.html", "the lens"],
];

/** Links to the pages of the documentation that explain this one. */
const docLinks = () =>
  DOC_PAGES.map(([page, title], i) => [i ? ", " : "", el("a", { href: `${docs.replace(/\/$/, "")}/${page}` }, title)]).flat();

const MOVES = {
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
  Home: [0, -1e6],
  End: [0, 1e6],
  PageUp: [-5, 0],
  PageDown: [5, 0],
};

function onKey(event, { searchBox, toggleTheme, controls }) {
  const target = event.target,
    isTyping = target.matches?.("input, select, textarea") || document.querySelector("dialog[open]");
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || isTyping) return;
  const isOnMap = target.closest?.(".map"), // page keys scroll the page elsewhere
    isFree = isOnMap || (target === document.body && event.key.startsWith("Arrow")),
    actions = {
      "/": searchBox.focus,
      "?": openHelp,
      d: toggleTheme,
      l: () => hasMap && openLayer(state.active.layer),
      v: controls?.nextView,
      t: controls?.toggleTable,
      Escape: () => {
        searchBox.clear();
        closePanel();
      },
      "[": () => hasMap && stepOpen(-1),
      "]": () => hasMap && stepOpen(1),
    };
  if (MOVES[event.key] && isFree && hasMap && !controls.isTable()) move(...MOVES[event.key]);
  else if ((event.key === "Enter" || event.key === " ") && isOnMap) openHead(state.active);
  else if (actions[event.key]) actions[event.key]();
  else return;
  event.preventDefault();
}

function openHelp() {
  byId("help").showModal();
  byId("help").scrollTop = 0;
}

function buildHelp() {
  const dialog = byId("help");
  dialog.append(
    el("h2", { id: "help-title" }, "Keys"),
    el(
      "dl",
      { class: "keys" },
      KEYS.map(([key, does]) =>
        el(
          "div",
          {},
          el(
            "dt",
            {},
            key.split(" ").map((k) => el("kbd", {}, k)),
          ),
          el("dd", {}, does),
        ),
      ),
    ),
    el(
      "p",
      { class: "quiet" },
      "Every head and layer has a link: add #L3H1 or #L3 to the address of this page. The page is one file and fetches nothing.",
    ),
    el("h2", { class: "words" }, "Words"),
    el(
      "dl",
      { class: "words" },
      WORDS.flatMap(([word, means]) => [el("dt", {}, word), el("dd", {}, means)]),
    ),
    docs ? el("p", { class: "words" }, "Documentation: ", docLinks()) : "",
    el("button", { type: "button", class: "primary", on: { click: () => dialog.close() } }, "Close"),
  );
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  byId("help-open").addEventListener("click", openHelp);
}
