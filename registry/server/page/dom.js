// Making elements, and asking the server. Whatever comes from the registry becomes text nodes, never markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

/** An element: `el("a", {href: "#/", onclick: f}, "text", other)`. */
export const el = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);

/** The same, of an SVG picture. */
export const svg = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

/** What the server answers; an Error with its sentence where it refuses. */
export async function api(path, parameters = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== null && value !== undefined) query.append(name, value);
  }
  const address = `api/${path}${query.size ? `?${query}` : ""}`;
  let response;
  try {
    response = await fetch(address, { headers: { accept: "application/json" } });
  } catch {
    throw new Error("the server does not answer; check that `neft registry serve` is running");
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.detail ?? `the server answered ${response.status}`);
  return body;
}

/** A part of an address. An `@` and a `:` stay as they are, for people read addresses too. */
export const part = (text) => encodeURIComponent(text).replaceAll("%40", "@").replaceAll("%3A", ":");

export const count = (number) => number.toLocaleString("en");
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;
export const share = (value) => `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;
export const score = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));

export function moment(iso) {
  const time = new Date(iso);
  const text = time.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  return el("time", { datetime: iso, title: iso }, text);
}

/** A number of any size, as short as it can be read. */
export function number(value) {
  if (Number.isInteger(value)) return count(value);
  return Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

export const taskAddress = (reference, base) => `#/task/${part(reference)}${base ? `?base=${base.slice(0, 12)}` : ""}`;

/** A link to an entry's page; `base` is the fingerprint of its base model. */
export const entryLink = (reference, base) => el("a", { href: taskAddress(reference, base) }, reference);

export const empty = (...children) => el("p", { class: "empty" }, ...children);
export const problem = (error) => el("pre", { class: "problem", role: "alert" }, error.message);
