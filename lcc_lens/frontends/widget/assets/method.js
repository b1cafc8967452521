// The method, with what it does and costs.

/** The select of the method; `ask` sends a message. */
function methodChoice(fixed, ask) {
  const pick = el("select", { class: "method", "aria-label": "Method", onchange: () => ask({ do: "method", method: pick.value }) },
    fixed.methods.map(({ name }) => el("option", {}, name)));
  const costs = el("p", { class: "quiet costs" });
  const follow = (state, { isBusy }) => {
    pick.value = state.method;
    pick.disabled = isBusy;
    const { does } = fixed.methods.find(({ name }) => name === state.method) ?? { does: "" };
    const parts = [`${does.charAt(0).toUpperCase()}${does.slice(1)}.`];
    if (state.n_trained) parts.push(`${state.n_trained.toLocaleString("en")} parameters.`);
    if (state.seconds_per_step) parts.push(`${formatted(state.seconds_per_step, "s")} a step.`);
    costs.textContent = parts.join(" ");
  };
  return { root: part("Method", "choosing", pick, costs), follow };
}
