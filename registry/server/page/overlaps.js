// The overlap matrix of a stream: how many neurons each two of its tasks share.

import { api, count, el, empty, entryLink, part, plural } from "./dom.js";
import { chosenStream } from "./choose.js";

export async function showOverlaps(box, parts, query) {
  const { stream, list } = await chosenStream("overlaps", query);
  box.append(el("div", { class: "title" }, el("h1", { "data-title": stream ? `Overlaps of ${stream}` : "Overlaps" }, "Overlaps"), list));
  if (stream === null) {
    box.append(empty("Nothing has been recorded yet."));
    return;
  }
  const [matrix, { base_model: base }] = await Promise.all([api(`streams/${part(stream)}/overlaps`), api(`streams/${part(stream)}`)]);
  // Small overlaps should be told apart too, so the scale ends a little above the largest.
  const most = Math.max(0, ...matrix.iou.flatMap((row, place) => row.filter((_, column) => column !== place)));
  const top = [0.1, 0.2, 0.5].find((end) => most <= end) ?? 1;
  const detail = el("div", { class: "detail", role: "status" }, el("p", { class: "hint" }, "Choose a cell to see in which sites the two tasks meet."));
  box.append(
    el("p", { class: "lead" }, "How alike the neurons of each two tasks are: the intersection over the union of their sets, and how many neurons both have. The diagonal holds the size of each set."),
    el("div", { class: "wide" }, grid(matrix, top, base, detail)),
    el("p", { class: "scale", "aria-hidden": "true" }, "0", el("span"), String(top)),
    detail,
  );
}

function grid(matrix, top, base, detail) {
  const names = matrix.entries;
  const head = el("tr", {}, el("td"), names.map((name, place) => el("th", { scope: "col", title: name }, el("span", {}, String(place + 1)))));
  const rows = names.map((first, row) => el("tr", {},
    el("th", { scope: "row" }, el("small", {}, String(row + 1)), entryLink(first, base)),
    names.map((second, column) => el("td", {}, row === column
      ? el("span", { class: "own", title: `${first} has ${plural(matrix.sizes[row], "neuron")}` }, count(matrix.sizes[row]))
      : cell(first, second, matrix.iou[row][column], matrix.shared[row][column], top, base, detail)))));
  return el("table", { class: "heat" }, el("thead", {}, head), el("tbody", {}, rows));
}

function cell(first, second, iou, shared, top, base, detail) {
  const said = `${first} and ${second} share ${plural(shared, "neuron")}, IoU ${iou.toFixed(3)}`;
  const made = el("button", { type: "button", title: said, "aria-label": said, class: shared === 0 ? "none" : null },
    el("b", {}, iou.toFixed(2)), el("small", {}, count(shared)));
  made.style.setProperty("--heat", (iou / top).toFixed(3));
  made.addEventListener("click", () => showPair(detail, first, second, base));
  return made;
}

async function showPair(detail, first, second, base) {
  const overlap = await api("overlap", { first, second, base_model: base });
  const sites = Object.entries(overlap.sites).sort((one, other) => other[1] - one[1]);
  const most = Math.max(1, ...sites.map(([, neurons]) => neurons));
  const rows = sites.map(([site, neurons]) => {
    const meter = el("span", { class: "meter", "aria-hidden": "true" }, el("span"));
    meter.firstChild.style.width = `${(100 * neurons) / most}%`;
    return el("tr", {}, el("th", { scope: "row" }, site), el("td", { class: "number" }, count(neurons)), el("td", {}, meter));
  });
  detail.replaceChildren(
    el("h2", {}, entryLink(first, base), " and ", entryLink(second, base)),
    el("p", {}, `Both own ${plural(overlap.shared, "neuron")}; ${count(overlap.only_first)} are the first one's alone, ${count(overlap.only_second)} the second one's. IoU ${overlap.iou.toFixed(4)}.`),
    rows.length ? el("table", { class: "plain" }, el("tbody", {}, rows)) : "",
  );
}
