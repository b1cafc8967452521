// Search: heads whose components promote or suppress a token, largest effect first; or a head by its name.

const MOST_RESULTS = 40;
const search = { results: [], at: -1, index: new Map() };

/** The token texts of a run in lower case. */
function textsOf(run) {
  if (!search.index.has(run))
    search.index.set(run, run.tokens ? run.tokens.texts.map((text) => text.trim().toLowerCase()) : []);
  return search.index.get(run);
}

/** Match of a text: 3 equal, 2 prefix, 1 substring, 0 none. */
const fit = (text, wanted) => (text === wanted ? 3 : text.startsWith(wanted) ? 2 : text.includes(wanted) ? 1 : 0);

/** Heads whose components promote or suppress the best-matching token, each once with its largest effect. */
function findHeads(wanted) {
  const run = shownRun(),
    named = headOf(wanted);
  if (named) return [{ head: named, text: null }];
  if (!run.tokens || !wanted.trim()) return [];
  const goal = wanted.trim().toLowerCase(),
    fits = textsOf(run).map((text) => fit(text, goal)),
    closest = Math.max(...fits, 1);
  const {
      shape: [layers, heads, vectors, sides, k],
      values,
    } = unpack(run.tokens.index),
    logits = unpack(run.tokens.logits).values,
    best = new Map();
  values.forEach((text, place) => {
    if (text < 0 || fits[text] < closest) return;
    const rank = place % k,
      side = Math.floor(place / k) % sides,
      vector = Math.floor(place / (k * sides)) % vectors;
    const headPlace = Math.floor(place / (k * sides * vectors));
    const effect = weightOf(run, headPlace, vector) * Math.abs(logits[place]);
    if ((best.get(headPlace)?.effect ?? -Infinity) < effect) best.set(headPlace, { effect, text, side, vector });
  });
  const changed = viewOf(run, "changed");
  return [...best.entries()]
    .sort((a, b) => b[1].effect - a[1].effect || a[0] - b[0])
    .map(([place, { text, side, vector }]) => ({
      head: { layer: Math.floor(place / heads), head: place % heads },
      text: run.tokens.texts[text],
      note:
        `${side ? "suppressed" : "promoted"} by ${vectorTitle(run.tokens.vectors[vector]).toLowerCase()}, ` +
        `changed ${number(unpack(changed.value).values[place], "%")}`,
    }));
}

/** Size of a head's vector beside the dense head's output: its relative change times the vector's part of that. */
function weightOf(run, place, vector) {
  const of = (key) => {
      const view = viewOf(run, key),
        value = view ? unpack(view.value).values[place] / 100 : 0;
      return Number.isFinite(value) ? value : 0;
    },
    name = run.tokens.vectors[vector],
    { shape, values } = unpack(run.heads.share);
  if (name === "mean") return of("changed") * Math.sqrt(of("constant"));
  if (name === "learned") return of("changed") * Math.sqrt(of("constant")) * of("learned");
  return of("changed") * Math.sqrt(values[place * shape[2] + Number(name) - 1]);
}

function setUpSearch({ onFound, onOpen }) {
  const input = byId("search"),
    list = byId("results");
  const choose = (i) => {
    const result = search.results[i];
    if (result) {
      close();
      onOpen(result.head);
    }
  };
  const show = (isOpen) => {
    list.hidden = !isOpen;
    input.setAttribute("aria-expanded", String(isOpen));
  };
  const close = () => {
    show(false);
    mark(-1);
    input.blur();
  };
  const mark = (i) => {
    search.at = i;
    [...list.children].forEach((item, n) => item.setAttribute("aria-selected", String(n === i)));
    if (i >= 0) {
      input.setAttribute("aria-activedescendant", `result-${i}`);
      list.children[i].scrollIntoView({ block: "nearest" });
    } else input.removeAttribute("aria-activedescendant");
  };
  const update = () => {
    const wanted = input.value,
      found = findHeads(wanted);
    search.results = found.slice(0, MOST_RESULTS);
    const empty = shownRun().tokens
      ? "No head promotes or suppresses this among its top tokens."
      : "This run has no token tables; search by name, such as L3H1.";
    list.replaceChildren(
      ...(found.length
        ? search.results.map(({ head, text, note }, i) =>
            el(
              "li",
              {
                role: "option",
                id: `result-${i}`,
                "aria-selected": "false",
                on: {
                  pointerdown: (event) => {
                    event.preventDefault();
                    choose(i);
                  },
                },
              },
              el("b", {}, nameOf(head)),
              text === null ? "" : el("span", { class: "chip" }, visible(text)),
              el("span", { class: "quiet" }, note ?? "open"),
            ),
          )
        : [el("li", { class: "quiet", role: "option", "aria-disabled": "true" }, empty)]),
    );
    show(wanted.trim() !== "");
    search.at = -1;
    onFound(wanted.trim() === "" ? null : new Set(found.map(({ head }) => nameOf(head))));
    announce(wanted.trim() === "" ? "" : `${found.length} heads found`);
  };
  input.addEventListener("input", update);
  input.addEventListener("focus", () => {
    if (input.value.trim()) update();
    input.select();
  });
  input.addEventListener("blur", () => show(false));
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const n = search.results.length;
      if (n)
        mark(
          (search.at + (event.key === "ArrowDown" ? 1 : -1) + n + (search.at < 0 && event.key === "ArrowUp" ? 1 : 0)) %
            n,
        );
      event.preventDefault();
    } else if (event.key === "Enter") choose(Math.max(search.at, 0));
    else if (event.key === "Escape") {
      input.value = "";
      update();
      close();
    }
    event.stopPropagation();
  });
  return {
    focus: () => input.focus(),
    clear: () => {
      input.value = "";
      onFound(null);
    },
  };
}
