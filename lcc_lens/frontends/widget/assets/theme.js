// Follow the light or dark theme of the surrounding page.

/** Keep the widget's `data-theme` equal to the page's; returns a function that stops this. */
function followTheme(root) {
  const set = () => (root.dataset.theme = isDark(root) ? "dark" : "light");
  const watch = new MutationObserver(set);
  for (const node of [document.documentElement, document.body]) watch.observe(node, { attributes: true });
  set();
  requestAnimationFrame(set); // the first draw may come before the page has a background
  return () => watch.disconnect();
}

/** JupyterLab and VS Code declare their theme; elsewhere the background colour decides. */
function isDark(root) {
  const { jpThemeLight, vscodeThemeKind } = document.body.dataset;
  if (jpThemeLight) return jpThemeLight === "false";
  if (vscodeThemeKind) return /dark|high-contrast$/.test(vscodeThemeKind);
  for (let node = root.parentElement; node; node = node.parentElement) {
    const [red, green, blue, alpha = 1] = (getComputedStyle(node).backgroundColor.match(/[\d.]+/g) ?? []).map(Number);
    if (red !== undefined && alpha > 0.5) return 0.3 * red + 0.59 * green + 0.11 * blue < 128;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}
