// A study: its history, every parameter against the score, and what good models cost.
import { colour, get, h, num, params, put, ready, select, setParams, status, table } from "./dom.js";
import { cloud, lines } from "./charts.js";

export async function studyPage(page, name) {
  const found = await get(`/api/study/${encodeURIComponent(name)}`);
  const { metric, sign } = found;
  const done = found.trials.filter((one) => typeof one.metrics[metric] === "number");
  const models = [...new Set(found.trials.map((one) => one.model))];
  let best = -Infinity;
  const history = done.map((one, n) => {
    best = Math.max(best, sign * one.metrics[metric]);
    return [n + 1, sign * best];
  });
  const spoken = (one) => `trial ${one.trial ?? "?"}, ${one.model}: ${num(one.metrics[metric])}`;
  const tone = (one) => colour(models.indexOf(one.model));
  const numeric = found.params.filter((key) => done.some((one) => typeof one.params[key] === "number"));
  const chart = h("div", { class: "charts" });
  const draw = () => {
    const x = params().get("x") || numeric[0];
    const points = done.filter((one) => typeof one.params[x] === "number").map((one) => ({ x: one.params[x], y: one.metrics[metric], name: spoken(one), colour: tone(one), href: `/run/${one.id}` }));
    const wide = points.length > 1 && Math.min(...points.map((one) => one.x)) > 0 && Math.max(...points.map((one) => one.x)) / Math.min(...points.map((one) => one.x)) > 20;
    const costs = done.filter((one) => one.metrics.param_count > 0).map((one) => ({ x: one.metrics.param_count, y: one.metrics[metric], name: spoken(one), colour: tone(one), href: `/run/${one.id}` }));
    put(
      chart,
      lines("Best score so far", [{ name: metric, points: history }], "finished trials"),
      x ? cloud(`${metric} by ${x}`, points, x, "", wide) : null,
      cloud(`${metric} by parameters`, costs, "parameters", "", true),
    );
  };
  const order = [...found.trials].sort((a, b) => sign * ((b.metrics[metric] ?? -sign * Infinity) - (a.metrics[metric] ?? -sign * Infinity)));
  const rows = order.map((one) => [one.trial ?? "", h("a", { href: `/run/${one.id}` }, one.id), one.model, status(one.status), num(one.metrics[metric]), num(one.metrics.param_count), ...found.params.map((key) => (one.params[key] === undefined ? "–" : typeof one.params[key] === "number" ? num(one.params[key]) : String(one.params[key])))]);
  put(
      page,
    h("h1", {}, `Study ${name}`),
    h("p", { class: "lead" }, `${found.trials.length} runs, ${done.length} with a score. `, models.map((model, n) => h("span", {}, h("i", { class: "dot", css: { background: colour(n) } }), `${model} `))),
    h("form", { class: "controls", onsubmit: (event) => event.preventDefault() }, select("parameter", numeric.map((key) => [key, key]), params().get("x"), (value) => { setParams({ x: value }); draw(); })),
    chart,
    h("div", { class: "wide" }, table(["trial", "run", "model", "status", metric, "parameters", ...found.params], rows)),
  );
  draw();
  ready("study");
}
