"use strict";

// The data are the drawing. What follows decides what is folded, lets Graphviz lay the rest out, and shows what is chosen.

const data = JSON.parse(document.getElementById("data").textContent);
const READABLE = 26; // nodes of a graph that are shown when the page opens, unless a depth is asked for
const MOST_CLIPPED = 80; // norm nodes, up to which these edges can be asked for: the layout takes minutes beyond
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

const state = { folded: new Set(), chosen: "", mode: "strategy", lit: "", clipEdges: false, everything: false };
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

const shown = (node) => state.everything || !["number", "unused"].includes(node.role);
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
    return { fillcolor: heat(state.mode, share), fontcolor: isDark(state.mode, Math.min(1, share)) ? "#ffffff" : data.parts.ink };
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
          id: `${side}|/${path}`, label: escaped(`  ▾ ${titleOf(path)}  `), labeljust: "l", fontsize: fontSize, fontcolor: data.parts.soft,
          style: "rounded,filled", fillcolor: data.parts.box, color: data.parts.frame,
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
    const attributes = kind === "clip" ? { color: data.parts.clip, style: "dashed", ...how } : { weight: 8 };
    if (!edges.has(`${tail}\n${head}`)) edges.set(`${tail}\n${head}`, { tail, head, attributes });
  }
  return {
    directed: true,
    graphAttributes: { nodesep: 0.25, ranksep: 0.32, bgcolor: "transparent", pad: 0.15 },
    nodeAttributes: { fontname: "Arial", fontsize: fontSize, shape: "box", style: "filled,rounded", margin: "0.14,0.07", height: 0.32 },
    edgeAttributes: { color: data.parts.edge, arrowsize: 0.6 },
    nodes: [...root.nodes, ...nodes],
    edges: [...edges.values()],
    subgraphs: plain(root.subgraphs),
  };
}

const plain = (boxes) => boxes.map(({ name, nodes, subgraphs, graphAttributes }) =>
  ({ name, nodes, subgraphs: plain(subgraphs), graphAttributes: { fontname: "Arial", ...graphAttributes } }));

const titleOf = (path) => data.boxes[path] ? `${path} (${data.boxes[path]})` : path;
const escaped = (text) => text.replaceAll("&", "&amp;"); // Graphviz reads entities
const ms = (seconds) => (seconds * 1e3).toFixed(seconds < 1e-3 ? 3 : 2);
const mb = (bytes) => bytes && bytes < 500 ? "<0.001" : (bytes / 1e6).toFixed(bytes && bytes < 1e5 ? 3 : 2);

function attributesOf(side, name, inside) {
  const id = `${side}|${name}`;
  if (name.startsWith("/")) {
    const rows = inside.map(ofSite).filter(Boolean);
    const sum = rows.reduce((total, row) => total + row.seconds, 0);
    const sites = `${rows.length} ${rows.length === 1 ? "site" : "sites"}`;
    const culprit = inside.some((node) => node.role === "culprit");
    return {
      id, label: escaped(` ▸ ${titleOf(name.slice(1))}${rows.length ? `\n${sites}, ${ms(sum)} ms` : ""}`), penwidth: 1.6,
      fillcolor: culprit ? data.parts.clip : data.parts.folded, fontcolor: culprit ? "#ffffff" : data.parts.ink, color: data.parts.soft, ...colorsOf(rows),
    };
  }
  const [node] = inside;
  const { shape, fill, border, ink, lines } = node.style;
  const row = ofSite(node);
  return { id, label: escaped(lines.join("\n")), shape, fillcolor: fill, color: border, fontcolor: ink, ...(row ? colorsOf([row]) : {}) };
}
