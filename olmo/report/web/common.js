"use strict";
// Shared by all pages: their data, the theme, and curves of which no peak is lost.
const find = (selector, root = document) => root.querySelector(selector);
const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const toBytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

async function unpack(text) {
  const stream = new Blob([toBytes(text.trim())]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function decodeSeries(packed) {
  const Kind = packed.type === "f4" ? Float32Array : Float64Array;
  const values = new Kind(toBytes(packed.values).buffer);
  const steps = typeof packed.steps === "number"
    ? Int32Array.from(values, (_, i) => packed.steps + i)
    : new Int32Array(toBytes(packed.steps).buffer);
  return { steps, values };
}

function smoothed(values, weight) { // as olmo.report.series.smooth
  let total = 0, norm = 0;
  return Float64Array.from(values, (value) => {
    if (Number.isFinite(value)) {
      total = weight * total + (1 - weight) * value;
      norm = weight * norm + (1 - weight);
    }
    return norm ? total / norm : value;
  });
}

function firstAtLeast(steps, step) {
  let low = 0, high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  return low;
}

// Rows from `first` to `end`; where they are many, the lowest and the highest of each bucket.
function thinned(values, first, end, buckets) {
  const n = end - first;
  if (n <= 2 * buckets) return Array.from({ length: Math.max(n, 0) }, (_, i) => first + i);
  const kept = new Set([first, end - 1]);
  for (let b = 0; b < buckets; b++) {
    const from = first + Math.floor((b * n) / buckets), to = first + Math.floor(((b + 1) * n) / buckets);
    let low = from, high = from;
    for (let i = from; i < to; i++) {
      if (values[i] < values[low] || Number.isNaN(values[low])) low = i;
      if (values[i] > values[high] || Number.isNaN(values[high])) high = i;
    }
    kept.add(low).add(high);
  }
  return [...kept].sort((a, b) => a - b);
}

// The points of a curve in [from, to] for a chart.
function curvePoints(series, label, kind, from, to, weight, buckets = 700) {
  const first = firstAtLeast(series.steps, from), end = firstAtLeast(series.steps, to + 1);
  const rows = thinned(series.values, first, end, buckets);
  const point = (i, mark, values) => ({
    step: series.steps[i], value: values[i], series: label, kind: mark,
    exact: String(series.values[i]),
  });
  if (kind !== "noisy") return rows.map((i) => point(i, kind, series.values));
  if (series.weight !== weight) Object.assign(series, { weight, mean: smoothed(series.values, weight) });
  const points = rows.map((i) => point(i, "raw", series.values));
  return weight ? points.concat(rows.map((i) => point(i, "smooth", series.mean))) : points;
}

const palettes = {
  light: { text: "#1b1f24", grid: "#d0d7de", colors: ["#0b57d0", "#b3261e", "#146c2e", "#7b4fc9", "#8a5a00", "#00677f"] },
  dark: { text: "#e6e8eb", grid: "#333b44", colors: ["#8ab4f8", "#f2a19b", "#7fd99a", "#c9b0ff", "#f0c36d", "#7fd3e6"] },
};

function theme() {
  return document.documentElement.dataset.theme;
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  try { localStorage.setItem("theme", name); } catch { /* not allowed for files in some browsers */ }
}

function initTheme(redraw) {
  let saved = null;
  try { saved = localStorage.getItem("theme"); } catch { /* as above */ }
  setTheme(saved ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  find("#theme").addEventListener("click", () => {
    setTheme(theme() === "dark" ? "light" : "dark");
    redraw();
  });
  addEventListener("beforeprint", () => { setTheme("light"); redraw(); });
}

function chartConfig() {
  const { text, grid, colors } = palettes[theme()];
  const labels = { labelColor: text, titleColor: text };
  return {
    aria: false, // the figure has a description of its own
    background: "transparent",
    axis: { ...labels, gridColor: grid, domainColor: grid, tickColor: grid, labelFontSize: 12, titleFontSize: 12 },
    legend: { ...labels, labelFontSize: 13, symbolType: "stroke", symbolOpacity: 1, symbolStrokeWidth: 3 },
    view: { stroke: null },
    range: { category: colors },
  };
}

// Draw a chart, or new points into a chart that is there.
async function drawChart(chart, place, points, onBrush) {
  if (chart.view && chart.theme === theme() && chart.log === chart.isLog) {
    chart.view.data("brush_store", []);
    chart.view.signal("brush_x", []);
    chart.view.data("points", points);
    await chart.view.runAsync();
    return;
  }
  chart.view?.finalize();
  const spec = structuredClone(chart.spec);
  spec.datasets = { points };
  for (const layer of spec.layer) {
    if (chart.isLog && layer.encoding?.y?.scale) layer.encoding.y.scale = { type: "log" };
  }
  const options = { actions: false, renderer: "svg", logLevel: 1, /* errors only */ config: chartConfig(), tooltip: { theme: "custom", disableDefaultStyle: false } };
  const inner = element("div", { "aria-hidden": "true" }); // the place has a description
  place.replaceChildren(inner);
  const { view } = await vegaEmbed(inner, spec, options);
  Object.assign(chart, { view, theme: theme(), log: chart.isLog });
  let waiting = 0;
  view.addSignalListener("brush", (_, value) => {
    clearTimeout(waiting);
    if (value.step) waiting = setTimeout(() => onBrush(...value.step), 350);
  });
}
