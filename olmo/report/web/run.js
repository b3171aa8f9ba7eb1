"use strict";
// The page of a run: curves that zoom together, and the way from the checkpoint to a source.
const PAGE_ROWS = 50;
let page, series, range = null;

function wholeRange() {
  const all = Object.values(series).filter((one) => one.steps.length);
  return [Math.min(...all.map((one) => one.steps[0])), Math.max(...all.map((one) => one.steps.at(-1)))];
}

async function drawCharts() {
  const [from, to] = range ?? wholeRange();
  const weight = Number(find("#smoothing").value);
  for (const chart of page.charts) {
    const place = findAll("[data-chart]").find((one) => one.dataset.chart === chart.title);
    if (!place) continue;
    chart.isLog = find("#log").checked;
    const points = chart.curves.flatMap(({ metric, label, kind }) =>
      curvePoints(series[metric], label, kind, from, to, weight));
    const shown = chart.isLog ? points.filter((point) => point.value > 0) : points;
    await drawChart(chart, place, shown, zoom);
  }
  find("#range").textContent = `steps ${Math.ceil(from).toLocaleString("en")} to ${Math.floor(to).toLocaleString("en")}`;
}

function zoom(from, to) {
  const [first, last] = wholeRange();
  const low = Math.max(first, Math.min(from, to)), high = Math.min(last, Math.max(from, to));
  range = low <= first && high >= last || high - low < 1 ? null : [low, high];
  return drawCharts();
}

function zoomBy(how) {
  const [from, to] = range ?? wholeRange(), [first, last] = wholeRange(), width = to - from;
  const moves = {
    in: [from + width / 4, to - width / 4],
    out: [from - width / 2, to + width / 2],
    left: [from - Math.min(width / 2, from - first), to - Math.min(width / 2, from - first)],
    right: [from + Math.min(width / 2, last - to), to + Math.min(width / 2, last - to)],
    all: [-Infinity, Infinity],
  };
  return zoom(...moves[how]);
}

// The rows of a stage, PAGE_ROWS at a time, with a search.
function showRows(number, chosen = null, search = "", start = 0) {
  const { rows } = page.stages[number], place = find(`#stage-${number} .rows`);
  const found = rows.map((row, i) => [row, i]).filter(([row]) =>
    !search || `${row.name} ${row.url ?? ""} ${row.sha256 ?? ""} ${row.content}`.includes(search));
  if (chosen !== null) start = Math.floor(chosen / PAGE_ROWS) * PAGE_ROWS;
  const input = element("input", { type: "search", value: search, "aria-label": "Search the rows" });
  input.addEventListener("change", () => showRows(number, null, input.value));
  const turn = (text, to) => {
    const button = element("button", { type: "button", onclick: () => showRows(number, null, search, to) }, text);
    button.disabled = to < 0 || to >= found.length;
    return button;
  };
  const last = Math.min(start + PAGE_ROWS, found.length);
  const isSource = rows.some((row) => row.url || row.licence || row.sha256);
  const heads = ["name", "counts", "bytes", "time", ...(isSource ? ["url", "sha256", "licence"] : ["content"]), "made from"];
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)));
  const body = found.slice(start, last).map(([row, i]) => {
    const counts = Object.entries(row.counts).map(([what, n]) => `${n.toLocaleString("en")} ${what}`).join(", ");
    const origin = isSource ? [row.url ?? "", row.sha256 ?? "", row.licence ?? ""] : [row.content];
    const cells = [row.name, counts, row.bytes.toLocaleString("en"),
      row.seconds == null ? "" : `${row.seconds} s`, ...origin].map((text) => element("td", {}, text));
    const parents = element("td");
    for (const [stage, parent] of row.parents.slice(0, 8)) {
      const name = `${page.stages[stage].name}: ${page.stages[stage].rows[parent].name}`;
      parents.append(element("a", { href: `#stage-${stage}`, onclick: (event) => {
        event.preventDefault();
        openStage(stage, parent);
      } }, name), element("br"));
    }
    if (row.parents.length > 8) parents.append(`and ${(row.parents.length - 8).toLocaleString("en")} more`);
    return element("tr", { "data-row": i, ...(i === chosen ? { class: "chosen" } : {}) }, ...cells, parents);
  });
  const table = element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Files of ${page.stages[number].name}` },
    element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)));
  const bar = rows.length > PAGE_ROWS
    ? [element("div", { class: "controls" }, input, turn("Before", start - PAGE_ROWS), turn("Next", last),
      `${(start + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${found.length.toLocaleString("en")}`)]
    : [];
  place.replaceChildren(...bar, table);
}

function openStage(number, row = null) {
  const details = find(`#stage-${number}`);
  details.open = true;
  showRows(number, row);
  const target = row === null ? details : find(`tr[data-row="${row}"]`, details) ?? details;
  target.scrollIntoView({ block: "center" });
  find("summary", details).focus({ preventScroll: true });
}

function load(data) {
  const before = page;
  page = { stages: before?.stages, ...data };
  series = Object.fromEntries(Object.entries(data.series).map(([name, packed]) => [name, decodeSeries(packed)]));
  for (const chart of page.charts) {
    const known = before?.charts.find((one) => one.title === chart.title);
    const names = (one) => one.curves.map((curve) => curve.label).join();
    if (known && names(known) === names(chart)) {
      Object.assign(chart, { view: known.view, theme: known.theme, log: known.log });
    } else known?.view?.finalize();
  }
  showState();
  find("#tiles").replaceChildren(...data.tiles.map(([label, value, text, note]) => element("div", {},
    element("dt", {}, label),
    element("dd", {}, value === null ? text : element("data", { value }, text), ...(note ? [element("small", {}, note)] : [])))));
}

function showState() {
  const data = page;
  find("#state").textContent = data.state.state + (data.state.state === "done" || !data.state.step ? "" : `, step ${data.state.step.toLocaleString("en")}`);
}

async function follow() { // a live page: new metrics as they come
  let seen = null;
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 2000));
    try {
      const answer = await fetch("data", { headers: seen ? { "If-None-Match": seen } : {} });
      if (answer.status === 304) showState(); // the server may have been away
      if (answer.status !== 200) continue;
      seen = answer.headers.get("ETag");
      const charts = page.charts.length;
      load(await unpack(await answer.text()));
      if (page.charts.length !== charts) location.reload();
      await drawCharts();
    } catch { find("#state").textContent = "the server has stopped"; }
  }
}

(async () => {
  initTheme(() => page && drawCharts());
  load(await unpack(find("#data").textContent));
  findAll("details.stage").forEach((one) => one.addEventListener("toggle", () => {
    if (one.open && !find("table", one)) showRows(Number(one.dataset.stage));
  }));
  findAll("a[data-stage]").forEach((one) => one.addEventListener("click", (event) => {
    event.preventDefault();
    openStage(Number(one.dataset.stage));
  }));
  if (page.charts.length) {
    findAll("[data-zoom]").forEach((one) => one.addEventListener("click", () => zoomBy(one.dataset.zoom)));
    find("#smoothing").addEventListener("input", drawCharts);
    find("#log").addEventListener("change", drawCharts);
    await drawCharts();
  }
  document.documentElement.dataset.ready = "yes";
  if (document.documentElement.dataset.live) follow();
})();
