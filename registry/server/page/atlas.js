// The atlas: layers down, kinds of sites across, each cell as full as its neurons are owned, and by which task.

import { api, count, el, empty, entryLink, part, plural, share, taskAddress } from "./dom.js";
import { chosenStream } from "./choose.js";
import { classesOf, swatch } from "./colours.js";

export async function showAtlas(box, parts, query) {
  let entry = query.get("entry");
  let base = query.get("base");
  let choice = null;
  if (entry === null) {
    const { stream, list } = await chosenStream("atlas", query);
    if (stream === null) {
      box.append(el("h1", {}, "Atlas"), empty("Nothing has been recorded yet."));
      return;
    }
    choice = list;
    ({ newest: entry, base_model: base } = await api(`streams/${part(stream)}`));
  }
  const capacity = await api(`entries/${part(entry)}/capacity`, { base_model: base });
  box.append(
    el("div", { class: "title" }, el("h1", { "data-title": `Atlas of ${capacity.entry}` }, "Atlas"), choice),
    el("p", { class: "lead" }, "Which task owns which neurons of the model as it stands after ", entryLink(capacity.entry, base),
      ": layers down, kinds of neurons across, each bar one site."),
    atlas(capacity, base),
  );
}

/** The layers and columns of a space: sites of one kind make a column, two where a model has an encoder and a decoder. */
function gridOf(sites) {
  const patternOf = (site) => site.site.split(".").map((each) => (/^\d+$/.test(each) ? "*" : each)).join(".");
  const patterns = [...new Set(sites.map(patternOf))];
  const kinds = patterns.map((pattern) => sites.find((site) => patternOf(site) === pattern).kind);
  const names = patterns.map((pattern, place) => (kinds.indexOf(kinds[place]) === kinds.lastIndexOf(kinds[place]) ? kinds[place] : pattern));
  const layers = [...new Set(sites.map((site) => site.layer))].sort((one, other) => one - other);
  const found = new Map(sites.map((site) => [`${patternOf(site)} ${site.layer}`, site]));
  return { names, layers, at: (column, layer) => found.get(`${patterns[column]} ${layer}`) };
}

function atlas(capacity, base) {
  const places = new Map(capacity.learnt.map((reference, place) => [reference, place]));
  const { names, layers, at } = gridOf(capacity.sites);
  const tip = el("div", { class: "tip", "aria-hidden": "true", hidden: true });
  const cells = [];
  const head = el("tr", {}, el("th", { scope: "col" }, "layer"), names.map((name, column) => {
    const sizes = new Set(layers.map((layer) => at(column, layer)?.size).filter((size) => size !== undefined));
    return el("th", { scope: "col" }, name, el("small", {}, ` ${[...sizes].map(count).join(", ")} neurons a site`));
  }));
  const rows = layers.map((layer, row) => {
    cells.push([]);
    return el("tr", {}, el("th", { scope: "row" }, String(layer)), names.map((name, column) => {
      const site = at(column, layer);
      if (site === undefined) return el("td");
      const cell = siteCell(site, places);
      cells[row][column] = cell;
      const open = () => showTip(tip, cell, site, places);
      const shut = () => { tip.hidden = true; };
      for (const [event, act] of [["mouseenter", open], ["focus", open], ["mouseleave", shut], ["blur", shut]]) cell.addEventListener(event, act);
      return cell;
    }));
  });
  const table = el("table", { class: `atlas${layers.length > 32 ? " dense" : ""}`, role: "grid", "aria-label": "Neurons owned, by layer and kind" },
    el("thead", {}, head), el("tbody", {}, rows));
  steer(table, cells);
  return el("div", { class: "atlas-view" },
    legend(capacity, places, base, table),
    el("p", { class: "hint" }, "Point at a bar, or reach it with Tab and the arrow keys, for its neurons."),
    el("div", { class: "wide" }, table), tip);
}

function siteCell(site, places) {
  const owners = Object.entries(site.owners);
  const owned = owners.map(([reference, neurons]) => `${reference} ${count(neurons)}`);
  const said = `layer ${site.layer}, ${site.kind}: ${owned.length ? owned.join(", ") : "no task"}; ${count(site.free)} of ${count(site.size)} free`;
  return el("td", { role: "gridcell", tabindex: "-1", "aria-label": said }, bar(owners, site.free, places));
}

/** A stacked bar of owners, as wide as each has neurons, and of what is free. */
export function bar(owners, free, places) {
  const made = el("div", { class: "bar" });
  for (const [reference, neurons] of owners) {
    const place = places.get(reference) ?? 0;
    const some = el("span", { class: classesOf(place), "data-place": place }, el("b", {}, String(place + 1)));
    some.style.flexGrow = neurons;
    made.append(some);
  }
  const rest = el("span", { class: "free" });
  rest.style.flexGrow = free;
  made.append(rest);
  return made;
}

function showTip(tip, cell, site, places) {
  const lines = Object.entries(site.owners).map(([reference, neurons]) =>
    el("li", {}, swatch(places.get(reference) ?? 0), el("span", {}, reference), el("b", {}, count(neurons)), el("i", {}, share(neurons / site.size))));
  const free = el("li", {}, el("span", { class: "swatch free" }), el("span", {}, "free"), el("b", {}, count(site.free)), el("i", {}, share(site.free / site.size)));
  tip.replaceChildren(el("strong", {}, site.site), el("ul", {}, lines, free));
  tip.hidden = false;
  const at = cell.getBoundingClientRect();
  const width = tip.offsetWidth;
  const left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8));
  const below = at.bottom + tip.offsetHeight + 12 < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? at.bottom + 6 : at.top - tip.offsetHeight - 6}px`;
}

/** One stop for the Tab key; the arrows go from cell to cell. */
function steer(table, cells) {
  const first = cells.flat().find((cell) => cell !== undefined);
  if (first) first.tabIndex = 0;
  table.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const row = cells.findIndex((each) => each.includes(event.target));
    if (event.key === "Escape") event.target.blur();
    if (!step || row < 0) return;
    const next = cells[row + step[0]]?.[cells[row].indexOf(event.target) + step[1]];
    event.preventDefault();
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

/** How much each task owns altogether; pointing at one fades the others. */
export function legend(capacity, places, base, table = null) {
  const totals = new Map(capacity.learnt.map((reference) => [reference, 0]));
  let size = 0;
  let free = 0;
  for (const site of capacity.sites) {
    size += site.size;
    free += site.free;
    for (const [reference, neurons] of Object.entries(site.owners)) totals.set(reference, (totals.get(reference) ?? 0) + neurons);
  }
  const items = [...totals].map(([reference, neurons]) => {
    const place = places.get(reference) ?? 0;
    const mark = (on) => () => {
      table?.classList.toggle("faded", on);
      for (const each of table?.querySelectorAll(`[data-place="${place}"]`) ?? []) each.classList.toggle("marked", on);
    };
    return el("li", { onmouseenter: mark(true), onmouseleave: mark(false), onfocusin: mark(true), onfocusout: mark(false) },
      swatch(place), el("a", { href: taskAddress(reference, base) }, reference), el("span", {}, `${count(neurons)}, ${share(neurons / size)}`));
  });
  const rest = el("li", {}, el("span", { class: "swatch free" }), el("span", { class: "word" }, "free"), el("span", {}, `${count(free)}, ${share(free / size)}`));
  return el("ul", { class: "legend", "aria-label": `Owners of ${plural(size, "neuron")}` }, items, rest);
}
