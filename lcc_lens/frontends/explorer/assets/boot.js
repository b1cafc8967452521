// Runs before anything is drawn, so that the page never flashes in the other theme, and that what the script fills
// appears whole instead of growing.
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
