"use strict";

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
  if (!shown(node)) document.getElementById("everything").click();
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
for (const [id, key] of [["clip-edges", "clipEdges"], ["everything", "everything"]]) {
  document.getElementById(id).addEventListener("change", (event) => { state[key] = event.target.checked; draw(); });
}
window.addEventListener("resize", () => { for (const view of Object.values(views)) view.zoom?.resize(); });

Viz.instance().then((instance) => {
  viz = instance;
  if (data.depth === null) foldToFit();
  else foldTo(data.depth);
  const clipped = [...last.nodes.values()].filter((node) => node.role === "norm").length;
  state.clipEdges = clipped <= CLIPPED;
  document.getElementById("clip-edges").disabled = clipped > MOST_CLIPPED;
  document.getElementById("clip-edges").parentElement.title = clipped > MOST_CLIPPED ? `${clipped} edges are more than can be laid out` : "";
  document.getElementById("clip-edges").checked = state.clipEdges;
  if (!Object.keys(data.rows).length) document.getElementById("colors").hidden = true;
  if (!views.after) document.getElementById("clip-edges").parentElement.hidden = true;
  draw();
  showPanel();
  const [culprit] = [...last.nodes.values()].filter((node) => node.role === "culprit");
  if (culprit) go(culprit);
  document.body.dataset.ready = String(Math.round(performance.now()));
});
