// The views, by the address after `#`.

import { problem } from "./dom.js";
import { showAtlas } from "./atlas.js";
import { showOverlaps } from "./overlaps.js";
import { showTask } from "./task.js";
import { showTasks } from "./tasks.js";

const VIEWS = { "": showTasks, atlas: showAtlas, overlaps: showOverlaps, task: showTask };
const NAMES = { "": "tasks" };
const main = document.getElementById("main");
let shown = 0;

function address() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [view = "", ...parts] = path.split("/").map((each) => {
    try {
      return decodeURIComponent(each);
    } catch {
      return each;
    }
  });
  return { view, parts, query: new URLSearchParams(query) };
}

async function show() {
  const mine = ++shown;
  const { view, parts, query } = address();
  const box = document.createElement("div");
  // A view that takes a moment says so; one that is there at once does not flicker.
  const waiting = setTimeout(() => mine === shown && main.setAttribute("aria-busy", "true"), 150);
  try {
    const make = VIEWS[view];
    if (!make) throw new Error(`there is no view ${view}; begin at Tasks`);
    await make(box, parts, query);
  } catch (error) {
    box.append(problem(error));
  }
  clearTimeout(waiting);
  if (mine !== shown) return;
  main.removeAttribute("aria-busy");
  main.replaceChildren(box);
  for (const link of document.querySelectorAll("nav a[data-view]")) {
    if (link.dataset.view === (NAMES[view] ?? view)) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const heading = box.querySelector("h1");
  document.title = heading ? `${heading.dataset.title ?? heading.textContent} - neft registry` : "neft registry";
  const first = box.querySelector("[data-first]");
  if (mine > 1 || first) (first ?? main).focus({ preventScroll: true });
  scrollTo(0, 0);
}

addEventListener("hashchange", show);
// The address after `#` says what is shown, so it must not change here.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, textarea");
  if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const search = document.querySelector("input[type=search]");
  if (search) {
    event.preventDefault();
    search.focus();
  } else location.hash = "#/";
});
show();
