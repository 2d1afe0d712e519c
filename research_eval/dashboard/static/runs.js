// The table of runs, its groups over seeds, and the choice of runs to compare.
import { get, h, notReady, num, params, put, ready, select, setParams, status, table } from "./dom.js";

const PAGE = 100;
const ROW = 30;
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
  put(page, h("h1", {}, "Runs"), controls, list);
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

async function runParts(list) {
  const first = await get(`/api/runs?${query({ offset: 0, limit: PAGE })}`);
  const known = new Map([[0, first.rows]]);
  const bar = h("p", { class: "bar", "aria-live": "polite" });
  const body = h("tbody");
  const said = () => {
    const ids = chosen();
    put(
      bar,
      `${num(first.total)} runs. `,
      ids.length > 1 ? h("a", { href: `/compare?sel=${ids.join(",")}`, id: "compare" }, `Compare ${ids.length} runs`) : "Choose up to 20 runs to compare them.",
    );
  };
  const pick = (id, on) => {
    const ids = chosen().filter((one) => one !== id);
    if (on && ids.length < 20) ids.push(id);
    setParams({ sel: ids.join(",") });
    said();
  };
  const head = [["", ""], ["id", "started"], ["name", "name"], ["model", "model"], ["data", "dataset"], ["status", "status"], ["seed", "seed"], ...first.names.map((name) => [name, name])];
  const sort = (key) => {
    const again = params().get("sort") === key;
    setParams({ sort: key, dir: again && params().get("dir") !== "desc" ? "desc" : "" });
    show(list);
  };
  const headers = head.map(([text, key]) => {
    const on = key && params().get("sort") === key;
    const state = on ? (params().get("dir") === "desc" ? "descending" : "ascending") : null;
    return h("th", { "aria-sort": state }, key ? h("button", { type: "button", onclick: () => sort(key) }, text) : "");
  });
  const row = (run) => {
    const box = h("input", { type: "checkbox", "aria-label": `choose ${run.id}`, checked: chosen().includes(run.id), onchange: (event) => pick(run.id, event.target.checked) });
    return h(
      "tr",
      {},
      h("td", {}, box),
      h("td", {}, h("a", { href: `/run/${run.id}` }, run.id)),
      h("td", {}, run.name),
      h("td", {}, run.model),
      h("td", {}, run.data),
      h("td", {}, status(run.status)),
      h("td", { class: "number" }, run.seed ?? ""),
      first.names.map((name) => h("td", { class: "number" }, num(run.metrics[name]))),
    );
  };
  const scroller = h("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": "runs" }, h("table", { class: "runs" }, h("thead", {}, h("tr", {}, headers)), body));
  const space = (rows) => h("tr", { "aria-hidden": "true", css: { height: `${rows * ROW}px` } }, h("td", { colspan: head.length }));
  let drawn = "";
  const draw = async () => {
    const from = Math.max(0, Math.floor(scroller.scrollTop / ROW) - 20);
    const until = Math.min(first.total, from + 90);
    const pages = [];
    for (let number = Math.floor(from / PAGE); number <= Math.floor(Math.max(until - 1, 0) / PAGE); number += 1) pages.push(number);
    for (const number of pages) {
      if (!known.has(number)) known.set(number, (await get(`/api/runs?${query({ offset: number * PAGE, limit: PAGE })}`)).rows);
    }
    const mark = `${from}-${until}`;
    if (mark === drawn) return;
    drawn = mark;
    const rows = [];
    for (let place = from; place < until; place += 1) {
      const run = known.get(Math.floor(place / PAGE))[place % PAGE];
      if (run) rows.push(row(run));
    }
    put(body, space(from), ...rows, space(first.total - until));
  };
  let waiting = null;
  scroller.addEventListener("scroll", () => {
    if (waiting === null) waiting = setTimeout(() => { waiting = null; draw(); }, 60);
  });
  await draw();
  said();
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

