// A study: its history, which parameters matter, all trials as lines, and what two metrics trade.
import { get, h, num, params, put, ready, select, setParams, status, table } from "./dom.js";
import { bars, parallel, scatter } from "./charts.js";

export async function studyPage(page, name) {
  const asked = new URLSearchParams();
  for (const key of ["x", "y"]) if (params().get(key)) asked.set(key, params().get(key));
  const found = await get(`/api/study/${encodeURIComponent(name)}?${asked}`);
  const choose = (key) => async (value) => {
    setParams({ [key]: value }, true);
    try {
      await studyPage(page, name);
      document.getElementById(`choose-${key}`)?.focus();
    } catch (error) {
      page.append(h("p", { class: "error", role: "alert" }, error.message));
    }
  };
  const options = (other) => found.offered.filter((one) => one !== other).map((one) => [one, one]);
  const controls = h(
    "form",
    { class: "controls", onsubmit: (event) => event.preventDefault() },
    select("judged by", options(found.x), found.y, choose("y"), { id: "choose-y" }),
    select("beside", options(found.y), found.x, choose("x"), { id: "choose-x" }),
  );
  put(
    page,
    h("h1", {}, `Study ${found.name}`),
    h("p", { class: "lead" }, `${found.counts}. `, Object.entries(found.models).map(([model, tone]) => h("span", {}, h("i", { class: "dot", css: { background: tone } }), `${model} `))),
    found.offered.length ? controls : null,
    found.history ? figures(found) : h("p", { class: "soft" }, `No trial has a value of ${found.y} yet.`),
    h("h2", {}, "Trials"),
    trials(found),
  );
  if (found.history) await parameters(found, name, asked.get("y"));
  ready("study");
}

/** What takes the server longer stands below what it answers at once. */
async function parameters(found, name, y) {
  const place = document.getElementById("parameters");
  const { importance, parallel: pictures } = await get(`/api/study/${encodeURIComponent(name)}/parameters${y ? `?y=${encodeURIComponent(y)}` : ""}`);
  put(
    place,
    h("p", { class: "soft" }, `${importance.legend} The range of a parameter is that of the values that were tried.`),
    h("div", { class: "charts" }, importance.rows.flat().map((one) => bars(one, importance.limit))),
    h("h2", {}, "Parallel coordinates"),
    h("p", { class: "soft" }, `A line is a finished trial; the darkest (on a dark page, the brightest) have the best ${found.y}. A click opens its run.`),
    pictures.map((one) => parallel(one, (number) => said(found, number), (number) => open(found, number))),
  );
}

const said = (found, number) => `trial ${number}, ${found.runs[number][1]}`;

function open(found, number) {
  location.href = `/run/${found.runs[number][0]}`;
}

function figures(found) {
  const { history, pareto, labels, x, y } = found;
  const point = (number, a, b, faint) => ({
    x: a, y: b, faint, colour: found.models[found.runs[number][1]], open: () => open(found, number),
    name: `${said(found, number)}: ${y} ${num(b)}${faint === undefined ? "" : `, ${x} ${num(a)}`}`,
  });
  const last = history.points[history.points.length - 1][0];
  const best = history.best[history.best.length - 1];
  const onFront = new Set(pareto?.front);
  return [
    h(
      "div",
      { class: "charts" },
      scatter(`Best so far: ${num(best[1])} in trial ${best[0]}`, {
        points: history.points.map(([number, value]) => point(number, number, value)), steps: [...history.best, [last, best[1]]], rises: true, yScale: history.scale, xName: "trial", yName: labels[y],
      }),
      pareto ? scatter(`Pareto front: ${y} and ${x}`, {
        points: pareto.points.map(([number, a, b]) => point(number, a, b, !onFront.has(number))), steps: pareto.line, rises: pareto.rises, xScale: pareto.x, yScale: pareto.y, xName: labels[x], yName: labels[y],
      }) : null,
    ),
    pareto ? h("p", { class: "soft" }, `${pareto.counts}.`) : null,
    h("h2", {}, "Which parameters matter"),
    h("div", { id: "parameters", "aria-live": "polite" }, h("p", { class: "soft" }, "computing …")),
  ];
}

function trials({ trials: { params: names, rows, total }, x, y }) {
  const shown = (value) => (value === null || value === undefined ? "–" : typeof value === "number" ? num(value) : String(value));
  const cells = rows.map((one) => [
    one.trial ?? "–",
    h("td", { class: "ids" }, one.runs.map(([id, seed], n) => [n ? ", " : "", h("a", { href: `/run/${id}` }, one.runs.length > 1 ? `seed ${seed ?? "–"}` : id)])),
    one.model,
    status(one.status),
    ...one.values.slice(0, x ? 2 : 1).map((value) => h("td", { class: "number" }, shown(value))),
    ...one.params.map(shown),
  ]);
  const note = total > rows.length ? `The best ${rows.length} of ${num(total)} trials.` : `${num(total)} trials, the best first.`;
  return [h("p", { class: "soft" }, note), h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "trials" }, table(["trial", "run", "model", "status", ...[y, x].filter(Boolean), ...names], cells))];
}
