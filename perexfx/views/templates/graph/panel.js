"use strict";

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
    ["module", node.module], ["source", node.source], ["value", node.shape], ["reads", reads(node.parameters ?? [])], ["note", node.role === "rewritten" ? "" : node.note], ["node", node.id],
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
  cut: (node) => `between two segments: a ${node.label} here, for the clipped sums of sites with reweight`,
  number: () => "a size, or computed of sizes",
  unused: (node) => `${node.label}: the output does not depend on it`,
  culprit: (node) => `${node.label}: refused`,
  rewritten: (node) => `${node.label}: ${node.note}`,
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
  const heat = data.heat_maps.flatMap(heatMap);
  return [...refusals, element("p", { class: "soft" }, hint), facts([["sites", rows.length ? `${rows.length}` : ""], ...sums(rows)]), ...listOf(rows), ...heat];
}

function heatMap(map) {
  const table = element("table", { class: "heat" }, element("tr", {}, element("th"), ...map.columns.map((name) => element("th", { class: "number" }, name))));
  map.rows.forEach((name, row) => table.append(element("tr", {}, element("td", {}, name),
    ...map.cells[row].map((cell, at) => element("td", { class: "number", style: `background:${map.colors[row][at]};color:#14171a` }, cell)))));
  return [element("h3", {}, map.title), element("div", { class: "scroll" }, table), element("p", { class: "soft" }, map.caption)];
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
  const marks = [["clip", "clip", "clip node"], ["norm", "norm", "norm node"], ["format", "format", "memory format"], ["cut", "cut", "second run"], ["rewritten", "rewritten", "changed or added"], ["culprit", "clip", "refused"]];
  for (const [role, part, name] of marks) {
    if (roles.has(role)) entries.push(element("div", { class: "entry" }, element("i", { style: `background:${data.parts[part]}` }), name));
  }
  legend.replaceChildren(...entries);
}

function light(name) {
  state.lit = state.lit === name ? "" : name;
  showLegend();
  mark();
}
