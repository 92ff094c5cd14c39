// Draws every figure in the colours of the reader's theme, and draws again when the theme changes. Buttons in the legends
// hide and show lines.
"use strict";
(() => {
  const { figures, dark } = JSON.parse(document.getElementById("figures").textContent);
  const theme = matchMedia("(prefers-color-scheme: dark)");

  // Figures come in the light theme's colours; `dark` maps each colour to its counterpart.
  const themed = (value) => {
    if (typeof value === "string") return (theme.matches && dark[value]) || value;
    if (Array.isArray(value)) return value.map(themed);
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, themed(inner)]));
    return value;
  };

  const draw = ([name, figure]) =>
    Plotly.react(name, themed(figure.data), themed(figure.layout), { responsive: true, displayModeBar: false });
  const drawAll = () => Object.entries(figures).forEach(draw);
  drawAll();
  theme.addEventListener("change", drawAll);

  for (const button of document.querySelectorAll(".legend button"))
    button.addEventListener("click", () => {
      const { plot, trace } = button.dataset;
      const shown = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", shown);
      for (const one of figures[plot].data) if (one.name === trace) one.visible = shown;
      draw([plot, figures[plot]]);
    });
})();
