// The table of runs, its groups over seeds, and the choice of runs to compare.
import { arrange, follow, get, h, notReady, num, params, put, ready, select, setParams, status, table } from "./dom.js";

const PAGE = 100;
const ROW = 30;
const LIVE_MS = 2000; // between two looks at the table while one of its runs works
const IDLE_MS = 15000;
const FILTERS = ["q", "model", "data", "status", "study", "where"];

export async function runsPage(page) {
  const choices = await get("/api/choices");
  const list = h("div", { id: "list" });
  const reload = () => show(list).catch((error) => put(list, h("p", { class: "error", role: "alert" }, error.message)));
  const change = (name) => (value) => {
    setParams({ [name]: value });
    reload();
  };
  const typed = (name, label, hint) => {
    const input = h("input", { value: params().get(name) || "", placeholder: hint, size: 18 });
    input.addEventListener("change", () => change(name)(input.value.trim()));
    return h("label", {}, `${label} `, input);
  };
  const options = (names) => [["", "all"], ...names.map((name) => [name, name])];
  const controls = h(
    "form",
    { class: "controls", onsubmit: (event) => event.preventDefault() },
    typed("q", "name", "pilot*"),
    select("model", options(choices.models), params().get("model"), change("model")),
    select("data", options(choices.data), params().get("data"), change("data")),
    select("status", options(choices.statuses), params().get("status"), change("status")),
    typed("study", "study", "name"),
    typed("where", "where", "final_val_f1>=0.9"),
    select("show", [["", "runs"], ["seed", "groups over seeds"]], params().get("group"), change("group")),
  );
  put(page, h("h1", {}, "Runs"), controls, columnChooser(reload), list);
  await reload();
}

function query(extra) {
  const now = params();
  const asked = new URLSearchParams(extra);
  for (const name of [...FILTERS, "sort", "dir"]) if (now.get(name)) asked.set(name, now.get(name));
  return asked.toString();
}

let turn = 0;

/** Draw what the address asks for. The answer to an older question is dropped. */
async function show(list) {
  notReady();
  turn += 1;
  const mine = turn;
  const parts = params().get("group") === "seed" ? await groupParts() : await runParts(list);
  if (mine !== turn) return;
  put(list, parts);
  ready("runs");
}

function chosen() {
  return (params().get("sel") || "").split(",").filter(Boolean);
}

/** The columns of the table: name, text of the head, what sorts by it, and the cell of a run. */
const FIXED = [
  ["name", "name", (run) => run.name],
  ["model", "model", (run) => run.model],
  ["data", "dataset", (run) => run.data],
  ["status", "status", (run) => run.status],
  ["seed", "seed", (run) => String(run.seed ?? "")],
  ["started", "started", (run) => run.started ?? ""],
];
const USUAL = ["name", "model", "data", "status", "seed"];
const STORED = "goe-columns";
let usual = []; // metrics that the server shows when nothing is chosen

/** What the reader has chosen on this machine: {fixed, metrics}; null for the usual columns. */
function columns() {
  try {
    const found = JSON.parse(localStorage.getItem(STORED));
    return Array.isArray(found?.fixed) && Array.isArray(found?.metrics) ? found : null;
  } catch {
    return null;
  }
}

/** Boxes for all columns. The names of the metrics are asked for when a reader opens it. */
function columnChooser(reload) {
  const body = h("div", { class: "columns" });
  const fill = async () => {
    const { metrics } = await get("/api/columns");
    const now = columns() || { fixed: USUAL, metrics: usual };
    const box = (kind, name) => {
      const change = (event) => {
        const kept = now[kind].filter((one) => one !== name);
        now[kind] = event.target.checked ? [...kept, name].slice(-20) : kept;
        localStorage.setItem(STORED, JSON.stringify(now));
        reload();
      };
      return h("label", {}, h("input", { type: "checkbox", checked: now[kind].includes(name), onchange: change }), ` ${name}`);
    };
    const reset = h("button", { type: "button", onclick: async () => { localStorage.removeItem(STORED); await reload(); await fill(); } }, "usual columns");
    put(body, h("fieldset", {}, h("legend", {}, "Facts"), FIXED.map(([name]) => box("fixed", name))), h("fieldset", {}, h("legend", {}, "Metrics"), metrics.map((name) => box("metrics", name))), reset);
  };
  return h("details", { id: "columns", ontoggle: (event) => { if (event.target.open) fill(); } }, h("summary", {}, "columns"), body);
}

async function runParts(list) {
  let shown = columns();
  if (shown?.metrics.length) { // a store may lack what another one on this address has
    const { metrics } = await get("/api/columns");
    shown = { ...shown, metrics: shown.metrics.filter((name) => metrics.includes(name)) };
  }
  const page = (number) => get(`/api/runs?${query({ offset: number * PAGE, limit: PAGE, ...(shown ? { columns: shown.metrics.join(",") } : {}) })}`);
  let first = await page(0);
  if (!shown) usual = first.names;
  const fixed = FIXED.filter(([name]) => (shown ? shown.fixed : USUAL).includes(name));
  const metrics = shown ? shown.metrics : first.names;
  let known = new Map([[0, first.rows]]);
  const bar = h("p", { class: "bar", "aria-live": "polite" });
  const body = h("tbody");
  const said = () => {
    const ids = chosen();
    const text = `${num(first.total)} runs. `;
    const mark = `${text} ${ids}`;
    if (bar.dataset.mark === mark) return;
    bar.dataset.mark = mark;
    put(bar, text, ids.length > 1 ? h("a", { href: `/compare?sel=${ids.join(",")}`, id: "compare" }, `Compare ${ids.length} runs`) : "Choose up to 20 runs to compare them.");
  };
  const pick = (id, on) => {
    const ids = chosen().filter((one) => one !== id);
    if (on && ids.length < 20) ids.push(id);
    setParams({ sel: ids.join(",") });
    said();
  };
  const head = [["id", "started"], ...fixed, ...metrics.map((name) => [name, name])];
  const sort = (key) => {
    const again = params().get("sort") === key;
    setParams({ sort: key, dir: again && params().get("dir") !== "desc" ? "desc" : "" });
    show(list).then(() => list.querySelector(`th button[data-sort="${CSS.escape(key)}"]`)?.focus());
  };
  const headers = head.map(([text, key]) => {
    const on = params().get("sort") === key;
    const state = on ? (params().get("dir") === "desc" ? "descending" : "ascending") : null;
    return h("th", { "aria-sort": state, scope: "col" }, h("button", { type: "button", "data-sort": key, onclick: () => sort(key) }, text));
  });
  const rows = new Map(); // a row stays the same element, so that new values disturb no reader
  const rowOf = (run) => {
    if (!rows.has(run.id)) {
      const box = h("input", { type: "checkbox", "aria-label": `choose ${run.id}`, checked: chosen().includes(run.id), onchange: (event) => pick(run.id, event.target.checked) });
      const cells = head.slice(1).map((_, place) => h("td", { class: place >= fixed.length ? "number" : "" }));
      rows.set(run.id, { cells, row: h("tr", {}, h("td", {}, box), h("td", {}, h("a", { href: `/run/${run.id}` }, run.id)), cells) });
    }
    const { cells, row } = rows.get(run.id);
    const texts = [...fixed.map(([, , text]) => text(run)), ...metrics.map((name) => num(run.metrics[name]))];
    texts.forEach((text, place) => {
      if (cells[place].textContent === text && cells[place].firstChild) return;
      put(cells[place], fixed[place]?.[0] === "status" ? status(text) : text);
    });
    return row;
  };
  const caption = h("th", {}, h("span", { class: "unseen" }, "choose"));
  const scroller = h("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": "runs" }, h("table", { class: "runs" }, h("thead", {}, h("tr", {}, caption, headers)), body));
  const space = () => h("tr", { "aria-hidden": "true" }, h("td", { colspan: head.length + 1 }));
  const [above, below] = [space(), space()];
  const draw = async () => {
    const from = Math.max(0, Math.floor(scroller.scrollTop / ROW) - 20);
    const until = Math.min(first.total, from + 90);
    for (let number = Math.floor(from / PAGE); number <= Math.floor(Math.max(until - 1, 0) / PAGE); number += 1) {
      if (!known.has(number)) known.set(number, (await page(number)).rows);
    }
    const found = [];
    for (let place = from; place < until; place += 1) {
      const run = known.get(Math.floor(place / PAGE))?.[place % PAGE];
      if (run) found.push(rowOf(run));
    }
    [above.style.height, below.style.height] = [`${from * ROW}px`, `${Math.max(0, first.total - until) * ROW}px`];
    arrange(body, [above, ...found, below]);
  };
  let waiting = null;
  scroller.addEventListener("scroll", () => {
    if (waiting === null) waiting = setTimeout(() => { waiting = null; draw(); }, 60);
  });
  const isRunning = () => [...known.values()].flat().some((run) => run.status === "running");
  const refresh = async () => {
    first = await page(0);
    known = new Map([[0, first.rows]]);
    await draw();
    said();
    return isRunning() ? LIVE_MS : IDLE_MS;
  };
  await draw();
  said();
  follow(scroller, refresh, isRunning() ? LIVE_MS : IDLE_MS);
  return [bar, scroller];
}

async function groupParts() {
  const found = await get(`/api/groups?${query({})}`);
  const rows = found.groups.map((group) => {
    const [solved, interval] = group.solved;
    const members = table(["seed", "run", found.metric], group.runs.map((run) => [run.seed, h("a", { href: `/run/${run.id}` }, run.id), num(run.value)]));
    return [
      h("details", {}, h("summary", {}, group.name), members),
      group.model,
      group.n === 1 ? "1 (a group of one)" : `${group.n}${group.lost ? `, ${group.lost} diverged` : ""}`,
      num(group.mean),
      group.low === null ? "–" : `[${num(group.low)}, ${num(group.high)}]`,
      interval ? `${solved}/${group.n} [${num(interval[0], 2)}, ${num(interval[1], 2)}]` : "–",
      num(group.params),
      group.task,
    ];
  });
  return [
    h("p", { class: "bar" }, `${found.groups.length} groups of runs on ${found.data}: every group is all of its runs, one for each seed. ${found.left_out}`),
    table(["config", "model", "seeds", `mean ${found.metric}`, "95 % interval", "seeds above 0.99", "parameters", "task"], rows, { class: "groups" }),
  ];
}

export async function comparePage(page) {
  const ids = chosen();
  const found = await get(`/api/compare?sel=${ids.join(",")}`);
  const names = found.runs.map((run) => h("th", {}, h("a", { href: `/run/${run.id}` }, run.id), h("br"), `${run.model}, seed ${run.seed ?? "–"}`));
  const shown = (value) => (typeof value === "number" ? num(value) : value === null || value === undefined ? "–" : String(value));
  const rows = (list) => list.map(([name, ...values]) => [h("td", {}, name), ...values.map((value) => h("td", { class: "number" }, shown(value)))]);
  const curves = h("div", { class: "charts", id: "curves" });
  put(
      page,
    h("h1", {}, `${found.runs.length} runs side by side`),
    curves,
    h("h2", {}, "Where the configs differ"),
    found.differences.length ? table(["key", ...names], rows(found.differences)) : h("p", {}, "The configs are equal."),
    h("h2", {}, "Metrics"),
    table(["metric", ...found.runs.map((run) => run.id)], rows(found.metrics)),
  );
  const { lines } = await import("./charts.js");
  const { colour } = await import("./dom.js");
  const histories = await Promise.all(found.runs.map((run) => get(`/api/run/${run.id}/history?since=-1`)));
  for (const series of ["val_loss", "val_f1", "train_loss"]) {
    const drawn = histories.map((one, n) => ({ name: found.runs[n].id, colour: colour(n), points: (one.series[series] || []).map(([step, , value]) => [step, value]) }));
    if (drawn.some((one) => one.points.length)) curves.append(lines(series, drawn));
  }
  ready("compare");
}

