"use strict";
(() => {
  const specs = document.getElementById("specs");
  if (specs && window.vegaEmbed) {
    const charts = JSON.parse(specs.textContent);
    // The drawing stays until the live chart stands, and where it cannot be made.
    const enliven = async (plot) => {
      const live = document.createElement("div");
      live.className = "live";
      plot.append(live);
      try {
        await window.vegaEmbed(live, charts[plot.dataset.chart], { renderer: "svg", actions: false, ast: true });
        plot.querySelector(":scope > svg").remove();
      } catch (error) {
        live.remove();
        console.error(error);
      }
    };
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) {
          seen.unobserve(entry.target);
          enliven(entry.target);
        }
      }
    }, { rootMargin: "600px" });
    for (const plot of document.querySelectorAll(".plot")) seen.observe(plot);
  }

  const AT_ONCE = 10;
  for (const samples of document.querySelectorAll(".samples")) {
    const rows = [...samples.querySelectorAll("tbody tr")];
    const buttons = [...samples.querySelectorAll("[data-outcome][aria-pressed]")];
    const words = samples.querySelector("input");
    const more = samples.querySelector(".more");
    let outcome = "";
    let most = AT_ONCE;
    const show = () => {
      const wanted = words.value.trim().toLowerCase();
      const found = rows.filter((row) => (!outcome || row.dataset.outcome === outcome) && row.textContent.toLowerCase().includes(wanted));
      const shown = new Set(found.slice(0, most));
      for (const row of rows) row.hidden = !shown.has(row);
      more.hidden = found.length <= most;
      samples.querySelector("[role=status]").textContent = `${shown.size} of ${found.length} shown`;
    };
    for (const button of buttons) {
      button.addEventListener("click", () => {
        outcome = button.dataset.outcome;
        most = AT_ONCE;
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
        show();
      });
    }
    words.addEventListener("input", () => { most = AT_ONCE; show(); });
    more.addEventListener("click", () => { most += AT_ONCE; show(); });
    samples.querySelector(".filters").hidden = false;
    show();
  }
})();
