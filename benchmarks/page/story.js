// The first screens: at your length, the front of speed against error, and the curves of the methods that matter.
// Drawn from the rows of the suite ops that DATA.story names; page.js has the helpers and everything else.

const STORY = DATA.story;
const LENGTH_STEPS = 8; // of the slider, an octave
const EXACT = 1e-4; // errors below are rounding
const TOLERANCES = [["exact", EXACT], ["5 %", 0.05], ["10 %", 0.1], ["20 %", 0.2], ["50 %", 0.5], ["any", Infinity]];
const MODE_NAMES = { fwd: "forward", fwd_bwd: "training step", decode: "decoding" };
const SDPA = "torch SDPA";
const view = { mode: null, length: null, tolerance: 0.2, all: false, group: null, chosen: null };

// --- the rows as curves ---

function storyCurves() {
  const curves = new Map(); // mode -> method -> points, by length
  for (const id of STORY.rows) {
    const row = ROWS.get(id);
    if (!curves.has(row.mode)) curves.set(row.mode, new Map());
    const methods = curves.get(row.mode);
    if (!methods.has(row.method)) methods.set(row.method, []);
    const unsure = row.unsure ?? row.spread ?? 0;
    methods.get(row.method).push({ n: row.seqlen, ms: row.ms, unsure, error: row.error, mib: row.peak_mib, sdpa: row.sdpa_ms, dense: row.dense_ms, peerUnsure: row.sdpa_unsure ?? 0, row });
  }
  for (const methods of curves.values()) for (const points of methods.values()) points.sort((a, b) => a.n - b.n);
  return curves;
}

const CURVES = STORY ? storyCurves() : new Map();

function lengths(mode) {
  return [...new Set([...CURVES.get(mode).values()].flatMap((points) => points.map((point) => point.n)))].sort((a, b) => a - b);
}

// The point of a curve at a length: measured, or between two measured ones (in logarithms); none beyond its ends.
function pointAt(points, n) {
  const last = points.findIndex((point) => point.n >= n);
  if (last < 0) return null;
  const [a, b] = [points[Math.max(last - 1, 0)], points[last]];
  if (b.n === n) return { ...b, measured: true };
  if (last === 0) return null;
  const part = Math.log(n / a.n) / Math.log(b.n / a.n);
  const between = (key) => (a[key] > 0 && b[key] > 0 ? a[key] * (b[key] / a[key]) ** part : b[key]);
  return { ...b, n, ms: between("ms"), error: between("error"), mib: between("mib"), sdpa: between("sdpa"), dense: between("dense"), unsure: Math.max(a.unsure, b.unsure), measured: false };
}

// All methods at the chosen length, PyTorch's among them, the fastest first.
function here() {
  const found = [];
  for (const [method, points] of CURVES.get(view.mode)) {
    const point = pointAt(points, view.length);
    if (point) found.push({ method, ...STORY.methods[method], ...point, speed: point.sdpa / point.ms });
  }
  if (found.length) {
    const { sdpa, peerUnsure } = found[0];
    found.push({ method: SDPA, name: SDPA, group: "exact", ms: sdpa, unsure: peerUnsure, error: 0, mib: null, speed: 1, sdpa, dense: found[0].dense });
  }
  return found.sort((a, b) => a.ms - b.ms);
}

function near(candidates) {
  return candidates.filter((one) => one.error <= view.tolerance || (one.error < EXACT && view.tolerance <= EXACT));
}

function front(candidates) {
  const kept = [];
  for (const one of candidates) if (!kept.length || one.error < kept[kept.length - 1].error) kept.push(one);
  return kept;
}

function percent(error) {
  if (error < EXACT) return "exact";
  return (100 * error).toFixed(error < 0.0995 ? 1 : 0) + " %";
}

function many(value) {
  return (value < 10 ? significant(value, 2) : value.toFixed(0)) + "x";
}

// A name where there is little room: so many letters.
function brief(name, letters = 26) {
  const short = name.replace("sliding_window", "window").replace("topk_blocks", "topk").replace("topp_blocks", "topp");
  return short.length > letters ? short.slice(0, letters - 1) + "…" : short;
}

function colourOf(group) {
  return `var(--g-${group})`;
}

// --- at your length ---

function recommendation(all) {
  const best = near(all)[0];
  if (!best) return { text: "Nothing was measured at this length.", code: null };
  const exact = all.filter((one) => one.error < EXACT).sort((a, b) => a.ms - b.ms)[0];
  const gain = exact ? exact.ms / best.ms : best.speed;
  const doubt = best.unsure + (exact ? exact.unsure : 0);
  const faster = all.find((one) => one.ms < best.ms && one.error > view.tolerance);
  const beyond = faster ? ` ${faster.name} is faster (${many(best.ms / faster.ms)} again) but errs by ${percent(faster.error)}.` : "";
  if (best.method === SDPA) return { name: "Keep PyTorch's own", text: `Within this error nothing is faster than ${SDPA} (${figure(best.ms, "ms")} ms).${beyond}`, code: null };
  const code = `efficient_attn.replace_attention(model, attention="${best.method}")`;
  if (best.error < EXACT) return { name: best.name, text: `Exact, at ${many(best.speed)} the speed of ${SDPA} (${figure(best.ms, "ms")} against ${figure(best.sdpa, "ms")} ms).${beyond}`, code, best };
  if (gain < 1 + doubt) return { name: best.name, text: `Too noisy to tell whether it is faster than exact attention here (${many(gain)}, unsure by ${percent(doubt)}).${beyond}`, code, best };
  return { name: best.name, text: `${many(gain)} the speed of the best exact attention (${exact.name}, ${figure(exact.ms, "ms")} ms), with an error of ${percent(best.error)}.${beyond}`, code, best };
}

function segmented(label, options, current, choose) {
  const box = element("div", { class: "segmented", role: "group", "aria-label": label });
  for (const [text, value] of options) {
    box.append(element("button", { type: "button", "aria-pressed": String(value === current), onclick: () => choose(value) }, text));
  }
  return element("div", { class: "control" }, element("span", {}, label), box);
}

function lengthControl() {
  const known = lengths(view.mode);
  const [low, high] = [Math.log2(known[0]), Math.log2(known[known.length - 1])];
  const slider = element("input", { type: "range", id: "length", min: low, max: high, step: 1 / LENGTH_STEPS, value: Math.log2(view.length), "aria-label": "sequence length" });
  slider.addEventListener("input", () => {
    const n = 2 ** Number(slider.value);
    const measured = known.find((one) => Math.abs(Math.log2(one / n)) < 0.5 / LENGTH_STEPS);
    view.length = measured || Math.round(n / 16) * 16;
    drawHere();
  });
  const number = element("input", { type: "number", id: "length-number", min: known[0], max: known[known.length - 1], value: view.length, "aria-label": "sequence length as a number" });
  number.addEventListener("change", () => {
    view.length = Math.min(Math.max(Math.round(Number(number.value)) || known[0], known[0]), known[known.length - 1]);
    drawHere();
  });
  const marks = element("div", { class: "marks", "aria-hidden": "true" });
  for (const n of known) marks.append(element("span", { style: `left: ${(100 * (Math.log2(n) - low)) / (high - low || 1)}%` }, tick(n)));
  return element("div", { class: "control wide" }, element("span", {}, "your sequence length ", number, " tokens"), element("div", { class: "slider" }, slider, marks));
}

function drawControls() {
  const place = document.getElementById("controls");
  place.replaceChildren(lengthControl());
  const modes = [...CURVES.keys()].filter((mode) => mode !== "decode");
  const choose = (key) => (value) => { view[key] = value; if (key === "mode") view.length = nearest(view.length); drawStory(); };
  place.append(segmented("the error that you can stand", TOLERANCES, view.tolerance, choose("tolerance")));
  if (modes.length > 1) place.append(segmented("what you run", modes.map((mode) => [MODE_NAMES[mode], mode]), view.mode, choose("mode")));
}

function nearest(n) {
  const known = lengths(view.mode);
  return Math.min(Math.max(n, known[0]), known[known.length - 1]);
}

function drawAdvice(all) {
  const { name, text, code } = recommendation(all);
  const place = document.getElementById("advice");
  place.replaceChildren(element("h3", {}, name || ""), element("p", {}, text));
  if (code) {
    const copy = element("button", { type: "button", class: "copy", onclick: () => navigator.clipboard?.writeText(code).then(() => { copy.textContent = "copied"; }) }, "copy");
    place.append(element("div", { class: "code" }, element("code", {}, code), copy));
  }
}

function drawRanking(all, best) {
  const place = document.getElementById("ranking");
  const most = Math.max(...all.map((one) => one.speed));
  place.replaceChildren(element("div", { class: "rank head" }, ...["method", "speed against " + SDPA, "error", "ms", "MiB"].map((text) => element("span", {}, text))));
  for (const one of all) {
    const allowed = near([one]).length > 0;
    const bar = element("span", { class: "bar" }, element("i", { style: `width: calc((100% - 3.6em) * ${(one.speed / most).toFixed(4)}); background: ${colourOf(one.group)}` }), element("b", {}, many(one.speed) + (one.unsure > STORY.unsure ? "~" : "")));
    const line = element("div", { class: "rank" + (allowed ? "" : " beyond") + (one.method === best?.method ? " best" : ""), title: one.method }, element("span", { class: "who" }, one.name), bar, element("span", {}, percent(one.error)), element("span", {}, figure(one.ms, "ms")), element("span", {}, one.mib === null || one.mib === undefined ? "" : one.mib.toFixed(1)));
    place.append(line);
  }
}

// --- the front ---

function drawFront(all) {
  const place = document.getElementById("front");
  const width = Math.max(place.clientWidth, 280);
  const height = Math.round(Math.min(520, Math.max(320, width * 0.8)));
  const inexact = all.filter((one) => one.error >= EXACT);
  const floor = inexact.length ? Math.min(...inexact.map((one) => one.error)) / 2 : 0.01;
  const at = (one) => Math.max(one.error, floor * 0.8);
  const box = { left: 58, right: width - 16, top: 14, bottom: height - 46 };
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "Speed against error" });
  const low = Math.min(...all.map((one) => one.speed / (1 + one.unsure)));
  const high = Math.max(...all.map((one) => one.speed * (1 + one.unsure)));
  const x = scale([low * 0.92, high * (high / low) ** 0.12], true, box.left, box.right, []);
  const y = scale([floor * 0.62, Math.max(...inexact.map((one) => one.error), floor * 4) * 1.25], true, box.bottom, box.top, []);
  x.ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].filter((value) => x.place(value) >= box.left && x.place(value) <= box.right);
  y.ticks = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1].filter((value) => value > floor && y.place(value) > box.top - 4);
  const stand = Number.isFinite(view.tolerance) && view.tolerance > floor ? y.place(view.tolerance) : null;
  if (stand !== null) svg.append(shape("rect", { class: "allowed", x: box.left, y: Math.max(stand, box.top), width: box.right - box.left, height: Math.max(box.bottom - Math.max(stand, box.top), 0) }));
  drawGrid(svg, box, x, y, { x: `times the speed of ${SDPA} →`, y: "← error", yText: (value) => percent(value), xText: (value) => many(value) });
  svg.append(shape("text", { x: box.left - 6, y: y.place(floor * 0.8) + 4, "text-anchor": "end" }, "exact"));
  if (x.place(1) > box.left) svg.append(shape("line", { class: "one", x1: x.place(1), x2: x.place(1), y1: box.top, y2: box.bottom }));
  const line = front(all);
  const steps = line.flatMap((one, index) => (index ? [[one.speed, at(line[index - 1])], [one.speed, at(one)]] : [[one.speed, at(one)]]));
  svg.append(shape("polyline", { class: "frontline", points: steps.map(([a, b]) => `${x.place(a).toFixed(1)},${y.place(b).toFixed(1)}`).join(" ") }));
  const labels = [];
  for (const one of all) {
    const [cx, cy] = [x.place(one.speed), y.place(at(one))];
    const inFront = line.includes(one);
    const bar = { x1: x.place(one.speed / (1 + one.unsure)), x2: x.place(one.speed * (1 + one.unsure)), y1: cy, y2: cy, class: "whisker", style: `stroke: ${colourOf(one.group)}` };
    svg.append(shape("line", bar));
    const point = shape("circle", { class: "point", cx, cy, r: inFront ? 7 : 5, style: `fill: ${colourOf(one.group)}; fill-opacity: ${inFront ? 1 : 0.55}`, tabindex: 0, "aria-label": `${one.name}: ${many(one.speed)}, ${percent(one.error)}` });
    hoverable(point, `${one.method}\n${many(one.speed)} the speed of ${SDPA}, ${figure(one.ms, "ms")} ms\nerror ${percent(one.error)}` + (one.mib ? `\n${one.mib.toFixed(1)} MiB` : "") + (one.unsure > STORY.unsure ? `\nunsure by ${percent(one.unsure)}` : ""));
    svg.append(point);
    labels.push({ text: brief(one.name), x: cx, y: cy, bold: inFront });
  }
  placeLabels(svg, labels, box, stand ?? box.bottom + 9);
  place.replaceChildren(svg);
}

// Names beside their points, moved up or down until none lies on another.
function placeLabels(svg, labels, box, stand) {
  const taken = [];
  for (const label of labels.sort((a, b) => b.bold - a.bold)) {
    const long = label.text.length * 6.6 + 4;
    const anchors = [[10, 4], [10, -9], [10, 17], [-10 - long, 4], [-10 - long, -9], [-10 - long, 17], [-long / 2, -12], [-long / 2, 22]];
    const free = anchors.map(([dx, dy]) => ({ left: label.x + dx, right: label.x + dx + long, top: label.y + dy - 11, bottom: label.y + dy + 3 }))
      .find((place) => place.left >= box.left - 4 && place.right <= box.right + 14 && place.top > 0 && !taken.some((other) => place.left < other.right && place.right > other.left && place.top < other.bottom && place.bottom > other.top) && !labels.some((other) => other !== label && other.x > place.left - 4 && other.x < place.right + 4 && other.y > place.top - 3 && other.y < place.bottom + 3));
    if (!free) continue;
    taken.push(free);
    svg.append(shape("text", { class: `name${label.bold ? " bold" : ""}${free.bottom - 6 > stand ? " within" : ""}`, x: free.left.toFixed(1), y: (free.bottom - 3).toFixed(1) }, label.text));
  }
}

// --- curves ---

const MEASURES = [
  { key: "ms", title: "Time", unit: "ms", text: (value) => significant(value, 3), peer: "sdpa", note: "band: what the time is sure to" },
  { key: "mib", title: "Memory", unit: "MiB", text: (value) => significant(value, 3), note: "peak of a call above its inputs" },
  { key: "error", title: "Error", unit: "", text: percent, note: "against exact attention, on patches of photographs" },
];

// The methods that the curves show: those of one group, all, or the few that are in the front somewhere.
function mattering() {
  const all = [...CURVES.get(view.mode).keys()];
  if (view.group) return all.filter((method) => STORY.methods[method].group === view.group);
  if (view.all || all.length <= 8) return all;
  const kept = new Set(["dense"]);
  // Of each group the one with the best of both at the longest length.
  const cost = (method) => { const point = CURVES.get(view.mode).get(method).at(-1); return point.ms * Math.max(point.error, EXACT) / point.n; };
  for (const group of new Set(all.map((method) => STORY.methods[method].group))) {
    const members = all.filter((method) => STORY.methods[method].group === group && method !== "dense");
    if (group !== "exact" && members.length) kept.add(members.reduce((a, b) => (cost(b) < cost(a) ? b : a)));
  }
  for (const n of lengths(view.mode)) {
    const points = all.map((method) => ({ method, point: CURVES.get(view.mode).get(method).find((one) => one.n === n) })).filter(({ point }) => point);
    for (const one of front(points.map(({ method, point }) => ({ method, ms: point.ms, error: point.error })).sort((a, b) => a.ms - b.ms))) kept.add(one.method);
  }
  return all.filter((method) => kept.has(method));
}

function drawCurves() {
  const place = document.getElementById("curves");
  const shown = mattering();
  const columns = Math.max(1, Math.min(3, Math.floor(place.clientWidth / 330)));
  place.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
  place.replaceChildren();
  for (const measure of MEASURES) {
    const whole = columns === 2 && measure === MEASURES[0]; // a row of its own: three charts leave no hole
    const width = Math.floor(place.clientWidth / (whole ? 1 : columns)) - (columns > 1 && !whole ? 36 : 22);
    const lines = shown.map((method) => ({ method, ...STORY.methods[method], points: CURVES.get(view.mode).get(method).filter((point) => point[measure.key] > (measure.key === "error" ? EXACT : 0)) })).filter((line) => line.points.length);
    if (!lines.length) continue;
    const svg = curves(measure, lines, width, Math.round(Math.max(270, Math.min(330, width * 0.8))));
    place.append(element("figure", whole ? { class: "whole" } : {}, element("h4", {}, `${measure.title}${measure.unit ? ", " + measure.unit : ""}`), svg, element("figcaption", {}, measure.note)));
  }
  const total = CURVES.get(view.mode).size;
  const chips = document.getElementById("groups");
  const groups = [...new Set([...CURVES.get(view.mode).keys()].map((method) => STORY.methods[method].group))];
  chips.replaceChildren();
  const chip = (text, pressed, choose, group) => chips.append(element("button", { type: "button", class: "chip", "aria-pressed": String(pressed), onclick: () => { choose(); drawStory(); } }, ...(group ? [element("i", { style: `background: ${colourOf(group)}` })] : []), text));
  chip(total > 8 ? "those that matter" : "all", !view.group && !view.all, () => { view.group = null; view.all = false; });
  for (const group of groups) chip(group, view.group === group, () => { view.group = view.group === group ? null : group; }, group);
  if (total > 8) chip(`all ${total}`, view.all && !view.group, () => { view.all = true; view.group = null; });
}

const MARKS = ["", "7 3", "2 3", "9 3 2 3"]; // methods of one group

function curves(measure, lines, width, height) {
  const names = Math.min(124, width * 0.38); // room for names at the ends
  const box = { left: 50, right: width - names, top: 10, bottom: height - 40 };
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${measure.title} against length` });
  const all = lines.flatMap((line) => line.points);
  const values = all.map((point) => point[measure.key]);
  const peer = measure.peer ? lengths(view.mode).map((n) => [n, all.find((point) => point.n === n)?.[measure.peer]]).filter(([, value]) => value > 0) : [];
  const x = scale(lengths(view.mode), true, box.left, box.right, lengths(view.mode));
  const y = scale([...values, ...peer.map(([, value]) => value)], true, box.bottom, box.top, []);
  drawGrid(svg, box, x, y, { x: "sequence length", yText: measure.text, xText: tick });
  const at = x.place(view.length);
  svg.append(shape("line", { class: "one", x1: at, x2: at, y1: box.top, y2: box.bottom }));
  const ends = [];
  if (peer.length) {
    svg.append(shape("polyline", { class: "reference", points: peer.map(([n, value]) => `${x.place(n).toFixed(1)},${y.place(value).toFixed(1)}`).join(" ") }));
    ends.push({ text: SDPA, y: y.place(peer[peer.length - 1][1]), x: x.place(peer[peer.length - 1][0]), colour: "var(--ink)" });
  }
  const seen = new Map();
  for (const line of lines) {
    const number = seen.get(line.group) || 0;
    seen.set(line.group, number + 1);
    const colour = colourOf(line.group);
    const place = (point, factor = 1) => `${x.place(point.n).toFixed(1)},${y.place(point[measure.key] * factor).toFixed(1)}`;
    if (measure.key === "ms" && line.points.length > 1) {
      const up = line.points.map((point) => place(point, 1 + point.unsure));
      const down = line.points.map((point) => place(point, 1 / (1 + point.unsure))).reverse();
      svg.append(shape("polygon", { class: "band", points: [...up, ...down].join(" "), style: `fill: ${colour}` }));
    }
    svg.append(shape("polyline", { class: "line", points: line.points.map((point) => place(point)).join(" "), style: `stroke: ${colour}`, "stroke-dasharray": MARKS[number % MARKS.length] }));
    for (const point of line.points) {
      const dot = shape("circle", { class: "point", cx: x.place(point.n), cy: y.place(point[measure.key]), r: 3.5, style: `fill: ${colour}`, tabindex: 0, "aria-label": `${line.name}, ${point.n}` });
      hoverable(dot, `${line.method}\n${point.n} tokens: ${measure.text(point[measure.key])} ${measure.unit}` + (measure.key === "ms" ? ` ± ${percent(Math.max(point.unsure, EXACT))}` : ""));
      dot.addEventListener("click", () => lead([point.row.id]));
      svg.append(dot);
    }
    const last = line.points[line.points.length - 1];
    ends.push({ text: brief(line.name.replace(" + ", "+"), Math.floor((names - 24) / 6.6)), y: y.place(last[measure.key]), x: x.place(last.n), colour });
  }
  drawEnds(svg, ends, box);
  return svg;
}

// Names at the ends of lines, pushed apart.
function drawEnds(svg, ends, box) {
  ends.sort((a, b) => a.y - b.y);
  const gap = 13;
  ends.forEach((end, index) => { end.at = Math.max(end.y, index ? ends[index - 1].at + gap : box.top); });
  for (let index = ends.length - 1; index >= 0; index--) {
    const limit = index === ends.length - 1 ? box.bottom + 4 : ends[index + 1].at - gap;
    ends[index].at = Math.min(ends[index].at, limit);
  }
  for (const end of ends) {
    svg.append(shape("line", { class: "leader", x1: end.x + 5, y1: end.y, x2: box.right + 9, y2: end.at, style: `stroke: ${end.colour}` }));
    svg.append(shape("text", { class: "end", x: box.right + 11, y: end.at + 4, style: `fill: ${end.colour}` }, end.text));
  }
}

// --- small multiples ---

function drawMultiples() {
  const place = document.getElementById("multiples");
  const methods = [...CURVES.get(view.mode)].filter(([method]) => method !== "dense" || CURVES.get(view.mode).size === 1);
  const most = Math.max(2, Math.floor(place.clientWidth / 188));
  const columns = Math.max(2, Math.ceil(methods.length / Math.ceil(methods.length / most))); // rows as full as can be
  place.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
  const width = Math.floor(place.clientWidth / columns) - 12;
  const height = 118;
  const gain = (point) => Math.min(point.sdpa, point.dense ?? point.sdpa) / point.ms;
  const all = methods.flatMap(([, points]) => points.map(gain));
  if (!all.length) return;
  place.replaceChildren();
  for (const [method, points] of methods) {
    const about = STORY.methods[method];
    const box = { left: 34, right: width - 8, top: 8, bottom: height - 20 };
    const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `Gain of ${about.name}` });
    const x = scale(lengths(view.mode), true, box.left, box.right, []);
    const y = scale([...all, 1], true, box.bottom, box.top, []);
    const zero = y.place(1);
    svg.append(shape("rect", { class: "slower", x: box.left, y: zero, width: box.right - box.left, height: Math.max(box.bottom - zero, 0) }));
    svg.append(shape("line", { class: "one", x1: box.left, x2: box.right, y1: zero, y2: zero }), shape("text", { x: box.left - 5, y: zero + 4, "text-anchor": "end" }, "1x"));
    const top = Math.max(...all);
    if (top > 1.5) svg.append(shape("text", { x: box.left - 5, y: y.place(top) + 4, "text-anchor": "end" }, many(top)));
    for (const [n, anchor] of [[lengths(view.mode)[0], "start"], [lengths(view.mode).at(-1), "end"]]) svg.append(shape("text", { x: x.place(n), y: height - 5, "text-anchor": anchor }, tick(n)));
    for (const [other, line] of methods) if (other !== method) svg.append(shape("polyline", { class: "faint", points: line.map((point) => `${x.place(point.n).toFixed(1)},${y.place(gain(point)).toFixed(1)}`).join(" ") }));
    svg.append(shape("polyline", { class: "line strong", points: points.map((point) => `${x.place(point.n).toFixed(1)},${y.place(gain(point)).toFixed(1)}`).join(" "), style: `stroke: ${colourOf(about.group)}` }));
    const last = points[points.length - 1];
    place.append(element("figure", { class: "small", title: method }, element("h4", {}, element("i", { style: `background: ${colourOf(about.group)}` }), about.name), svg, element("figcaption", {}, `${many(gain(last))} at ${tick(last.n)}, error ${percent(last.error)}`)));
  }
}

// --- all of it ---

function drawHere() {
  const all = here();
  const { best } = recommendation(all);
  document.getElementById("length-number").value = view.length;
  document.getElementById("length").value = Math.log2(view.length);
  document.getElementById("front-title").textContent = `Speed against error, ${MODE_NAMES[view.mode]} at ${view.length} tokens`;
  drawAdvice(all);
  drawRanking(all, best);
  drawFront(all);
  drawCurves();
}

function drawStory() {
  if (!STORY || !CURVES.size) return;
  drawControls();
  drawHere();
  drawMultiples();
}

function buildStory() {
  if (!STORY || !CURVES.size) return false;
  view.mode = CURVES.has("fwd") ? "fwd" : [...CURVES.keys()][0];
  view.length = lengths(view.mode).at(-1);
  const section = (title, note, ...children) => element("section", {}, element("h2", {}, title), ...(note ? [element("p", { class: "note" }, note)] : []), ...children);
  document.getElementById("story").append(
    section("What you gain at your length, and what you lose", STORY.about, element("div", { id: "controls" }), element("div", { id: "here" }, element("div", { id: "advice", "aria-live": "polite" }), element("div", { id: "front-card" }, element("h3", { id: "front-title" }), element("div", { id: "front" }), element("p", { class: "note" }, "The line joins the methods that no other beats in speed and error at once; shaded is what lies within the error that you can stand.")), element("div", { id: "ranking" }))),
    section("Time, memory and error against length", null, element("div", { id: "groups", role: "group", "aria-label": "methods" }), element("div", { id: "curves" })),
    section("Each method against the best exact attention", "Speed as a multiple of the faster one of ours and PyTorch's exact attention; shaded: slower.", element("div", { id: "multiples" })),
  );
  return true;
}

// --- the page ---

let drawnAt = 0; // the width that the charts were drawn for

function drawAll() {
  if (document.querySelector("main").clientWidth < 200) return; // a window that is being opened or closed
  drawnAt = document.querySelector("main").clientWidth;
  if (document.getElementById("everything").open) draw();
  drawStory();
}

document.getElementById("about").textContent = DATA.about;
document.getElementById("count").textContent = `${DATA.rows.length} rows`;
buildFilters();
drawEnvironment();
drawClaims();
document.getElementById("everything").open = !buildStory();
document.getElementById("everything").addEventListener("toggle", (event) => { if (event.target.open && !document.getElementById("suites").children.length) draw(); });
drawAll();
addEventListener("resize", () => { if (document.querySelector("main").clientWidth !== drawnAt) drawAll(); });
const target = location.hash.replace("#row-", "");
if (ROWS.has(target)) lead([target]);
