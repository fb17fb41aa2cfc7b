// The tasks, and the search among them as one types.

import { api, count, el, empty, entryLink, moment, plural, problem, score, taskAddress } from "./dom.js";

const ROWS = 200;
const PAUSE = 120;

/** Whether a text is a filter rather than a part of a name. */
export const isFilter = (text) => /[=<>]|\s(not\s+)?i?like\s*'|\s(not\s+)?in\s*\(|\sis\s+(not\s+)?null\b/i.test(text);

export async function showTasks(box, parts, query) {
  const tasks = await api("tasks");
  const status = el("p", { class: "status", role: "status" });
  const found = el("div", { class: "wide" });
  const input = el("input", {
    type: "search", id: "search", value: query.get("q") ?? "", autocomplete: "off", spellcheck: "false", "data-first": matchMedia("(hover: hover)").matches,
    autocapitalize: "off", placeholder: "Search", "aria-describedby": "search-help",
  });
  let asked = 0;
  let pause = 0;

  async function search() {
    const text = input.value.trim();
    const mine = ++asked;
    history.replaceState(null, "", text ? `#/?q=${encodeURIComponent(text)}` : "#/");
    if (!isFilter(text)) {
      const names = matching(tasks, text);
      status.textContent = text ? `${count(names.length)} of ${plural(tasks.length, "task")}` : plural(tasks.length, "task");
      found.replaceChildren(taskTable(names, text));
      return;
    }
    try {
      const page = await api("search", { filter: text, order_by: "created DESC", max_results: ROWS });
      if (mine !== asked) return;
      status.textContent = page.next_token ? `the newest ${plural(page.entries.length, "entry", "entries")}` : plural(page.entries.length, "entry", "entries");
      found.replaceChildren(entryTable(page.entries));
    } catch (error) {
      if (mine !== asked) return;
      status.textContent = "";
      found.replaceChildren(problem(error));
    }
  }

  input.addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(search, isFilter(input.value) ? PAUSE : 0);
  });
  box.append(
    el("h1", {}, "Tasks"),
    el("form", { class: "search", role: "search", onsubmit: (event) => { event.preventDefault(); search(); } },
      el("label", { for: "search", class: "hidden" }, "Search tasks and entries"),
      input,
      el("p", { id: "search-help" }, "A part of a task, stream, alias or tag; or a filter over all entries, such as ",
        example(input, search, "version > 1 AND alias = 'champion'"), " or ", example(input, search, "neurons >= 100"), "."),
    ),
    status,
    found,
  );
  await search();
}

function example(input, search, text) {
  const put = () => { input.value = text; input.focus(); search(); };
  return el("button", { type: "button", class: "example", onclick: put }, el("code", {}, text));
}

function matching(tasks, text) {
  const wanted = text.toLowerCase();
  if (!wanted) return tasks;
  return tasks.filter((task) =>
    [task.name, ...task.streams, ...Object.keys(task.aliases), ...task.tags].some((each) => each.toLowerCase().includes(wanted)));
}

function taskTable(tasks, text) {
  if (!tasks.length) {
    return text ? empty("Nothing is called that.") : empty("Nothing has been recorded yet. Learn a stream with ", el("code", {}, "neft run"), ".");
  }
  const rows = (some) => some.map((task) => row([
    ["task", el("a", { href: taskAddress(task.newest, task.base_model), class: "strong" }, task.name)],
    ["versions", count(task.versions), "number"],
    ["newest score", score(task.score), "number"],
    ["neurons", count(task.neurons), "number"],
    ["aliases", el("span", { class: "pills" }, Object.entries(task.aliases).map(([alias, version]) => pill(alias, `@${version}`)))],
    ["tags", el("span", { class: "pills" }, task.tags.map((tag) => pill(tag)))],
    ["streams", task.streams.join(", ")],
    ["base model", el("span", { title: task.base_model }, task.base_model_name)],
  ]));
  return table(["task", "versions", "newest score", "neurons", "aliases", "tags", "streams", "base model"], tasks, rows);
}

export function entryTable(entries) {
  if (!entries.length) return empty("No entry is so.");
  const rows = (some) => some.map((entry) => row([
    ["entry", entryLink(entry.reference, entry.base_model.fingerprint)],
    ["score", score(entry.metrics.scores?.[entry.task]), "number"],
    ["neurons", count(entry.neuron_count), "number"],
    ["parameters", count(entry.parameter_count), "number"],
    ["stream", entry.stream],
    ["built on", entry.parent ? entryLink(entry.parent, entry.base_model.fingerprint) : "the base model"],
    ["learnt", moment(entry.created_at)],
  ]));
  return table(["entry", "score", "neurons", "parameters", "stream", "built on", "learnt"], entries, rows);
}

export const pill = (name, note) => el("span", { class: "pill" }, name, note ? el("small", {}, note) : null);

const NUMBERS = new Set(["versions", "newest score", "score", "neurons", "parameters"]);

/** A table that turns into cards where it is narrow; long ones show their first rows until asked for all. */
function table(names, items, rows) {
  const body = el("tbody", {}, rows(items.slice(0, ROWS)));
  const head = el("tr", {}, names.map((name) => el("th", { scope: "col", class: NUMBERS.has(name) ? "number" : null }, name)));
  const made = el("table", { class: "cards" }, el("thead", {}, head), body);
  if (items.length <= ROWS) return made;
  const more = el("button", { type: "button", class: "more" }, `Show all ${count(items.length)}`);
  more.addEventListener("click", () => { body.append(...rows(items.slice(ROWS))); more.remove(); });
  return el("div", {}, made, more);
}

function row(cells) {
  const [[, first], ...others] = cells;
  return el("tr", {}, el("th", { scope: "row" }, first),
    others.map(([name, value, kind]) => el("td", { "data-name": name, class: kind }, value)));
}
