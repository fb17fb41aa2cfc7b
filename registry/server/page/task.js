// One entry of a task: what was recorded of it, and how it stands among the others.

import { api, count, el, empty, entryLink, moment, number, part, score, share, taskAddress } from "./dom.js";
import { bar, legend } from "./atlas.js";
import { curve } from "./curve.js";
import { pill } from "./tasks.js";

const PATIENCE = 400;

export async function showTask(box, [reference = ""], query) {
  const asked = { base_model: query.get("base") };
  const entry = await api(`entries/${part(reference)}`, asked);
  const base = entry.base_model.fingerprint;
  const of = (what, parameters = {}) => api(`entries/${part(entry.reference)}/${what}`, { base_model: base, ...parameters });
  const [health, run] = await Promise.all([api("health"), api(`streams/${part(entry.stream)}/curve`).catch(() => null)]);

  box.append(
    el("p", { class: "crumbs" }, el("a", { href: "#/" }, "Tasks"), " / ", entry.task),
    el("div", { class: "title" },
      el("h1", { "data-title": entry.reference }, entry.task, el("span", { class: "version" }, `@${entry.version}`)),
      el("span", { class: "pills" }, entry.aliases.map((alias) => pill(alias)), Object.entries(entry.tags).map(([key, value]) => pill(`${key}=${value}`)))),
    facts(entry, base, links(entry, health.links, run)),
    el("div", { class: "sections" },
      section("R curve", () => rCurve(entry, run), "The score on this task after each task that its stream has learnt."),
      section("Versions", async () => versions(await api(`tasks/${part(entry.task)}`, { base_model: base }), entry, base)),
      section("Capacity", async () => capacity(await of("capacity"), entry, base)),
      section("Lineage", async () => lineage(await of("lineage"), entry, base)),
      section("Most important neurons", async () => strongest(await of("strongest", { k: 12 })), "By their score for the task."),
      section("Nearest entries", async () => nearestEntries(await of("nearest", { k: 8 }), base), "By the intersection over the union of their neurons."),
      section("Metrics", () => metrics(entry.metrics)),
      section("How it was learnt", () => settings(entry)),
    ));
  // The page is shown when all is there, or without what takes longer, such as reading scores for the first time.
  const ready = Promise.all([...box.querySelectorAll("section")].map((each) => each.ready));
  await Promise.race([ready, new Promise((done) => { setTimeout(done, PATIENCE); })]);
}

/** A part of the page, which stands by itself when it cannot be had. */
function section(name, make, note = null) {
  const wait = el("p", { class: "empty" }, "…");
  const made = el("section", { "aria-busy": "true" }, el("h2", {}, name), note ? el("p", { class: "note" }, note) : null, wait);
  made.ready = (async () => {
    try {
      wait.replaceWith(await make());
    } catch (error) {
      wait.replaceWith(empty(error.message));
    }
    made.removeAttribute("aria-busy");
  })();
  return made;
}

function facts(entry, base, runs) {
  const pairs = [
    ["neurons", `${count(entry.neuron_count)} in ${count(Object.keys(entry.sites).length)} sites`],
    ["parameters", count(entry.parameter_count)],
    ["score", score(entry.metrics.scores?.[entry.task])],
    ["stream", el("span", {}, entry.stream, " ", el("a", { href: `#/atlas?stream=${part(entry.stream)}` }, "atlas"), " ", el("a", { href: `#/overlaps?stream=${part(entry.stream)}` }, "overlaps"))],
    ["base model", el("span", { title: base }, entry.base_model.name)],
    ["built on", entry.parent ? entryLink(entry.parent, base) : "the base model"],
    ["reused from", entry.reused_from ? entryLink(entry.reused_from, base) : null],
    ["forgets", entry.forgets ? entryLink(entry.forgets, base) : null],
    ["learnt", moment(entry.created_at)],
    ["seed", String(entry.seed)],
    ["MLflow run", runs.mlflow],
    ["Prefect run", runs.prefect],
  ];
  return el("dl", { class: "facts" }, pairs.filter(([, value]) => value !== null).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

/** Where the runs that made the entry are shown; their ids alone where the server knows no page. */
function links(entry, bases, run) {
  const out = (url, id) => el("a", { href: url, rel: "noopener noreferrer", target: "_blank" }, id);
  const experiment = run?.mlflow_experiment_id ?? 0;
  const { mlflow_run_id: mlflow, prefect_flow_run_id: prefect } = entry;
  return {
    mlflow: mlflow && (bases.mlflow ? out(`${bases.mlflow}/#/experiments/${part(String(experiment))}/runs/${part(mlflow)}`, mlflow) : mlflow),
    prefect: prefect && (bases.prefect ? out(`${bases.prefect}/runs/flow-run/${part(prefect)}`, prefect) : prefect),
  };
}

function rCurve(entry, run) {
  if (!run?.matrix.rows.length) return empty("No run of this stream has measured it.");
  if (!run.matrix.tasks.includes(entry.task)) return empty("The newest run of this stream does not have this task.");
  return curve(run.matrix, entry.task);
}

function versions(found, entry, base) {
  const named = Object.groupBy ? Object.groupBy(Object.entries(found.aliases), ([, version]) => version) : {};
  const rows = found.versions.toReversed().map((each) => {
    const aliases = (named[each.version] ?? []).map(([alias]) => pill(alias));
    const tags = Object.entries(each.tags).map(([key, value]) => pill(`${key}=${value}`));
    const here = each.version === entry.version;
    return el("tr", { class: here ? "here" : null },
      el("th", { scope: "row" }, el("a", { href: taskAddress(each.reference, base), "aria-current": here ? "page" : null }, `@${each.version}`)),
      el("td", { class: "number" }, score(each.metrics.scores?.[each.task])),
      el("td", { class: "number" }, count(each.neuron_count)),
      el("td", {}, moment(each.created_at)),
      el("td", {}, el("span", { class: "pills" }, aliases, tags)));
  });
  const head = ["version", "score", "neurons", "learnt", "aliases, tags"].map((name, place) => el("th", { scope: "col", class: place === 1 || place === 2 ? "number" : null }, name));
  return el("div", { class: "wide" }, el("table", { class: "plain" }, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows)));
}

/** The sites of each kind together; the atlas shows them one by one. */
function capacity(found, entry, base) {
  const places = new Map(found.learnt.map((reference, place) => [reference, place]));
  const kinds = new Map();
  for (const site of found.sites) {
    const kind = kinds.get(site.kind) ?? { size: 0, free: 0, owners: new Map() };
    kind.size += site.size;
    kind.free += site.free;
    for (const [reference, neurons] of Object.entries(site.owners)) kind.owners.set(reference, (kind.owners.get(reference) ?? 0) + neurons);
    kinds.set(site.kind, kind);
  }
  const inOrder = (owners) => [...owners].sort(([one], [other]) => places.get(one) - places.get(other));
  const bars = [...kinds].map(([kind, { size, free, owners }]) => el("div", { class: "kind" },
    el("span", {}, `${kind}: ${share(free / size)} free`), bar(inOrder(owners), free, places)));
  const whole = el("a", { href: `#/atlas?entry=${part(entry.reference)}&base=${base.slice(0, 12)}` }, "The atlas, site by site");
  return el("div", {}, bars, legend(found, places, base), el("p", {}, whole));
}

/** A tree of entries. A row of entries with one child each stays at one depth, or a long chain would run off the page. */
function lineage(root, entry, base) {
  const item = (node) => {
    const here = node.entry === entry.reference;
    const link = el("a", { href: taskAddress(node.entry, base), "aria-current": here ? "page" : null }, node.entry);
    return el("li", { class: here ? "here" : null }, link, node.link && node.link !== "parent" ? el("small", {}, ` ${node.link}`) : null);
  };
  const list = (node) => {
    const made = el("ul", {}, item(node));
    let last = node;
    while (last.children.length === 1) {
      [last] = last.children;
      made.append(item(last));
    }
    if (last.children.length) made.lastChild.append(el("ul", { class: "branches" }, last.children.map((child) => el("li", {}, list(child)))));
    return made;
  };
  return el("div", { class: "tree" }, list(root));
}

function strongest(found) {
  if (!found.length) return empty("No scores were recorded.");
  const most = Math.max(...found.map((each) => Math.abs(each.score))) || 1;
  const rows = found.map((each) => el("tr", {},
    el("th", { scope: "row" }, each.site), el("td", { class: "number" }, String(each.neuron)),
    el("td", { class: "number" }, number(each.score)), el("td", {}, each.owned ? "owned" : "not owned"),
    el("td", {}, meter(Math.abs(each.score) / most))));
  const head = ["site", "neuron", "score", "", ""].map((name, place) => el("th", { scope: "col", class: place === 1 || place === 2 ? "number" : null }, name));
  return el("div", { class: "wide" }, el("table", { class: "plain" }, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows)));
}

function nearestEntries(found, base) {
  if (!found.length) return empty("There is no other entry on this base model.");
  return el("div", { class: "wide" }, el("table", { class: "plain" }, el("tbody", {}, found.map((each) => el("tr", {},
    el("th", { scope: "row" }, entryLink(each.entry, base)), el("td", { class: "number" }, each.value.toFixed(3)), el("td", {}, meter(each.value)))))));
}

function meter(value) {
  const made = el("span", { class: "meter", "aria-hidden": "true" }, el("span"));
  made.firstChild.style.width = `${(100 * Math.max(0, Math.min(1, value))).toFixed(1)}%`;
  return made;
}

/** Names and values of what may be nested; `skip` leaves out what is shown elsewhere. */
function flat(value, name = "", skip = []) {
  if (value === null || typeof value !== "object") return [[name, value]];
  if (Array.isArray(value) && value.every((each) => each === null || typeof each !== "object")) return [[name, value.join(", ") || "none"]];
  return Object.entries(value).filter(([key]) => !skip.includes(key)).flatMap(([key, inner]) => flat(inner, name ? `${name}/${key}` : key));
}

function pairs(found) {
  if (!found.length) return empty("None.");
  const shown = (value) => (typeof value === "number" ? number(value) : value === null ? "–" : String(value));
  return el("div", { class: "wide tall", tabindex: "0" }, el("table", { class: "plain" }, el("tbody", {}, found.map(([name, value]) =>
    el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, shown(value)))))));
}

const metrics = (found) => pairs(flat(found, "", ["capacity"]));

function settings(entry) {
  const kept = { method: entry.method, training: entry.training, audit: entry.audit, data: entry.data_fingerprint, state: entry.state_digest, versions: entry.versions };
  return pairs(flat(kept));
}
