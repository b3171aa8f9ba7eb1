"use strict";
// The page of all runs: sorting, curves over one another, and the fields in which two differ.
let page;

function sortBy(column, button) {
  const body = find("#runs tbody"), head = button.closest("th");
  const isDown = head.getAttribute("aria-sort") === "ascending";
  findAll("#runs th").forEach((one) => one.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
  const value = (row) => row.children[column].dataset.value;
  const rows = findAll("tr", body).sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return isDown ? -order : order;
  });
  body.replaceChildren(...rows);
}

async function drawCharts() {
  const shown = findAll("#shown input:checked").map((one) => one.value);
  for (const chart of page.charts) {
    const points = shown.flatMap((name) => {
      const series = page.curves[name]?.[chart.title];
      return series ? curvePoints(series, name, chart.kind, -Infinity, Infinity, 0.9) : [];
    });
    const place = findAll("[data-chart]").find((one) => one.dataset.chart === chart.title);
    await drawChart(chart, place, points, () => {});
  }
}

function compare() {
  const before = page.runs[find("#before").value], after = page.runs[find("#after").value];
  const parts = Object.keys(before).map((part) => {
    const keys = [...new Set([...Object.keys(before[part]), ...Object.keys(after[part])])].sort();
    const changed = keys.filter((key) => before[part][key] !== after[part][key]);
    if (!changed.length) return element("p", { "data-part": part }, `${part}: the same`);
    const head = element("tr", {}, ...[part, find("#before").value, find("#after").value].map((text) => element("th", { scope: "col" }, text)));
    const rows = changed.map((key) => element("tr", { "data-key": key }, element("th", { scope: "row" }, key),
      element("td", {}, before[part][key] ?? "none"), element("td", { class: "added" }, after[part][key] ?? "none")));
    return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Differences in ${part}` },
      element("table", { "data-part": part }, element("thead", {}, head), element("tbody", {}, ...rows)));
  });
  find("#changes").replaceChildren(...parts);
}

(async () => {
  initTheme(() => page && drawCharts());
  page = await unpack(find("#data").textContent);
  for (const [name, found] of Object.entries(page.curves)) {
    page.curves[name] = Object.fromEntries(Object.entries(found).map(([metric, one]) => [metric, decodeSeries(one)]));
  }
  findAll("#runs thead button").forEach((one, column) => one.addEventListener("click", () => sortBy(column, one)));
  findAll("#shown input").forEach((one) => one.addEventListener("change", drawCharts));
  if (find("#changes")) {
    findAll("#before, #after").forEach((one) => one.addEventListener("change", compare));
    compare();
  }
  await drawCharts();
  document.documentElement.dataset.ready = "yes";
})();
