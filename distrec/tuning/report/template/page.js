// Draws every figure, in the colours of the reader's theme, and again when that changes.
"use strict";
(() => {
  const { figures, dark } = JSON.parse(document.getElementById("figures").textContent);
  const theme = matchMedia("(prefers-color-scheme: dark)");

  // Figures are written in the light theme's colours; each has its counterpart in `dark`.
  const themed = (value) => {
    if (typeof value === "string") return (theme.matches && dark[value]) || value;
    if (Array.isArray(value)) return value.map(themed);
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, themed(inner)]));
    return value;
  };

  const draw = () => {
    for (const [name, figure] of Object.entries(figures))
      Plotly.react(name, themed(figure.data), themed(figure.layout), { responsive: true, displayModeBar: false });
  };
  draw();
  theme.addEventListener("change", draw);
})();
