"use strict";

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
  const svg = viz.renderSVGElement(graphOf(side)); // before what is there is given up: a layout may fail
  view.zoom?.destroy();
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
