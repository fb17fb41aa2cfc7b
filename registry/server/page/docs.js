// The API, from its OpenAPI description.

import { el, problem } from "./dom.js";

const main = document.getElementById("main");

async function show() {
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  const api = await response.json();
  const operations = Object.entries(api.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, operation]) => ({ path, method, operation })));
  const tags = [...new Set(operations.map(({ operation }) => operation.tags.at(-1)))];
  main.replaceChildren(
    el("h1", {}, "API"),
    el("p", { class: "lead" }, written(api.info.description)),
    el("p", {}, "Described for programs: ", el("a", { href: "openapi.json" }, "openapi.json"), "."),
    ...tags.map((tag) => el("section", { class: "api" }, el("h2", {}, tag),
      operations.filter(({ operation }) => operation.tags.at(-1) === tag).map((each) => described(each, api)))));
}

function described({ path, method, operation }, api) {
  const parameters = (operation.parameters ?? []).map((each) => row(each.name, each.in, each.required, each.description));
  const body = operation.requestBody?.content["application/json"]?.schema;
  const schema = body?.$ref ? api.components.schemas[body.$ref.split("/").at(-1)] : null;
  const fields = Object.entries(schema?.properties ?? {}).map(([name, each]) => row(name, "body", schema.required?.includes(name), each.description));
  const rows = [...parameters, ...fields];
  return el("article", {},
    el("h3", {}, el("span", { class: `method ${method}` }, method.toUpperCase()), el("code", {}, path)),
    el("p", {}, written(operation.description ?? operation.summary)),
    rows.length ? el("div", { class: "wide" }, el("table", { class: "plain" }, el("tbody", {}, rows))) : null);
}

/** A text in which what stands between backticks is code. */
const written = (text) => text.split("`").map((each, place) => (place % 2 ? el("code", {}, each) : each));

const row = (name, place, required, description) => el("tr", {}, el("th", { scope: "row" }, el("code", {}, name)),
  el("td", {}, `${place}${required ? ", required" : ""}`), el("td", {}, written(description ?? "")));

show().catch((error) => main.replaceChildren(problem(error)));
