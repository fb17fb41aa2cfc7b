// How tasks are told apart: a hue, a texture and a number, so that no one needs the hue.

import { el } from "./dom.js";

const HUES = 10;
const TEXTURES = 3;

/** The classes of the task at a place in the order of learning. */
export const classesOf = (place) => `hue${place % HUES} texture${place % TEXTURES}`;

/** The sign of a task: what its parts of a bar look like, with its number. */
export const swatch = (place) => el("span", { class: `swatch ${classesOf(place)}`, "aria-hidden": "true" }, el("b", {}, String(place + 1)));
