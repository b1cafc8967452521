// Keyboard shortcuts and the help dialog.

const KEYS = [
  ["← ↑ → ↓", "move over the map"],
  ["Enter", "open the head"],
  ["Esc", "close it"],
  ["/", "search"],
  ["[ ]", "previous and next head"],
  ["v", "next view"],
  ["t", "map or table"],
  ["d", "dark or light"],
  ["?", "this help"],
];

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
    isTyping = target.matches?.("input, select, textarea") || byId("help").open;
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || isTyping) return;
  const isOnMap = target.closest?.(".map"), // page keys scroll the page elsewhere
    isFree = isOnMap || (target === document.body && event.key.startsWith("Arrow")),
    actions = {
      "/": searchBox.focus,
      "?": openHelp,
      d: toggleTheme,
      v: controls?.nextView,
      t: controls?.toggleTable,
      Escape: () => {
        searchBox.clear();
        closeHead();
      },
      "[": () => hasMap && stepHead(-1),
      "]": () => hasMap && stepHead(1),
    };
  if (MOVES[event.key] && isFree && hasMap && !controls.isTable()) move(...MOVES[event.key]);
  else if ((event.key === "Enter" || event.key === " ") && isOnMap) openHead(state.active);
  else if (actions[event.key]) actions[event.key]();
  else return;
  event.preventDefault();
}

function openHelp() {
  byId("help").showModal();
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
      "Every head has a link: add #L3H1 to the address of this page. The page is one file and fetches nothing.",
    ),
    el("button", { type: "button", class: "primary", on: { click: () => dialog.close() } }, "Close"),
  );
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  byId("help-open").addEventListener("click", openHelp);
}
