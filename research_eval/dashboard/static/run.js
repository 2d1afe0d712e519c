// One run: facts, live curves, alarms, config and environment.
import { arrange, follow, get, h, num, params, put, ready, select, setParams, status, table } from "./dom.js";
import { lines, smoothed } from "./charts.js";

const LIVE_MS = 1000;
const FIRST = ["train_loss", "val_loss", "val_f1", "val_acc", "router_entropy", "lr"];

export async function runPage(page, id) {
  const facts = await get(`/api/run/${id}`);
  const state = h("span", { id: "state" }, status(facts.status));
  const charts = h("div", { class: "charts", id: "curves" });
  const known = new Map();
  const drawn = new Map(); // a picture is made again only when its series has new points
  let since = -1;
  let start = null;
  const draw = () => {
    const weight = Number(params().get("smooth") || 0);
    const wanted = (params().get("series") || "").split(",").filter(Boolean);
    const names = wanted.length ? wanted : FIRST.filter((name) => known.has(name));
    const found = names.filter((name) => known.has(name)).map((name) => {
      const mark = `${weight} ${start} ${known.get(name).length}`;
      if (drawn.get(name)?.mark !== mark) {
        const points = known.get(name).map(([step, , value]) => [step, value]);
        drawn.set(name, { mark, figure: lines(name, [{ name, points: weight ? smoothed(points, weight) : points }]) });
      }
      return drawn.get(name).figure;
    });
    arrange(charts, found.length ? found : [h("p", { class: "soft" }, "No points yet.")]);
  };
  const poll = async () => {
    const found = await get(`/api/run/${id}/history?since=${since}`);
    if (start !== null && found.start !== start) {
      known.clear();
      [since, start] = [-1, null];
      return poll();
    }
    [since, start] = [found.since, found.start];
    let isNew = false;
    for (const [name, points] of Object.entries(found.series)) {
      known.set(name, [...(known.get(name) || []), ...points]);
      isNew = true;
    }
    if (isNew) draw();
    if (state.textContent !== found.status) put(state, status(found.status));
    return found.status;
  };
  const now = await poll().catch(() => facts.status);
  const names = [...known.keys()].sort();
  const controls = h(
    "form",
    { class: "controls", onsubmit: (event) => event.preventDefault() },
    select("series", [["", "the main ones"], ...names.map((name) => [name, name])], params().get("series"), (value) => { setParams({ series: value }); draw(); }),
    select("smooth", [["", "no"], ["0.6", "0.6"], ["0.9", "0.9"], ["0.97", "0.97"]], params().get("smooth"), (value) => { setParams({ smooth: value }); draw(); }),
  );
  const pairs = (values) => table(["key", "value"], Object.entries(values).map(([key, value]) => [key, typeof value === "number" ? num(value, 6) : value === null ? "–" : typeof value === "string" ? value : JSON.stringify(value)]));
  put(
      page,
    h("h1", {}, facts.name || id),
    h("p", { class: "lead" }, state, ` ${facts.model} on ${facts.data}, seed ${facts.seed ?? "–"}, started ${facts.started ?? "–"} UTC`),
    facts.error ? h("p", { class: "error" }, facts.error) : null,
    h(
      "p",
      {},
      facts.traced.length ? h("a", { href: `/atlas/${id}`, class: "button", id: "atlas" }, "Path Atlas: what the experts do") : "No routing trace: train with training_params.trace_routing to see what the experts do.",
      facts.study ? h("a", { href: `/study/${encodeURIComponent(facts.study)}`, class: "button" }, `Study ${facts.study}`) : null,
      facts.parent ? h("a", { href: `/run/${facts.parent}`, class: "button" }, `Parent ${facts.parent}`) : null,
    ),
    controls,
    charts,
    facts.alarms.length ? h("section", {}, h("h2", {}, "Alarms"), table(["epoch", "alarm", "value", "advice"], facts.alarms.map((one) => [one.epoch, one.name, num(one.value), one.advice ?? one.message ?? ""]))) : null,
    h("details", { open: true }, h("summary", {}, "Metrics"), pairs(facts.metrics)),
    h("details", {}, h("summary", {}, "Config"), pairs(facts.config)),
    h("details", {}, h("summary", {}, "Environment"), pairs(facts.environment)),
  );
  draw();
  ready("run");
  if (now === "running") follow(state, async () => ((await poll()) === "running" ? LIVE_MS : null), LIVE_MS);
}
