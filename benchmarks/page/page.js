// Draws the report from the JSON in #data. No library, no network: SVG charts, sortable tables, filters. This file has the
// helpers and "Everything measured"; story.js, which follows it, has the first screens and starts the page.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const ROWS = new Map(DATA.rows.map((row) => [row.id, row]));
const FILTERS = [
  ["suite", "suite"],
  ["series", "method"],
  ["shape", "shape"],
  ["mode", "direction"],
  ["dtype", "dtype"],
  ["status", "status"],
];
const COLOURS = 10;
const DASHES = [["", "solid"], ["5 3", "dashed"], ["2 3", "dotted"]]; // in a chart, and in its legend
const SVG = "http://www.w3.org/2000/svg";

const chosen = {}; // filter key -> value
const hidden = new Set(); // "suite/series" switched off in a legend
const scales = new Map(); // panel -> {x, y}: logarithmic or not
const sorted = new Map(); // suite -> {key, down}
let marked = new Set(); // ids of rows that a claim led to

// --- small helpers ---

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") node.addEventListener("click", value);
    else if (value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

function shape(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function figure(value, form) {
  if (value === null || value === undefined) return "";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return String(value);
  switch (form) {
    case "ms": return value < 1000 ? significant(value, 3) : value.toFixed(0);
    case "times": return value.toFixed(2) + "x";
    case "percent": return (100 * value).toFixed(1) + "%";
    case "share": return value.toFixed(3);
    case "mib": return (value / 1048576).toFixed(1);
    case "error": return value.toExponential(1);
    case "integer": return value.toFixed(0);
    default: return significant(value, 4);
  }
}

// A node that tells about itself under a pointer, a finger or the keyboard.
function hoverable(node, text) {
  node.addEventListener("pointerenter", (event) => tip(text, event));
  node.addEventListener("pointerleave", untip);
  node.addEventListener("focus", () => tip(text, node));
  node.addEventListener("blur", untip);
}

function significant(value, digits) {
  return String(Number(value.toPrecision(digits)));
}

function tick(value) {
  const size = Math.abs(value);
  if (size >= 1024 && value % 1024 === 0) return value / 1024 + "k";
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(0);
  return significant(value, 3);
}

// --- filters ---

function visible(row) {
  const text = (chosen.search || "").toLowerCase();
  return (
    FILTERS.every(([key]) => !chosen[key] || String(row[key] ?? "") === chosen[key]) &&
    (!text || row.words.includes(text))
  );
}

function buildFilters() {
  const form = document.getElementById("filters");
  for (const [key, label] of FILTERS) {
    const values = [...new Set(DATA.rows.map((row) => row[key]).filter((value) => value !== undefined && value !== null && value !== ""))].map(String);
    if (values.length < 2) continue;
    values.sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
    const select = element("select", { id: "filter-" + key }, element("option", { value: "" }, "all"));
    for (const value of values) select.append(element("option", { value }, value));
    select.addEventListener("change", () => choose(key, select.value));
    form.append(element("label", {}, label, select));
  }
  const search = element("input", { id: "filter-search", type: "search", placeholder: "bigbird 4096" });
  search.addEventListener("input", () => choose("search", search.value));
  form.append(element("label", {}, "any word", search));
  form.append(element("button", { id: "reset", type: "button", onclick: reset }, "show all"));
}

function choose(key, value) {
  chosen[key] = value;
  draw();
}

function reset() {
  for (const key of Object.keys(chosen)) delete chosen[key];
  for (const input of document.querySelectorAll("#filters select, #filters input")) input.value = "";
  marked = new Set();
  hidden.clear();
  draw();
}

// --- charts ---

function niceTicks(low, high, logarithmic, values) {
  if (logarithmic) {
    const distinct = [...new Set(values)].sort((a, b) => a - b);
    if (distinct.length && distinct.length <= 7) return apart(distinct);
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const lead of Math.log10(high / low) < 2 ? [1, 2, 5] : [1]) {
        const value = lead * 10 ** power;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    }
    return found;
  }
  const raw = (high - low || 1) / 5;
  const step = [1, 2, 2.5, 5, 10].map((lead) => lead * 10 ** Math.floor(Math.log10(raw))).find((value) => value >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

// Ticks at the values themselves where they do not run into each other.
function apart(values) {
  return values.filter((value, index) => index === 0 || value / values[index - 1] > 1.12);
}

function scale(values, logarithmic, start, end, own) {
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (logarithmic) [low, high] = low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.05, high * (high / low) ** 0.05];
  else [low, high] = low === high ? [low - 1, high + 1] : [low - 0.06 * (high - low), high + 0.06 * (high - low)];
  const map = logarithmic ? Math.log : (value) => value;
  const place = (value) => start + ((map(value) - map(low)) / (map(high) - map(low))) * (end - start);
  return { place, ticks: niceTicks(low, high, logarithmic, own) };
}

function median(values) {
  const order = [...values].sort((a, b) => a - b);
  return order.length % 2 ? order[(order.length - 1) / 2] : (order[order.length / 2 - 1] + order[order.length / 2]) / 2;
}

function referencePoints(rows, panel, key) {
  const at = new Map();
  for (const row of rows) {
    if (Number.isFinite(row[key])) at.set(row[panel.x], [...(at.get(row[panel.x]) || []), row[key]]);
  }
  return [...at].map(([x, values]) => [x, median(values)]).sort((a, b) => a[0] - b[0]);
}

// Of very many lines some are hidden at first; their names in the legend bring them back.
function thinOut(suite) {
  if (suite.series.length <= COLOURS) return;
  const kept = DATA.story && suite.name === "ops" ? mattering().map((method) => STORY.methods[method].series) : suite.series.slice(0, COLOURS);
  for (const label of suite.series) if (!kept.includes(label)) hidden.add(suite.name + "/" + label);
}

function drawPanel(suite, panel, index) {
  const name = suite.name + "/" + index;
  const rows = panel.rows.map((id) => ROWS.get(id)).filter(visible);
  if (!rows.length) return null;
  if (!scales.has(name)) thinOut(suite);
  if (!scales.has(name)) scales.set(name, { x: panel.log_x, y: panel.log_y });
  const logarithmic = scales.get(name);
  const series = [...new Set(rows.map((row) => row.series))].filter(Boolean);
  const shown = rows.filter((row) => !hidden.has(suite.name + "/" + row.series));
  const references = panel.references.map(([key, label]) => [label, referencePoints(shown, panel, key)]);

  const fits = (x, y) => (!logarithmic.x || x > 0) && (!logarithmic.y || y > 0);
  const points = shown.filter((row) => fits(row[panel.x], row[panel.y]));
  const xs = points.map((row) => row[panel.x]);
  const ys = points.map((row) => row[panel.y]).concat(references.flatMap(([, line]) => line.map(([, y]) => y)).filter((y) => y > 0 || !logarithmic.y));
  const width = panelWidth();
  const height = Math.round(Math.max(250, width * 0.6));
  const box = { left: 62, right: width - 14, top: 12, bottom: height - 44 };
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": panel.title });
  if (points.length) {
    const x = scale(xs, logarithmic.x, box.left, box.right, xs);
    const y = scale(ys, logarithmic.y, box.bottom, box.top, []);
    if (!y.ticks.length) y.ticks = [...new Set(ys)];
    drawGrid(svg, box, x, y, { x: panel.x_label, y: panel.y_label });
    for (const [, line] of references) {
      const path = line.filter(([a, b]) => fits(a, b)).map(([a, b]) => `${x.place(a).toFixed(1)},${y.place(b).toFixed(1)}`);
      svg.append(shape("polyline", { class: "reference", points: path.join(" ") }));
    }
    for (const label of series) drawSeries(svg, suite, panel, points.filter((row) => row.series === label), x, y);
  }
  const tools = element("span", { class: "tools" });
  for (const axis of ["x", "y"]) {
    const toggle = () => { logarithmic[axis] = !logarithmic[axis]; draw(); };
    tools.append(element("button", { type: "button", "aria-pressed": String(logarithmic[axis]), "data-axis": axis, onclick: toggle }, "log " + axis));
  }
  const drawn = element("figure", { "data-panel": name }, tools, element("h4", {}, panel.title), svg);
  drawn.append(drawLegend(suite, series, references));
  return drawn;
}

// As wide as a column of the charts: text keeps its size on a phone.
function panelWidth() {
  const room = document.querySelector("main").clientWidth - 32;
  const columns = Math.max(1, Math.floor((room + 16) / 476));
  return Math.floor((room - 16 * (columns - 1)) / columns) - 20;
}

function drawGrid(svg, box, x, y, { x: xLabel, y: yLabel, xText = tick, yText = tick }) {
  let end = -Infinity;
  for (const value of x.ticks) {
    const at = x.place(value);
    svg.append(shape("line", { class: "grid", x1: at.toFixed(1), x2: at.toFixed(1), y1: box.top, y2: box.bottom }));
    const half = xText(value).length * 3.6;
    if (at - half < end + 6) continue; // no two labels run into each other
    end = at + half;
    svg.append(shape("text", { x: at.toFixed(1), y: box.bottom + 16, "text-anchor": "middle" }, xText(value)));
  }
  for (const value of y.ticks) {
    const at = y.place(value).toFixed(1);
    svg.append(shape("line", { class: "grid", y1: at, y2: at, x1: box.left, x2: box.right }));
    svg.append(shape("text", { x: box.left - 6, y: Number(at) + 4, "text-anchor": "end" }, yText(value)));
  }
  if (xLabel) svg.append(shape("text", { x: (box.left + box.right) / 2, y: box.bottom + 35, "text-anchor": "middle" }, xLabel));
  const middle = (box.top + box.bottom) / 2;
  if (yLabel) svg.append(shape("text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, yLabel));
}

function style(suite, label) {
  const index = Math.max(suite.series.indexOf(label), 0);
  const [dash, border] = DASHES[Math.floor(index / COLOURS) % DASHES.length];
  return { colour: `var(--s${index % COLOURS})`, dash, border };
}

function drawSeries(svg, suite, panel, rows, x, y) {
  if (!rows.length) return;
  const { colour, dash } = style(suite, rows[0].series);
  const order = panel.order || panel.x;
  const line = [...rows].sort((a, b) => a[order] - b[order]);
  if (panel.lines && line.length > 1) {
    const path = line.map((row) => `${x.place(row[panel.x]).toFixed(1)},${y.place(row[panel.y]).toFixed(1)}`).join(" ");
    svg.append(shape("polyline", { class: "line", points: path, style: `stroke: ${colour}`, "stroke-dasharray": dash }));
  }
  for (const row of line) {
    const point = shape("circle", {
      class: "point", cx: x.place(row[panel.x]).toFixed(1), cy: y.place(row[panel.y]).toFixed(1), r: panel.lines ? 4 : 6,
      style: `fill: ${colour}`, tabindex: 0, "data-row": row.id, "aria-label": describe(suite, row),
    });
    hoverable(point, describe(suite, row));
    point.addEventListener("click", () => lead([row.id]));
    svg.append(point);
  }
}

function drawLegend(suite, series, references) {
  const legend = element("div", { class: "legend" });
  for (const label of series) {
    const key = suite.name + "/" + label;
    const { colour, border } = style(suite, label);
    const swatch = element("i", { style: `border-top-style: ${border}; border-color: ${colour}` });
    const toggle = () => { hidden.has(key) ? hidden.delete(key) : hidden.add(key); draw(); };
    legend.append(element("button", { type: "button", "aria-pressed": String(!hidden.has(key)), title: suite.meaning[label] || label, onclick: toggle }, swatch, label));
  }
  for (const [label, line] of references) if (line.length) legend.append(element("span", {}, "- - " + label));
  return legend;
}

function describe(suite, row) {
  const head = suite.key.map((column) => figure(row[column.key], column.form)).filter(Boolean).join(", ");
  const body = suite.columns.map((column) => [column.label, figure(row[column.key], column.form)]).filter(([, text]) => text);
  return head + "\n" + body.map(([label, text]) => `${label}: ${text}`).join("\n") + (row.noisy ? "\nnoisy: the machine was busy" : "");
}

function tip(text, where) {
  const box = document.getElementById("tip");
  const place = where.clientX === undefined ? where.getBoundingClientRect() : { left: where.clientX, top: where.clientY };
  box.textContent = text;
  box.hidden = false;
  box.style.left = Math.max(4, Math.min(place.left + 14, innerWidth - box.offsetWidth - 8)) + "px";
  box.style.top = Math.max(4, Math.min(place.top + 14, innerHeight - box.offsetHeight - 8)) + "px";
}

function untip() {
  document.getElementById("tip").hidden = true;
}

// --- tables ---

function drawTable(suite, rows) {
  const columns = [...suite.key, ...suite.columns, { label: "run", key: "run", form: "integer" }];
  const order = sorted.get(suite.name);
  rows = rows.filter((row) => row.status !== "unsupported");
  const shown = order ? [...rows].sort((a, b) => compare(a[order.key], b[order.key], order.down)) : rows;
  const head = element("tr");
  for (const column of columns) {
    const sort = () => {
      const before = sorted.get(suite.name);
      sorted.set(suite.name, { key: column.key, down: before?.key === column.key ? !before.down : false });
      draw();
    };
    const arrow = order?.key === column.key ? (order.down ? " ▼" : " ▲") : "";
    head.append(element("th", { class: column.form === "text" ? "text" : "", scope: "col", onclick: sort }, column.label + arrow));
  }
  const body = element("tbody");
  for (const row of shown) {
    const line = element("tr", { id: "row-" + row.id, class: (marked.has(row.id) ? "marked " : "") + (row.status === "ok" ? "" : "failed") });
    for (const column of suite.key) line.append(element("td", { class: kind(column, row) }, figure(row[column.key], column.form)));
    if (row.status === "ok") {
      for (const column of suite.columns) {
        const noisy = column.key === "ms" && row.noisy ? "~" : "";
        line.append(element("td", { class: kind(column, row), title: column.key === "ms" ? `spread ${figure(row.spread, "percent")}, ${row.samples} samples` : undefined }, figure(row[column.key], column.form) + noisy));
      }
    } else {
      line.append(element("td", { class: "text long", colspan: suite.columns.length }, `${row.status}: ${row.message || ""}`));
    }
    line.append(element("td", {}, String(row.run)));
    body.append(line);
  }
  return element("div", { class: "scroll" }, element("table", { "data-suite": suite.name }, element("thead", {}, head), body));
}

function kind(column, row) {
  const text = column.form === "text" || typeof row[column.key] === "string";
  return (text ? "text" : "") + (text && String(row[column.key] || "").length > 30 ? " long" : "");
}

// Cells without a value come last in both directions.
function compare(a, b, down) {
  const [empty, other] = [a, b].map((value) => value === null || value === undefined);
  if (empty || other) return empty - other;
  const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  return down ? -order : order;
}

function plainTable(rows) {
  const labels = Object.keys(rows[0] || {});
  const head = element("tr", {}, ...labels.map((label) => element("th", { scope: "col" }, label)));
  const body = rows.map((row) => element("tr", {}, ...labels.map((label) => element("td", { class: typeof row[label] === "string" ? "text" : "" }, figure(row[label])))));
  return element("div", { class: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)));
}

// --- claims ---

function lead(ids) {
  marked = new Set(ids);
  for (const id of ids) if (!visible(ROWS.get(id))) { for (const key of Object.keys(chosen)) delete chosen[key]; break; }
  for (const input of document.querySelectorAll("#filters select, #filters input")) input.value = chosen[input.id.replace("filter-", "")] || "";
  document.getElementById("everything").open = true;
  draw();
  document.getElementById("row-" + ids[0])?.scrollIntoView({ block: "center" });
  history.replaceState(null, "", "#row-" + ids[0]);
}

function claimItem(claim) {
  const text = claim.rows.length === 1 ? "row" : `${claim.rows.length} rows`;
  const item = element("li", {}, claim.text);
  if (claim.rows.length) {
    const link = element("a", { href: "#row-" + claim.rows[0], "data-rows": claim.rows.join(" ") }, text);
    link.addEventListener("click", (event) => { event.preventDefault(); lead(claim.rows); });
    item.append(" ", link);
  }
  return item;
}

function drawClaims() {
  const list = document.getElementById("claims");
  const claims = DATA.story ? DATA.story.sentences : DATA.claims.map((claim) => ({ ...claim, text: `${claim.suite}: ${claim.text}` }));
  list.replaceChildren(...claims.map(claimItem));
  document.getElementById("findings").hidden = !list.children.length;
}

// What could not run at all: a line for each reason.
function drawReasons(rows) {
  const reasons = new Map();
  for (const row of rows.filter((one) => one.status === "unsupported")) {
    const name = row.series || row.peer || row.suite;
    reasons.set(row.message, [...new Set([...(reasons.get(row.message) || []), name])]);
  }
  return [...reasons].map(([message, names]) => element("p", { class: "note reason" }, `Not run: ${names.join(", ")}: ${message}`));
}

// --- everything measured ---

function draw() {
  untip();
  const place = document.getElementById("suites");
  const scrolled = scrollY;
  place.replaceChildren();
  let count = 0;
  for (const suite of DATA.suites) {
    const rows = DATA.rows.filter((row) => row.suite === suite.name && visible(row));
    if (!rows.length) continue;
    count += rows.length;
    const section = element("section", { "data-suite": suite.name }, element("h3", {}, suite.name), element("p", { class: "note" }, suite.about));
    const claims = DATA.claims.filter((claim) => claim.suite === suite.name);
    if (DATA.story && claims.length) section.append(element("ul", { class: "claims" }, ...claims.map(claimItem)));
    const charts = element("div", { class: "charts" });
    suite.panels.forEach((panel, index) => {
      const drawn = drawPanel(suite, panel, index);
      if (drawn) charts.append(drawn);
    });
    section.append(charts, ...drawReasons(rows), drawTable(suite, rows));
    for (const [title, published] of Object.entries(suite.published)) {
      section.append(element("div", { class: "published" }, element("h4", {}, "Published, not measured here: " + title), plainTable(published)));
    }
    place.append(section);
  }
  document.getElementById("count").textContent = `${count} of ${DATA.rows.length} rows`;
  scrollTo(0, scrolled);
}

function drawEnvironment() {
  const table = document.getElementById("environment");
  const runs = DATA.environments;
  table.append(element("thead", {}, element("tr", {}, element("th", { class: "text" }, "run"), ...runs.map((_, index) => element("th", { class: "text" }, String(index + 1))))));
  const body = element("tbody");
  for (const key of [...new Set(runs.flatMap((run) => Object.keys(run)))]) {
    body.append(element("tr", {}, element("td", { class: "text" }, key), ...runs.map((run) => element("td", { class: "text long" }, String(run[key] ?? "")))));
  }
  table.append(body);
}
