"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// --- tables ---------------------------------------------------------------------------------------------------------

const number = (text) => {
  const found = /^[<+−-]?\s*[\d.,]+/.exec(text.trim());
  return found ? parseFloat(found[0].replace("−", "-").replace(/[<+,\s]/g, "")) : NaN;
};

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const text = (row) => row.cells[column].textContent;
    const rows = [...body.rows];
    const numeric = column > 0 && rows.some((row) => !Number.isNaN(number(text(row))));
    // Numbers begin with the largest, names with the first.
    const before = head.getAttribute("aria-sort");
    const down = before ? before === "ascending" : numeric;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1;
    rows.sort((a, b) => {
      if (!numeric) return sign * text(a).localeCompare(text(b), undefined, { numeric: true });
      const [x, y] = [number(text(a)), number(text(b))];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // what is unknown comes last
      return sign * (x - y);
    });
    body.append(...rows);
  }));
}

// --- limits ---------------------------------------------------------------------------------------------------------

const models = data.models;
const better = (a, b) => (data.lower ? a.score < b.score : a.score > b.score);
const known = (model, key) => model[key] !== null && model.score !== null;

function limitOf(key) {
  const input = byId(key);
  const most = Math.max(...models.map((model) => model[key] ?? 0));
  return input.value === input.max ? Infinity : (most * input.value) / input.max;
}

function within(model, limits) {
  return ["mb", "ms"].every((key) => limits[key] === Infinity || (model[key] !== null && model[key] <= limits[key]));
}

function pick(limits) {
  const order = (a, b) => (better(a, b) ? -1 : better(b, a) ? 1 : (a.mb ?? Infinity) - (b.mb ?? Infinity) || a.ms - b.ms);
  return models.filter((model) => model.score !== null && within(model, limits)).sort(order)[0];
}

function element(name, attributes, parent, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const digits = Math.max(0, -Math.floor(Math.log10(step)) + (step / 10 ** Math.floor(Math.log10(step)) === 2.5 ? 1 : 0));
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push([at, at.toFixed(digits)]);
  return found;
}

function draw(svg, key, limits, picked) {
  const width = svg.clientWidth, height = svg.clientHeight;
  const left = 44, right = 8, top = 12, bottom = 22;
  svg.replaceChildren();
  const drawn = models.filter((model) => known(model, key));
  if (!drawn.length || !width) return;
  const all = drawn.flatMap((model) => [model.low ?? model.score, model.high ?? model.score]);
  const spread = (Math.max(...all) - Math.min(...all)) * 0.06 || 0.01;
  const [low, high] = [Math.min(...all) - spread, Math.max(...all) + spread];
  const most = Math.max(...drawn.map((model) => model[key])) * 1.06 || 1;
  const x = (value) => left + (value / most) * (width - left - right);
  const y = (value) => top + ((high - value) / (high - low)) * (height - top - bottom);
  for (const [at, text] of ticks(low, high, 5)) {
    element("line", { class: "grid", x1: left, x2: width - right, y1: y(at), y2: y(at) }, svg);
    element("text", { x: left - 8, y: y(at) + 4, "text-anchor": "end" }, svg, text);
  }
  for (const [at, text] of ticks(0, most, width < 420 ? 4 : 6)) {
    element("text", { x: x(at), y: height - 4, "text-anchor": "middle" }, svg, text);
  }
  if (limits[key] < Infinity) {
    const at = x(limits[key]);
    element("rect", { class: "beyond", x: at, y: top, width: Math.max(width - right - at, 0), height: height - top - bottom }, svg);
    element("line", { class: "limit", x1: at, x2: at, y1: top, y2: height - bottom }, svg);
  }
  const ascending = [...drawn].sort((a, b) => a[key] - b[key] || (better(a, b) ? -1 : 1));
  const front = [];
  for (const model of ascending) if (!front.length || better(model, front[front.length - 1])) front.push(model);
  const path = front.map((model, index) => (index ? `H${x(model[key])}V${y(model.score)}` : `M${x(model[key])} ${y(model.score)}`));
  element("path", { class: "front", d: path.join("") }, svg);
  const taken = drawn.map((model) => [x(model[key]) - 6, x(model[key]) + 6, y(model.score)]);
  const important = (model) => (model === picked ? 0 : model.pale ? 2 : 1);
  for (const model of [...drawn].sort((a, b) => important(a) - important(b))) {
    const [px, py] = [x(model[key]), y(model.score)];
    const classes = ["point", model.pale && "pale", !within(model, limits) && "out", model === picked && "picked", model.baseline && "base"];
    const group = element("g", { class: classes.filter(Boolean).join(" "), "data-model": model.number }, svg);
    element("title", {}, group, `${model.name}: ${model.score.toFixed(4)}, ${model.mb === null ? "?" : model.mb.toFixed(1)} MB, ${model.ms.toFixed(1)} ms`);
    if (model.low !== null && model.high !== null) element("line", { x1: px, x2: px, y1: y(model.low), y2: y(model.high) }, group);
    element("circle", { cx: px, cy: py, r: model.baseline ? 4.5 : 5 }, group);
    const name = model.name.length > 26 ? `${model.name.slice(0, 25)}…` : model.name;
    const length = name.length * 6.4 + 4;
    const places = [];
    for (const offset of [4, -8, 16, -20, 28, -32, 40, -44]) for (const side of [1, -1]) places.push([side, py + offset]);
    const place = places.find(([side, at]) => {
      const start = side > 0 ? px + 9 : px - 9 - length;
      if (start < left || start + length > width + 4 || at < top + 6 || at > height - bottom - 2) return false;
      return taken.every(([from, to, middle]) => Math.abs(at - 4 - middle) > 11 || start > to || start + length < from);
    });
    const quiet = model !== picked && (!place || (model.pale && drawn.length > 9)); // shown under the pointer alone
    const [side, at] = (!quiet && place) || [px > width / 2 ? -1 : 1, py + 4];
    const start = side > 0 ? px + 9 : px - 9 - length;
    if (!quiet) taken.push([start, start + length, at - 4]);
    const anchor = side > 0 ? "start" : "end";
    element("text", { class: quiet ? "name quiet" : "name", x: px + side * 9, y: at, "text-anchor": anchor }, group, name);
  }
}

function show() {
  const limits = { mb: limitOf("mb"), ms: limitOf("ms") };
  for (const key of ["mb", "ms"]) {
    const unit = key.toUpperCase() === "MB" ? "MB" : "ms";
    byId(`${key}-value`).textContent = limits[key] === Infinity ? `any ${unit}` : `${limits[key].toFixed(1)} ${unit}`;
  }
  const picked = pick(limits);
  const line = byId("picked");
  line.replaceChildren();
  if (picked) {
    const name = document.createElement("strong");
    name.textContent = picked.name;
    const size = picked.mb === null ? "" : `, ${picked.mb.toFixed(1)} MB`;
    line.append("Picked: ", name, ` with ${data.metric} ${picked.score.toFixed(4)}${size}, ${picked.ms.toFixed(1)} ms`);
  } else {
    line.textContent = "No model is within these limits.";
  }
  for (const row of document.querySelectorAll("#models tbody tr")) {
    row.classList.toggle("chosen", picked !== undefined && row.dataset.model === String(picked.number));
  }
  draw(byId("by-mb"), "mb", limits, picked);
  draw(byId("by-ms"), "ms", limits, picked);
}

function near(event) {
  const of = event.target.closest?.("[data-model]");
  for (const point of document.querySelectorAll(".point")) {
    point.classList.toggle("near", of !== null && of !== undefined && point.dataset.model === of.dataset.model);
  }
}

for (const key of ["mb", "ms"]) byId(key).addEventListener("input", show);
document.addEventListener("pointerover", near);
addEventListener("resize", show);
show();

// --- worst rows -----------------------------------------------------------------------------------------------------

if (byId("worst")) {
  const select = byId("worst-model");
  let place = 0;
  const leaf = () => {
    const rows = data.worst[select.value];
    place = Math.min(Math.max(place, 0), rows.length - 1);
    const row = rows[place];
    byId("worst-place").textContent = `${place + 1} of ${rows.length}`;
    byId("worst-previous").disabled = place === 0;
    byId("worst-next").disabled = place === rows.length - 1;
    const facts = [
      ["Row", row.row.toLocaleString("en")],
      ["Label", row.label],
      [data.baseline, row.baseline, row.right],
      [select.value, row.prediction, row.correct],
      ["Divergence", row.divergence],
    ];
    byId("worst-facts").replaceChildren(...facts.filter((fact) => fact[1] !== null).flatMap(([term, text, right]) => {
      const group = document.createElement("div");
      const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
      dt.textContent = term;
      dd.textContent = right === undefined || right === null ? text : `${text} ${right ? "✓" : "✗"}`;
      if (right !== undefined && right !== null) dd.className = right ? "right" : "wrong";
      group.append(dt, dd);
      return [group];
    }));
    byId("worst-text").replaceChildren(...row.text.map((text) => {
      const paragraph = document.createElement("p");
      paragraph.textContent = text;
      return paragraph;
    }));
  };
  select.addEventListener("change", () => { place = 0; leaf(); });
  byId("worst-previous").addEventListener("click", () => { place -= 1; leaf(); });
  byId("worst-next").addEventListener("click", () => { place += 1; leaf(); });
  leaf();
}

// --- copies ---------------------------------------------------------------------------------------------------------

for (const button of document.querySelectorAll("[data-copy]")) {
  const label = button.textContent;
  button.addEventListener("click", () => {
    getSelection().selectAllChildren(byId(button.dataset.copy));
    document.execCommand("copy"); // navigator.clipboard is missing where a page is no secure context
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = label; }, 1500);
  });
}
