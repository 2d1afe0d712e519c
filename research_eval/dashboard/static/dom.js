// Small tools of all pages: elements, requests, numbers, and the state that stands in the URL.

export const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a5195", "#8c6d31"];
export const LIGHTER = ["#6aa9d0", "#e79d6b", "#6bc3a9", "#e0b0ca", "#9fd3f2", "#f0c670", "#b39dc2", "#bba97e"];

/** The colour of expert number n: in a fixed order, lighter in the second turn. */
export function colour(n) {
  return (Math.floor(n / COLOURS.length) % 2 ? LIGHTER : COLOURS)[n % COLOURS.length];
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "css") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

/** An element with attributes and children; texts never become markup. */
export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An element of a picture. */
export function s(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

/** Put children in the place of those that a node has. */
export function put(node, ...children) {
  node.replaceChildren();
  return fill(node, {}, children);
}

/** Make these nodes the children, and leave those that stay untouched: they keep focus, selection and scrolling. */
export function arrange(parent, nodes) {
  const kept = new Set(nodes);
  for (const child of [...parent.childNodes]) if (!kept.has(child)) child.remove();
  let next = parent.firstChild;
  for (const node of nodes) {
    if (node === next) next = next.nextSibling;
    else parent.insertBefore(node, next);
  }
}

/** Call `ask` again and again while `place` is on the page: after as many ms as it answers, never after null. */
export function follow(place, ask, first) {
  let failed = 0;
  const again = async () => {
    if (!place.isConnected) return;
    let pause = first;
    if (document.visibilityState === "visible") {
      try {
        pause = await ask();
        failed = 0;
      } catch {
        failed += 1; // less and less often: after 5 s, 10 s, ... at most a minute
        pause = Math.min(60000, 2500 * 2 ** failed);
      }
    }
    if (pause !== null) setTimeout(again, pause);
  };
  setTimeout(again, first);
}

const offline = document.getElementById("goe-data");
export const DATA = offline ? JSON.parse(offline.textContent) : null;

/** The answer of the server, or of the data in this file. Throws an Error with a message for people. */
export async function get(url) {
  if (DATA) {
    if (DATA.answers[url]) return DATA.answers[url];
    throw new Error("This file does not hold that. Open the run in goe dashboard.");
  }
  return answer(await fetch(url, { headers: { accept: "application/json" } }));
}

/** Ask for something to be computed. */
export async function post(url, body) {
  const token = document.querySelector("meta[name=goe-page]").content;
  const headers = { "content-type": "application/json", "x-goe-page": token };
  return answer(await fetch(url, { method: "POST", headers, body: JSON.stringify(body) }));
}

async function answer(response) {
  const text = await response.text();
  let content = null;
  try {
    content = JSON.parse(text);
  } catch {
    content = { error: text };
  }
  if (response.ok && !content.busy) return content;
  const error = new Error(content.error || `the server answers ${response.status}`);
  error.busy = content.busy === true;
  throw error;
}

const TYPES = { int16: Int16Array, uint8: Uint8Array, int32: Int32Array, float32: Float32Array };

/** Columns in base64 as typed arrays, by name. */
export function decode(columns) {
  const found = {};
  for (const [name, column] of Object.entries(columns)) {
    const bytes = Uint8Array.from(atob(column.data), (letter) => letter.charCodeAt(0));
    found[name] = new TYPES[column.type](bytes.buffer);
  }
  return found;
}

const whole = new Intl.NumberFormat("en");

/** A number for people. */
export function num(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return whole.format(value);
  const size = Math.abs(value);
  return size >= 1000 || size < 0.001 ? value.toPrecision(digits) : value.toFixed(digits);
}

export const percent = (share) => `${(100 * share).toFixed(1)} %`;

/** The parameters of the address. */
export function params() {
  return new URLSearchParams(DATA ? location.hash.slice(1) : location.search);
}

/** Change parameters of the address; empty values vanish. `push` makes a step that the back button undoes. */
export function setParams(changes, push = false) {
  const now = params();
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === undefined || value === "" || value === false) now.delete(name);
    else now.set(name, value);
  }
  const text = now.toString();
  const address = DATA ? `#${text}` : location.pathname + (text ? `?${text}` : "");
  if (address === (DATA ? location.hash || "#" : location.pathname + location.search)) return;
  history[push ? "pushState" : "replaceState"](null, "", address);
}

/** Say that the page shows what its address asks for. */
export function ready(name) {
  document.documentElement.dataset.ready = name;
}

export function notReady() {
  delete document.documentElement.dataset.ready;
}

/** A labelled choice. `options` are pairs of value and text. */
export function select(label, options, value, change, attributes = {}) {
  const list = options.map(([one, text]) => h("option", { value: one, selected: String(one) === String(value ?? "") }, text));
  return h("label", {}, `${label} `, h("select", { ...attributes, onchange: (event) => change(event.target.value) }, list));
}

export function table(head, rows, attributes = {}) {
  const cells = (tag, row) => row.map((cell) => (cell instanceof Node && /^T[DH]$/.test(cell.tagName) ? cell : h(tag, {}, cell)));
  return h("table", attributes, h("thead", {}, h("tr", {}, cells("th", head))), h("tbody", {}, rows.map((row) => h("tr", {}, cells("td", row)))));
}

export function status(text) {
  return h("span", { class: `status ${/^[a-z]+$/.test(text) ? text : ""}` }, text);
}
