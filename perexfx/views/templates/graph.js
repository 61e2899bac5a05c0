"use strict";

// The data are the drawing. What follows decides what is folded, lets Graphviz lay the rest out, and shows what is chosen.

const data = JSON.parse(document.getElementById("data").textContent);
const READABLE = 26; // nodes of a graph that are shown when the page opens, unless a depth is asked for
const CLIPPED = 14; // norm nodes, up to which the edges of the clip node are shown when the page opens

// Graphviz takes texts to be as wide as in Arial. Where the page has a wider font, it is told a larger size.
const SIZE = 11;
const LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789";
const WIDTH_IN_ARIAL = 18.286; // of those, in ems
const FONT = 'Arial, Helvetica, "Liberation Sans", sans-serif';

function laidOutSize() {
  const context = document.createElement("canvas").getContext("2d");
  context.font = `100px ${FONT}`;
  return SIZE * Math.max(1, context.measureText(LETTERS).width / 100 / WIDTH_IN_ARIAL);
}

const state = { folded: new Set(), chosen: "", mode: "strategy", lit: "", clipEdges: false, numbers: false };
const views = {}; // side -> { nodes by id, canvas, zoom }
const fontSize = laidOutSize();
let viz;

for (const [side, graph] of Object.entries(data.sides)) {
  views[side] = {
    nodes: new Map(graph.nodes.map((node) => [node.id, node])),
    edges: graph.edges,
    canvas: document.querySelector(`#${side} .canvas`),
  };
}
const last = views.after ?? views.before;

// Folding

const shown = (node) => state.numbers || node.role !== "number";
const ofSite = (node) => node.role === "site" ? data.rows[node.site] : undefined;
const representative = (node) => {
  const box = node.modules.find((path) => state.folded.has(path));
  return box === undefined ? node.id : `/${box}`;
};

function foldTo(depth) {
  state.folded = new Set(Object.keys(data.boxes).filter((path) => levelOf(path) >= depth));
}

const levels = new Map();
for (const node of last.nodes.values()) node.modules.forEach((path, at) => levels.set(path, at));
const levelOf = (path) => levels.get(path) ?? 0;

function foldToFit() {
  const deepest = Math.max(0, ...[...levels.values()].map((at) => at + 1));
  for (let depth = deepest; depth > 0; depth -= 1) {
    foldTo(depth);
    if (new Set([...last.nodes.values()].filter(shown).map(representative)).size <= READABLE) return;
  }
  foldTo(0);
}

// Colours

const value = { seconds: (row) => row.seconds, bytes: (row) => row.bytes_held };
const sumOf = (rows, mode) => rows.reduce((sum, row) => sum + value[mode](row), 0);
let largest = 0; // of what is drawn, by the mode

function measureLargest() {
  const rows = new Map();
  for (const node of last.nodes.values()) if (ofSite(node)) rows.set(representative(node), [...rows.get(representative(node)) ?? [], ofSite(node)]);
  largest = state.mode === "strategy" ? 0 : Math.max(1e-30, ...[...rows.values()].map((some) => sumOf(some, state.mode)));
}
const hot = { seconds: [232, 89, 12], bytes: [59, 91, 219] };

function heat(mode, share) {
  const part = Math.sqrt(Math.min(1, share));
  const mixed = hot[mode].map((end) => Math.round(255 + (end - 255) * part));
  return `#${mixed.map((part) => part.toString(16).padStart(2, "0")).join("")}`;
}

const isDark = (mode, share) => Math.sqrt(share) > (mode === "bytes" ? 0.55 : 0.85);

function colorsOf(rows) {
  if (!rows.length) return {};
  if (state.mode !== "strategy") {
    const share = sumOf(rows, state.mode) / largest;
    return { fillcolor: heat(state.mode, share), fontcolor: isDark(state.mode, Math.min(1, share)) ? "#ffffff" : "#1b1f24" };
  }
  const parts = new Map();
  for (const row of rows) parts.set(row.strategy, (parts.get(row.strategy) ?? 0) + row.seconds);
  const color = (name) => data.colors[name] ?? data.colors[""];
  const total = [...parts.values()].reduce((a, b) => a + b, 0);
  if (parts.size === 1 || !total) return { fillcolor: color(rows[0].strategy) };
  const stripes = [...parts].map(([name, seconds]) => `${color(name)};${(seconds / total).toFixed(4)}`);
  return { fillcolor: stripes.join(":"), style: "striped" };
}

// What Graphviz is given

function graphOf(side) {
  const view = views[side];
  const root = { nodes: [], subgraphs: [], boxes: new Map() };
  const members = new Map();
  const nodes = [];
  const boxAt = (path, within) => {
    if (!within.boxes.has(path)) {
      const box = {
        name: `cluster_${path}`, nodes: [], subgraphs: [], boxes: new Map(),
        graphAttributes: {
          id: `${side}|/${path}`, label: `  ▾ ${titleOf(path)}  `, labeljust: "l", fontsize: fontSize, fontcolor: "#667085",
          style: "rounded,filled", fillcolor: "#f7f8fa", color: "#d0d5dd",
        },
      };
      within.boxes.set(path, box);
      within.subgraphs.push(box);
    }
    return within.boxes.get(path);
  };
  for (const node of view.nodes.values()) {
    if (!shown(node)) continue;
    const name = representative(node);
    if (members.has(name)) { members.get(name).push(node); continue; }
    members.set(name, [node]);
    let within = root;
    for (const path of node.modules) {
      if (state.folded.has(path)) break;
      within = boxAt(path, within);
    }
    within.nodes.push({ name });
  }
  for (const [name, inside] of members) nodes.push({ name, attributes: attributesOf(side, name, inside) });
  const edges = new Map();
  for (const [source, target, kind] of view.edges) {
    const [from, to] = [view.nodes.get(source), view.nodes.get(target)];
    if (!from || !to || !shown(from) || !shown(to)) continue;
    const [tail, head] = [representative(from), representative(to)];
    const isFanOut = kind === "clip" && from.role === "clip";
    if (tail === head || (isFanOut && !state.clipEdges)) continue;
    const how = isFanOut ? { weight: 0 } : { minlen: 0 }; // a norm node stands beside its site
    const attributes = kind === "clip" ? { color: "#e5484d", style: "dashed", ...how } : { weight: 8 };
    if (!edges.has(`${tail}\n${head}`)) edges.set(`${tail}\n${head}`, { tail, head, attributes });
  }
  return {
    directed: true,
    graphAttributes: { nodesep: 0.25, ranksep: 0.32, bgcolor: "transparent", pad: 0.15 },
    nodeAttributes: { fontname: "Arial", fontsize: fontSize, shape: "box", style: "filled,rounded", margin: "0.14,0.07", height: 0.32 },
    edgeAttributes: { color: "#8a93a2", arrowsize: 0.6 },
    nodes: [...root.nodes, ...nodes],
    edges: [...edges.values()],
    subgraphs: plain(root.subgraphs),
  };
}

const plain = (boxes) => boxes.map(({ name, nodes, subgraphs, graphAttributes }) =>
  ({ name, nodes, subgraphs: plain(subgraphs), graphAttributes: { fontname: "Arial", ...graphAttributes } }));

const titleOf = (path) => data.boxes[path] ? `${path} (${data.boxes[path]})` : path;
const ms = (seconds) => (seconds * 1e3).toFixed(seconds < 1e-3 ? 3 : 2);
const mb = (bytes) => (bytes / 1e6).toFixed(2);

function attributesOf(side, name, inside) {
  const id = `${side}|${name}`;
  if (name.startsWith("/")) {
    const rows = inside.map(ofSite).filter(Boolean);
    const sum = rows.reduce((total, row) => total + row.seconds, 0);
    const sites = `${rows.length} ${rows.length === 1 ? "site" : "sites"}`;
    const culprit = inside.some((node) => node.role === "culprit");
    return {
      id, label: ` ▸ ${titleOf(name.slice(1))}${rows.length ? `\n${sites}, ${ms(sum)} ms` : ""}`, penwidth: 1.6,
      fillcolor: culprit ? "#e5484d" : "#eef1f6", fontcolor: culprit ? "#ffffff" : "#1b1f24", color: "#667085", ...colorsOf(rows),
    };
  }
  const [node] = inside;
  const { shape, fill, border, ink, lines } = node.style;
  const row = ofSite(node);
  return { id, label: lines.join("\n"), shape, fillcolor: fill, color: border, fontcolor: ink, ...(row ? colorsOf([row]) : {}) };
}

// Drawing

function draw(anchor = "") {
  measureLargest();
  for (const side of Object.keys(views)) drawSide(side, anchor);
  showLegend();
  mark();
}

const elementOf = (side, name) => document.getElementById(`${side}|${name}`);

function drawSide(side, anchor) {
  const view = views[side];
  const before = view.zoom && anchor ? placeOf(side, anchor) : undefined;
  const zoom = view.zoom?.getSizes().realZoom;
  const pan = view.zoom?.getPan();
  view.zoom?.destroy();
  const svg = viz.renderSVGElement(graphOf(side));
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${side} the rewrite`);
  svg.removeAttribute("width");
  svg.removeAttribute("height");
  for (const title of svg.querySelectorAll("title")) title.remove(); // else browsers show internal names as tooltips
  view.canvas.replaceChildren(svg);
  view.zoom = svgPanZoom(svg, { dblClickZoomEnabled: false, minZoom: 0.02, maxZoom: 200, fit: true, center: true });
  if (zoom === undefined) return start(view);
  view.zoom.zoom(zoom / (view.zoom.getSizes().realZoom / view.zoom.getZoom()));
  view.zoom.pan(pan);
  const after = anchor ? placeOf(side, anchor) : undefined;
  if (before && after) view.zoom.panBy({ x: before.left + before.width / 2 - (after.left + after.width / 2), y: before.top - after.top });
}

function placeOf(side, name) { // in the pane, by the zoom and pan that were asked for: the screen follows a frame later
  const element = elementOf(side, name);
  if (!element) return undefined;
  const { zoom } = views[side];
  const { e: dx, f: dy } = element.ownerSVGElement.querySelector(".svg-pan-zoom_viewport").getCTM().inverse().multiply(element.getCTM());
  const box = element.getBBox();
  const [scale, pan] = [zoom.getSizes().realZoom, zoom.getPan()];
  return { left: (box.x + dx) * scale + pan.x, top: (box.y + dy) * scale + pan.y, width: box.width * scale, height: box.height * scale };
}

function start(view) { // as wide as the pane where that can be read, from the top
  const { width, height, realZoom, viewBox } = view.zoom.getSizes();
  const wanted = Math.min(1.15 * 4 / 3, Math.max(realZoom, Math.min(width / viewBox.width, 4 / 3)));
  view.zoom.zoom(view.zoom.getZoom() * wanted / realZoom);
  const tall = viewBox.height * wanted;
  view.zoom.pan({ x: (width - viewBox.width * wanted) / 2, y: tall < height ? (height - tall) / 2 : 0 });
}

function showElement(side, name) { // moves a pane only where it must
  const place = placeOf(side, name);
  if (!place) return;
  const { width, height } = views[side].zoom.getSizes();
  const isInside = place.left >= 0 && place.top >= 0 && place.left + place.width <= width && place.top + place.height <= height;
  if (isInside) return;
  const top = place.height > height ? 10 : (height - place.height) / 2;
  views[side].zoom.panBy({ x: width / 2 - (place.left + place.width / 2), y: top - place.top });
}

// Choosing

function counterpart(side, name) { // what a chosen node is on one side
  if (name.startsWith("/")) return elementOf(side, name) ? name : folding(name.slice(1));
  const nodes = views[side].nodes;
  const node = nodes.get(name) ?? [...nodes.values()].find((other) => other.site && other.site === siteOf(name) && other.role !== "norm");
  return node ? representative(node) : "";
}

const siteOf = (id) => Object.values(views).map((view) => view.nodes.get(id)?.site).find(Boolean) ?? "";
const folding = (path) => {
  const outer = [...state.folded].find((other) => path === other || path.startsWith(`${other}.`));
  return outer ? `/${outer}` : "";
};

function choose(name, { still = [] } = {}) { // sides that stay still are those where it was clicked
  state.chosen = name;
  mark();
  const moving = Object.keys(views).filter((side) => name && !still.includes(side));
  for (const side of moving) showElement(side, counterpart(side, name));
  showPanel();
}

function mark() {
  for (const element of document.querySelectorAll(".chosen, .lit")) element.classList.remove("chosen", "lit");
  for (const [side, view] of Object.entries(views)) {
    if (state.chosen) elementOf(side, counterpart(side, state.chosen))?.classList.add("chosen");
    view.canvas.classList.toggle("dims", Boolean(state.lit));
    if (!state.lit) continue;
    for (const node of view.nodes.values()) {
      const row = node.site ? data.rows[node.site] : undefined;
      if (row?.strategy === state.lit) elementOf(side, representative(node))?.classList.add("lit");
    }
  }
}

function toggle(path) {
  if (state.folded.has(path)) state.folded.delete(path);
  else state.folded.add(path);
  draw(`/${path}`);
  choose(`/${path}`, { still: Object.keys(views) });
}

function unfoldDownTo(node) {
  const closed = node.modules.filter((path) => state.folded.has(path));
  for (const path of closed) state.folded.delete(path);
  if (closed.length) draw();
}

// The panel

const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [key, given] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), given);
    else made.setAttribute(key, given);
  }
  made.append(...children.filter((child) => child !== undefined && child !== ""));
  return made;
};
const chip = (name, how = "") =>
  element("span", { class: `chip ${how}`, style: `background:${data.colors[name] ?? data.colors[""]}` }, name);

function facts(pairs) {
  const list = element("dl");
  for (const [name, given] of pairs) if (given) list.append(element("dt", {}, name), element("dd", {}, given));
  return list;
}

function showPanel() {
  const panel = document.getElementById("panel");
  panel.replaceChildren(...contents());
  panel.dataset.chosen = state.chosen;
}

function contents() {
  if (!state.chosen) return overview();
  if (state.chosen.startsWith("/")) return ofModule(state.chosen.slice(1));
  const node = last.nodes.get(state.chosen) ?? views.before.nodes.get(state.chosen);
  const row = node.site ? data.rows[node.site] : undefined;
  const heading = [element("h3", {}, node.site || node.label), element("div", { class: "soft" }, words[node.role]?.(node) ?? node.label)];
  const place = [
    ["module", node.module], ["source", node.source], ["value", node.shape], ["reads", reads(node.parameters ?? [])], ["node", node.id],
  ];
  const refusal = node.refusal ? [element("div", { class: "refusal" }, node.refusal)] : [];
  if (!row) return [...heading, ...refusal, facts(place)];
  return [...heading, ...refusal, ...ofRow(row), facts(place)];
}

function reads(parameters) {
  if (parameters.length <= 8) return parameters.join(", ");
  return element("details", {}, element("summary", {}, `${parameters.length} parameters`), parameters.join(", "));
}

const words = {
  site: (node) => `per-example ${node.label}`,
  norm: (node) => `norm node of ${node.site}: its gradient is the squared norms`,
  clip: () => "clip node: hands out the parameters; its backward clips and returns their sums",
  format: () => "conversion of the memory format",
  number: () => "a size, or computed of sizes",
  culprit: (node) => `${node.label}: refused`,
};

function ofRow(row) {
  const made = [facts([
    ["strategy", chip(row.strategy)], ["kind", `${row.kind}, ${row.shapes}`], ["predicted", `${ms(row.seconds)} ms, ${mb(row.bytes_held)} MB held`],
    ["ordinary", `${ms(row.ordinary_seconds)} ms for the gradient`],
    ["measured", row.measured_seconds === null ? "" : `${ms(row.measured_seconds)} ms`], ["note", row.misfit],
  ])];
  for (const choice of row.choices) {
    const table = element("table", { class: "options" }, element("caption", { class: "soft", style: "text-align:left" }, `${choice.operand}: ${choice.shapes}${choice.reason ? `; ${choice.reason}` : ""}`));
    for (const option of choice.options) {
      table.append(element("tr", { "data-status": option.status },
        element("td", {}, chip(option.strategy, option.status === "refused" ? "outlined" : "")),
        element("td", { class: "number" }, option.seconds === null ? "" : `${ms(option.seconds)} ms`),
        element("td", { class: option.status === "chosen" ? "" : "soft" }, option.status === "chosen" ? "chosen" : option.why)));
    }
    made.push(table);
  }
  return made;
}

function ofModule(path) {
  const inside = [...last.nodes.values()].filter((node) => node.modules.includes(path));
  const rows = inside.map(ofSite).filter(Boolean);
  const isFolded = state.folded.has(path);
  return [
    element("h3", {}, path), element("div", { class: "soft" }, data.boxes[path] ?? ""),
    element("p", {}, element("button", { id: "toggle", onclick: () => toggle(path) }, isFolded ? "unfold" : "fold")),
    facts([["nodes", `${inside.length}`], ["sites", `${rows.length}`], ...sums(rows)]),
    ...listOf(rows),
  ];
}

function sums(rows) {
  if (!rows.length) return [];
  const total = (key) => rows.reduce((sum, row) => sum + row[key], 0);
  return [["predicted", `${ms(total("seconds"))} ms, ${mb(total("bytes_held"))} MB held`], ["ordinary", `${ms(total("ordinary_seconds"))} ms for the gradients`]];
}

function listOf(rows) { // the dearest first
  if (!rows.length) return [];
  const table = element("table", {});
  for (const row of [...rows].sort((a, b) => b.seconds - a.seconds).slice(0, 12)) {
    table.append(element("tr", { style: "cursor:pointer", onclick: () => go(nodeOf(row.site)) },
      element("td", { class: "mono" }, row.site), element("td", {}, chip(row.strategy)), element("td", { class: "number" }, `${ms(row.seconds)} ms`)));
  }
  return [element("div", { class: "soft" }, rows.length > 12 ? "the dearest sites" : "sites"), table];
}

const nodeOf = (site) => [...last.nodes.values()].find((node) => node.role === "site" && node.site === site);

function overview() {
  const rows = Object.values(data.rows);
  const refusals = data.refusals.map((text) => element("div", { class: "refusal" }, text));
  const hint = "Click a node for its row of the report; double-click a module to fold or unfold it; drag and scroll to move.";
  return [...refusals, element("p", { class: "soft" }, hint), facts([["sites", rows.length ? `${rows.length}` : ""], ...sums(rows)]), ...listOf(rows)];
}

// The legend

function showLegend() {
  const legend = document.getElementById("legend");
  if (state.mode !== "strategy") {
    const unit = state.mode === "seconds" ? `${ms(largest)} ms` : `${mb(largest)} MB`;
    const gradient = [0, 0.06, 0.25, 0.56, 1].map((share) => heat(state.mode, share)).join(",");
    legend.replaceChildren(element("div", { class: "soft" }, state.mode === "seconds" ? "predicted time of a site or module" : "predicted memory held by a site or module"),
      element("div", { class: "scale", style: `background:linear-gradient(90deg,${gradient})` }), element("div", { class: "ends" }, element("span", {}, "0"), element("span", {}, unit)));
    return;
  }
  const entries = data.strategies.map((name) => {
    const rows = Object.values(data.rows).filter((row) => row.strategy === name);
    const sum = rows.reduce((total, row) => total + row.seconds, 0);
    return element("button", { class: "entry", "data-strategy": name, "aria-pressed": String(state.lit === name), onclick: () => light(name) },
      element("i", { style: `background:${data.colors[name] ?? data.colors[""]}` }), name, element("span", {}, `${rows.length} · ${ms(sum)} ms`));
  });
  const roles = new Set([...last.nodes.values()].map((node) => node.role));
  const marks = [["clip", "#e5484d", "clip node"], ["norm", "#f7c9cc", "norm node"], ["format", "#e6e0f8", "memory format"], ["culprit", "#e5484d", "refused"]];
  for (const [role, color, name] of marks) {
    if (roles.has(role)) entries.push(element("div", { class: "entry" }, element("i", { style: `background:${color}` }), name));
  }
  legend.replaceChildren(...entries);
}

function light(name) {
  state.lit = state.lit === name ? "" : name;
  showLegend();
  mark();
}

// Search

const search = document.getElementById("search");
const found = document.getElementById("found");

function matching(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return [];
  const parts = (node) => [node.site, node.id, node.label, node.module, node.source, ...(node.role === "clip" ? [] : node.parameters ?? [])];
  const says = (node) => parts(node).some((part) => part?.toLowerCase().includes(wanted));
  const isIt = (match) => match.name.toLowerCase() === wanted && match.kind !== "norm";
  const boxes = Object.keys(data.boxes).filter((path) => path.toLowerCase().includes(wanted)).map((path) => ({ path, name: path, kind: "module" }));
  const nodes = [...last.nodes.values()].filter(says).map((node) => ({ node, name: node.site || node.id, kind: node.label }));
  const all = [...boxes, ...nodes.filter((match) => match.kind !== "norm"), ...nodes.filter((match) => match.kind === "norm")];
  return [...all.filter(isIt), ...all.filter((match) => !isIt(match))];
}

function showFound() {
  const all = matching(search.value);
  found.hidden = !search.value.trim();
  found.replaceChildren(...all.slice(0, 40).map((match, at) =>
    element("li", { class: at ? "" : "first", onmousedown: (event) => { event.preventDefault(); take(match); } }, element("span", { class: "mono" }, match.name), element("span", { class: "soft" }, match.kind))));
  if (!all.length) found.replaceChildren(element("li", { class: "soft" }, "nothing found"));
  if (all.length > 40) found.append(element("li", { class: "soft" }, `and ${all.length - 40} more`));
}

function take(match) {
  found.hidden = true;
  if (match.node) return go(match.node);
  unfoldDownTo({ modules: Object.keys(data.boxes).filter((path) => match.path.startsWith(`${path}.`)) });
  choose(`/${match.path}`);
}

function go(node) {
  if (!shown(node)) document.getElementById("numbers").click();
  unfoldDownTo(node);
  choose(node.id);
}

// Events

search.addEventListener("input", showFound);
search.addEventListener("focus", showFound);
search.addEventListener("blur", () => { found.hidden = true; });
search.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { search.value = ""; found.hidden = true; }
  const [first] = event.key === "Enter" ? matching(search.value) : [];
  if (first) take(first);
});

const nameOf = (event) => event.target.closest(".node, .cluster")?.id.replace(/^(before|after)\|/, "") ?? "";
let pressed;
for (const [side, { canvas }] of Object.entries(views)) {
  canvas.addEventListener("mousedown", (event) => { pressed = [event.clientX, event.clientY]; }, true);
  canvas.addEventListener("click", (event) => {
    const moved = pressed && Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) > 4;
    if (!moved) choose(nameOf(event), { still: [side] });
  });
  canvas.addEventListener("dblclick", (event) => {
    const name = nameOf(event);
    if (name.startsWith("/")) toggle(name.slice(1));
  });
}
for (const button of document.querySelectorAll("#colors button")) {
  button.addEventListener("click", () => {
    state.mode = button.dataset.mode;
    state.lit = "";
    for (const other of document.querySelectorAll("#colors button")) other.setAttribute("aria-pressed", String(other === button));
    draw();
  });
}
const refit = () => { for (const view of Object.values(views)) { view.zoom?.destroy(); view.zoom = undefined; } draw(); };
document.getElementById("fold-all").addEventListener("click", () => { foldTo(0); refit(); });
document.getElementById("unfold-all").addEventListener("click", () => { state.folded.clear(); refit(); });
for (const [id, key] of [["clip-edges", "clipEdges"], ["numbers", "numbers"]]) {
  document.getElementById(id).addEventListener("change", (event) => { state[key] = event.target.checked; draw(); });
}
window.addEventListener("resize", () => { for (const view of Object.values(views)) view.zoom?.resize(); });

Viz.instance().then((instance) => {
  viz = instance;
  if (data.depth === null) foldToFit();
  else foldTo(data.depth);
  state.clipEdges = [...last.nodes.values()].filter((node) => node.role === "norm").length <= CLIPPED;
  document.getElementById("clip-edges").checked = state.clipEdges;
  if (!Object.keys(data.rows).length) document.getElementById("colors").hidden = true;
  if (!views.after) document.getElementById("clip-edges").parentElement.hidden = true;
  draw();
  showPanel();
  const [culprit] = [...last.nodes.values()].filter((node) => node.role === "culprit");
  if (culprit) go(culprit);
  document.body.dataset.ready = String(Math.round(performance.now()));
});
