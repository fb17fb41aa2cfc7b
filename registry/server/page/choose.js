// Choosing a stream.

import { api, el, part } from "./dom.js";

/** The stream that the address names, or the first, and a list to choose another from. */
export async function chosenStream(view, query) {
  const streams = await api("streams");
  const named = query.get("stream");
  const stream = named ?? streams[0] ?? null;
  const choices = streams.map((each) => el("option", { value: each, selected: each === stream }, each));
  const go = (event) => { location.hash = `#/${view}?stream=${part(event.target.value)}`; };
  const list = el("label", { class: "choose" }, "Stream ", el("select", { onchange: go }, choices));
  return { stream, list: streams.length ? list : null };
}
