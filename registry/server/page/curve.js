// The R curve: the score of one task after each task that was learnt.

import { el, score, svg } from "./dom.js";

const WIDTH = 420;
const HEIGHT = 180;
const LEFT = 38;
const RIGHT = 4;
const INSET = 18;
const TOP = 22;
const BOTTOM = 34;

/** A picture of one column of the R matrix, and the numbers it shows. */
export function curve(matrix, task) {
  const column = matrix.tasks.indexOf(task);
  const points = matrix.rows.map((row, learnt) => ({ learnt, value: row[column] })).filter(({ value }) => value !== null);
  const values = points.map(({ value }) => value);
  const low = Math.min(0, ...values);
  const high = Math.max(1, ...values);
  const x = (learnt) => LEFT + INSET + (learnt * (WIDTH - LEFT - RIGHT - 2 * INSET)) / Math.max(1, matrix.rows.length - 1);
  const y = (value) => TOP + ((high - value) * (HEIGHT - TOP - BOTTOM)) / (high - low);
  const after = (learnt) => (learnt === 0 ? "the untouched model" : `after ${matrix.tasks[learnt - 1]}`);
  const few = matrix.rows.length <= 12;
  const every = Math.ceil(matrix.rows.length / 12);

  const lines = [low, (low + high) / 2, high].map((value) => [
    svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
    svg("text", { class: "tick", x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, Number(value.toFixed(2)).toString()),
  ]);
  const ticks = matrix.rows.map((row, learnt) => (learnt % every && learnt !== column + 1 ? null
    : svg("text", { class: learnt === column + 1 ? "tick own" : "tick", x: x(learnt), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, String(learnt))));
  const own = column + 1 < matrix.rows.length
    ? svg("line", { class: "own", x1: x(column + 1), x2: x(column + 1), y1: TOP, y2: HEIGHT - BOTTOM }) : null;
  const marks = points.map(({ learnt, value }) => svg("circle", { class: learnt === column + 1 ? "own" : null, cx: x(learnt), cy: y(value), r: learnt === column + 1 ? 5 : 3.5 },
    svg("title", {}, `${after(learnt)}: ${score(value)}`)));
  const labels = few ? points.map(({ learnt, value }) => svg("text", { class: "value", x: x(learnt), y: y(value) - 9, "text-anchor": "middle" }, value.toFixed(2))) : [];
  const said = `Score of ${task}: ${points.map(({ learnt, value }) => `${after(learnt)} ${score(value)}`).join(", ")}`;
  const picture = svg("svg", { class: "curve", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": said },
    lines, own, svg("polyline", { points: points.map(({ learnt, value }) => `${x(learnt)},${y(value)}`).join(" ") }), marks, labels, ticks,
    svg("text", { class: "tick", x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, `tasks learnt; this one is number ${column + 1}`));
  const rows = points.map(({ learnt, value }) => el("tr", {}, el("td", { class: "number" }, String(learnt)), el("th", { scope: "row" }, after(learnt)), el("td", { class: "number" }, score(value))));
  return el("div", {}, picture, el("details", {}, el("summary", {}, "In numbers"), el("table", { class: "plain" }, el("tbody", {}, rows))));
}
