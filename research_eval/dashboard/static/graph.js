// The flow of samples between experts: a column for the input, for each step, and for the answer.
import { colour, h, num, percent, s, table } from "./dom.js";

const WIDTH = 1000;
const HEIGHT = 420;
const TOP = 34;
const BAR = 16;
const GAP = 9;
const SMALL = 0.002; // of all samples: flows below it are drawn together
const MANY = 16; // experts from which flows are drawn together

/** The nodes and flows of the samples at `kept`. Nodes are called "in", "STEP.EXPERT", "right", "wrong" and "end". */
export function flows({ paths, steps, correct, kept }) {
  let experts = 1;
  for (const expert of paths) if (expert >= experts) experts = expert + 1;
  const ends = 1 + steps * experts; // nodes have numbers here: 0 is "in", then the experts of each step, then the answers
  const all = ends + 3;
  const nodes = new Int32Array(all);
  const links = new Map();
  for (const row of kept) {
    let from = 0;
    nodes[0] += 1;
    const go = (to) => {
      nodes[to] += 1;
      links.set(from * all + to, (links.get(from * all + to) || 0) + 1);
      from = to;
    };
    for (let step = 0; step < steps && paths[row * steps + step] >= 0; step += 1) go(1 + step * experts + paths[row * steps + step]);
    go(ends + (correct ? 1 - correct[row] : 2));
  }
  const name = (node) => (node === 0 ? "in" : node < ends ? `${Math.floor((node - 1) / experts) + 1}.${(node - 1) % experts}` : ["right", "wrong", "end"][node - ends]);
  return {
    nodes: new Map([...nodes.keys()].filter((node) => nodes[node]).map((node) => [name(node), nodes[node]])),
    links: [...links].map(([key, count]) => [name(Math.floor(key / all)), name(key % all), count]),
  };
}

function columnOf(name, steps) {
  if (name === "in") return 0;
  return name.includes(".") ? Number(name.split(".")[0]) : steps + 1;
}

const rank = (name) => (name.includes(".") ? Number(name.split(".")[1]) : name === "wrong" ? 1 : 0);
const expertOf = (name) => (name.includes(".") ? Number(name.split(".")[1]) : null);

function spoken(name, count, total) {
  const share = `${num(count)} samples, ${percent(count / Math.max(total, 1))}`;
  if (name === "in") return `input: ${share}`;
  if (!name.includes(".")) return `${name === "end" ? "answer" : `answer ${name}`}: ${share}`;
  const [step, expert] = name.split(".");
  return `expert ${expert} at step ${step}: ${share}`;
}

/** Where every node lies: the fullest column decides the height of a sample, so that none leaves the picture. */
export function layout(nodes, steps, order = (expert) => expert) {
  const columns = Array.from({ length: steps + 2 }, () => []);
  for (const name of nodes.keys()) columns[columnOf(name, steps)].push(name);
  const place = (name) => (expertOf(name) === null ? rank(name) : order(expertOf(name)));
  columns.forEach((column) => column.sort((a, b) => place(a) - place(b)));
  const gaps = Math.max(...columns.map((column) => column.length - 1));
  const gap = Math.min(GAP, (0.4 * HEIGHT) / Math.max(gaps, 1));
  const total = nodes.get("in") || 1;
  const unit = (HEIGHT - gap * gaps) / total;
  const found = new Map();
  columns.forEach((column, number) => {
    let y = TOP;
    for (const name of column) {
      const height = nodes.get(name) * unit;
      found.set(name, { x: 12 + (number * (WIDTH - 24 - BAR)) / (steps + 1), y, height });
      y += height + gap;
    }
  });
  return { places: found, unit };
}

/** The name of a node in a table. */
function called(name, layers) {
  if (!name.includes(".")) return { in: "input", end: "answer" }[name] || `${name} answer`;
  const [step, expert] = name.split(".");
  return `expert ${expert} at ${layers ? "layer" : "step"} ${step}`;
}

/** The graph as tables, for screen readers and for copying: all flows, and the most frequent paths. `open` keeps which are open. */
export function graphTables(data, layers, open) {
  const { paths, steps, kept, flow } = data;
  const total = Math.max(kept.length, 1);
  const foldable = (name, summary, head, rows) => {
    const place = h("details", { id: name, open: open.has(name) }, h("summary", {}, summary));
    const fill = () => place.append(table(head, rows())); // only when it is open: many rows take long
    if (open.has(name)) fill();
    place.addEventListener("toggle", () => {
      if (place.open && !place.querySelector("table")) fill();
      if (place.open) open.add(name);
      else open.delete(name);
    });
    return place;
  };
  const each = () => [...flow.links].sort((a, b) => columnOf(a[0], steps) - columnOf(b[0], steps) || b[2] - a[2]);
  const counts = new Map();
  for (const row of kept) {
    const key = paths.subarray(row * steps, (row + 1) * steps).join(" → "); // -1 stands behind the end of a path
    counts.set(key, (counts.get(key) || 0) + 1);
  }
  const frequent = () => [...counts].sort((a, b) => b[1] - a[1]).slice(0, 50);
  const text = (key) => key.split(" → ").filter((one) => one !== "-1").join(" → ") || "no expert";
  return [
    foldable("flows", "the graph as a table", ["from", "to", "samples", "share of all", "share of from"], () => each().map(([from, to, count]) => [called(from, layers), called(to, layers), num(count), percent(count / total), percent(count / flow.nodes.get(from))])),
    foldable("paths", `${num(counts.size)} different paths as a table`, ["path", "samples", "share"], () => frequent().map(([key, count]) => [text(key), num(count), percent(count / total)])),
  ];
}

/** The picture. `path` is a list of node names to draw as a dashed line; `select` is called with a chosen node. */
export function draw(data, { chosen, path, select, title, order, numbers = (expert) => expert, layers = false }) {
  const { nodes, links } = data.flow;
  const total = nodes.get("in") || 0;
  const { places, unit } = layout(nodes, data.steps, order);
  const picture = s("svg", { viewBox: `0 0 ${WIDTH} ${TOP + HEIGHT + 10}`, class: "graph", role: "group", "aria-label": title });
  const heads = ["input", ...Array.from({ length: data.steps }, (_, n) => `${layers ? "layer" : "step"} ${n + 1}`), "answer"];
  heads.forEach((text, n) => {
    const anchor = n === 0 ? "tick" : n > data.steps ? "tick end" : "tick middle";
    const x = 12 + (n * (WIDTH - 24 - BAR)) / (data.steps + 1) + (n === 0 ? 0 : n > data.steps ? BAR : BAR / 2);
    picture.append(s("text", { x, y: 20, class: anchor }, text));
  });
  const byTarget = [...links].sort((a, b) => places.get(a[1]).x - places.get(b[1]).x || places.get(a[1]).y - places.get(b[1]).y);
  const bySource = [...links].sort((a, b) => places.get(a[0]).x - places.get(b[0]).x || places.get(a[0]).y - places.get(b[0]).y);
  const leaves = new Map();
  const enters = new Map();
  const start = new Map();
  const end = new Map();
  for (const link of byTarget) {
    start.set(link, leaves.get(link[0]) || 0);
    leaves.set(link[0], (leaves.get(link[0]) || 0) + link[2] * unit);
  }
  for (const link of bySource) {
    end.set(link, enters.get(link[1]) || 0);
    enters.set(link[1], (enters.get(link[1]) || 0) + link[2] * unit);
  }
  const ribbons = s("g", { class: `ribbons ${links.length <= 200 ? "blend" : ""}`, "aria-hidden": "true" });
  const joined = new Map();
  for (const link of links) {
    const [from, to, count] = link;
    const few = nodes.size > MANY * 2 && count < SMALL * total;
    if (few) {
      const key = `${columnOf(from, data.steps)}>${columnOf(to, data.steps)}`;
      joined.set(key, [...(joined.get(key) || []), link]);
      continue;
    }
    const expert = expertOf(from);
    const on = chosen && (from === chosen || to === chosen);
    const tone = expert === null ? "#8a93a1" : colour(numbers(expert));
    ribbons.append(ribbon(places.get(from), places.get(to), start.get(link), end.get(link), count * unit, tone, on ? "on" : chosen ? "off" : "", `${spoken(from, count, total).split(":")[0]} to ${spoken(to, count, total)}`));
  }
  for (const list of joined.values()) {
    const count = list.reduce((sum, link) => sum + link[2], 0);
    const [from, to] = list.reduce((most, link) => (link[2] > most[2] ? link : most), list[0]);
    ribbons.append(ribbon(places.get(from), places.get(to), 0, 0, Math.max(count * unit, 0.5), "#8a93a1", "", `${list.length} small flows, ${num(count)} samples`));
  }
  picture.append(ribbons);
  const names = [...places.keys()];
  for (const name of names) {
    const { x, y, height } = places.get(name);
    const expert = expertOf(name);
    const tone = expert === null ? "#5b6575" : colour(numbers(expert));
    const label = expert === null ? (name === "in" ? "all" : name) : String(numbers(expert));
    const last = columnOf(name, data.steps) > data.steps;
    const side = last ? { x: x - 6, class: "name end" } : { x: x + BAR + 5, class: "name" };
    const node = s(
      "g",
      { class: `node ${name === chosen ? "chosen" : ""}`, "data-node": name },
      s("rect", { x: last ? x - 60 : x, y: y - 2, width: BAR + 60, height: Math.max(height, 12) + 4, class: "target" }),
      s("rect", { x, y, width: BAR, height: Math.max(height, 1), fill: tone, class: name === "wrong" ? "bar wrong" : "bar" }),
      s("text", { ...side, y: y + Math.max(height, 8) / 2 + 4 }, label),
      s("title", {}, spoken(name, nodes.get(name), total)),
    );
    if (expert !== null && select) {
      node.setAttribute("role", "button");
      node.setAttribute("tabindex", name === (chosen || names.find((one) => expertOf(one) !== null)) ? "0" : "-1");
      node.setAttribute("aria-label", spoken(name, nodes.get(name), total));
      node.setAttribute("aria-pressed", String(name === chosen));
      node.addEventListener("click", () => select(name === chosen ? null : name));
      node.addEventListener("keydown", (event) => pressed(event, name, places, data.steps, select, picture));
    }
    picture.append(node);
  }
  if (path) picture.append(line(path, places));
  return picture;
}

function ribbon(from, to, leave, enter, width, tone, state, text) {
  const [x1, x2] = [from.x + BAR, to.x];
  const [y1, y2] = [from.y + leave + width / 2, to.y + enter + width / 2];
  const middle = (x1 + x2) / 2;
  const shape = `M${x1.toFixed(1)},${y1.toFixed(1)} C${middle.toFixed(1)},${y1.toFixed(1)} ${middle.toFixed(1)},${y2.toFixed(1)} ${x2.toFixed(1)},${y2.toFixed(1)}`;
  return s("path", { d: shape, stroke: tone, "stroke-width": Math.max(width, 0.4).toFixed(2), class: `ribbon ${state}` }, s("title", {}, text));
}

function line(path, places) {
  const points = path.filter((name) => places.has(name)).map((name) => {
    const { x, y, height } = places.get(name);
    return `${(x + BAR / 2).toFixed(1)},${(y + height / 2).toFixed(1)}`;
  });
  return s("polyline", { points: points.join(" "), class: "own", "aria-hidden": "true" });
}

function pressed(event, name, places, steps, select, picture) {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    select(name);
    return;
  }
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (!moves[event.key]) return;
  event.preventDefault();
  const [across, down] = moves[event.key];
  const experts = [...places.keys()].filter((one) => one.includes("."));
  const column = columnOf(name, steps) + across;
  const here = places.get(name);
  const found = experts
    .filter((one) => columnOf(one, steps) === column && (!down || (places.get(one).y - here.y) * down > 0))
    .sort((a, b) => Math.abs(places.get(a).y - here.y) - Math.abs(places.get(b).y - here.y))[0];
  if (!found) return;
  for (const node of picture.querySelectorAll("[role=button]")) {
    node.setAttribute("tabindex", node.dataset.node === found ? "0" : "-1");
    if (node.dataset.node === found) node.focus();
  }
}
