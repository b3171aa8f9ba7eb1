"use strict";
// Pages of charts without controls: a data set's quality, what moved a step's loss.
let page;

async function drawCharts() {
  for (const place of findAll("[data-chart]")) {
    const chart = page.charts[place.dataset.chart];
    chart.view?.finalize();
    const spec = structuredClone(chart.spec);
    spec.datasets = { ...spec.datasets, points: chart.points };
    const inner = element("div", { "aria-hidden": "true" }); // the place has a description
    place.replaceChildren(inner);
    const options = { actions: false, renderer: "svg", logLevel: 1, config: chartConfig(), tooltip: { theme: "custom", disableDefaultStyle: false } };
    chart.view = (await vegaEmbed(inner, spec, options)).view;
  }
}

(async () => {
  initTheme(() => page && drawCharts());
  page = await unpack(find("#data").textContent);
  await drawCharts();
  document.documentElement.dataset.ready = "yes";
})();
