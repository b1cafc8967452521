// Light and dark: the system's choice until the reader makes one.

function setUpTheme() {
  const root = document.documentElement,
    button = byId("theme"),
    system = matchMedia("(prefers-color-scheme: dark)");
  const show = (theme) => {
    root.dataset.theme = theme;
    button.textContent = theme === "dark" ? "☀\ufe0e" : "☾\ufe0e";
    repaintPatterns();
    button.setAttribute("aria-label", theme === "dark" ? "Use the light theme" : "Use the dark theme");
  };
  const stored = () => {
    try {
      return localStorage.getItem("lcc-lens-theme");
    } catch {
      return null;
    }
  };
  const toggle = () => {
    const theme = root.dataset.theme === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("lcc-lens-theme", theme);
    } catch {
      /* kept for this visit only */
    }
    show(theme);
  };
  button.addEventListener("click", toggle);
  system.addEventListener("change", () => {
    if (!stored()) show(system.matches ? "dark" : "light");
  });
  show(root.dataset.theme);
  return toggle;
}
