// Runs before the first paint: the page never flashes in the wrong theme, and content appears at once.
(() => {
  let stored = null;
  try {
    stored = localStorage.getItem("lcc-lens-theme");
  } catch {
    /* no storage here: follow the system */
  }
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = stored === "dark" || stored === "light" ? stored : dark ? "dark" : "light";
  document.documentElement.classList.add("drawing");
})();
