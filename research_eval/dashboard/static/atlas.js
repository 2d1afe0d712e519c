// The Path Atlas of a run: which way the samples take, what each expert gets, and what happens without it.
import { DATA, colour, decode, get, h, notReady, num, params, percent, post, put, ready, select, setParams, table } from "./dom.js";
import { lines } from "./charts.js";
import { draw, flows, graphTables } from "./graph.js";
import { secondGraph } from "./pair.js";
import { enrichment, holm, pairedChange, wilson } from "./stats.js";

const LISTED = 200;
const PLAY_MS = 700;
const TOKENS = 400;

/** The list of a key; a new one if there is none. */
function listed(map, key) {
  if (!map.has(key)) map.set(key, []);
  return map.get(key);
}

export async function atlasPage(page, id) {
  const { epochs } = await get(`/api/run/${id}/atlas`);
  if (!epochs.length) throw new Error("No epoch of this run was traced.");
  const choices = DATA ? { probes: false } : await get("/api/choices");
  const view = new Atlas(page, id, epochs, choices.probes);
  await view.start();
}

/** What is shown. Everything that a reader has chosen stands in the address. */
class Atlas {
  constructor(page, id, epochs, probes) {
    Object.assign(this, { page, id, epochs, probes, known: new Map(), samples: null, second: null, openTables: new Set(), turn: 0, effects: new Map(), playing: null });
  }

  async start() {
    this.parts = Object.fromEntries(["time", "filters", "graph", "panel", "list", "said"].map((name) => [name, h("div", { id: name })]));
    this.parts.said.setAttribute("aria-live", "polite");
    put(
      this.page,
      h("h1", {}, "Path Atlas"),
      this.parts.time,
      this.parts.filters,
      this.parts.said,
      h("div", { class: "atlas" }, h("div", {}, this.parts.graph), this.parts.panel),
      this.parts.list,
    );
    document.addEventListener("keydown", (event) => this.key(event));
    await this.show();
    const names = get(`/api/run/${this.id}/samples`).then((found) => {
      const columns = decode(found.columns);
      this.samples = { names: found.names, tokens: columns.tokens, offsets: columns.offsets };
    });
    await names.catch(() => { this.samples = { names: { labels: [], tokens: {} } }; });
    if (params().get("with") && !DATA) await this.loadSecond(params().get("with")).catch((error) => { this.second = { error: error.message }; });
    await this.show();
  }

  number() {
    const wanted = Number(params().get("epoch"));
    const saved = this.epochs.find((one) => one.saved) || this.epochs[this.epochs.length - 1];
    return this.epochs.some((one) => one.epoch === wanted) ? wanted : saved.epoch;
  }

  async load(id, epoch) {
    const key = `${id} ${epoch}`;
    if (!this.known.has(key)) {
      this.known.set(key, get(`/api/run/${id}/atlas/${epoch}`).then((found) => ({ ...found, ...decode(found.columns), columns: null })));
      if (this.known.size > 12) this.known.delete(this.known.keys().next().value);
    }
    return this.known.get(key);
  }

  async loadSecond(id) {
    const { epochs } = await get(`/api/run/${id}/atlas`);
    const saved = epochs.find((one) => one.saved) || epochs[epochs.length - 1];
    const [data, found] = await Promise.all([this.load(id, saved.epoch), get(`/api/run/${id}/samples`)]);
    const columns = decode(found.columns);
    this.second = { id, epoch: saved.epoch, data, tokens: columns.tokens, labels: found.names.labels };
  }

  /** Draw what the address asks for. The answer to an older question is dropped. */
  async show() {
    notReady();
    this.turn += 1;
    const turn = this.turn;
    const last = this.epochs[this.epochs.length - 1].epoch;
    const [data, judge] = await Promise.all([this.number(), params().get("of") === "last" ? last : this.number()].map((epoch) => this.load(this.id, epoch)));
    if (turn !== this.turn) return;
    Object.assign(this, { data, judge });
    this.kept = this.filtered();
    this.drawTime();
    this.drawFilters();
    this.drawGraph();
    this.drawPanel();
    this.drawList();
    const place = this.epochs.findIndex((one) => one.epoch === this.number());
    for (const next of this.epochs.slice(place + 1, place + 3)) this.load(this.id, next.epoch).catch(() => {});
    ready("atlas");
  }

  change(values, push = false) {
    setParams(values, push);
    return this.show();
  }

  /** Close a panel. The focus goes back to what has opened it. */
  async close(values, opener) {
    await this.change(values, true);
    this.page.querySelector(opener)?.focus();
  }

  // ---------------------------------------------------------------------------------------------------- filters

  /** The samples that all filters keep, as their numbers. */
  filtered() {
    const { data } = this;
    const asked = params();
    const kept = [];
    const wanted = (name) => (asked.get(name) === null ? null : Number(asked.get(name)));
    const [label, group, length] = ["class", "group", "len"].map(wanted);
    const correct = asked.get("correct");
    const thirds = data.loss ? this.thirds() : [];
    const hard = { easy: 0, middle: 1, hard: 2 }[asked.get("hard")];
    for (let row = 0; row < data.samples; row += 1) {
      if (label !== null && data.label[row] !== label) continue;
      if (group !== null && data.group && data.group[row] !== group) continue;
      if (correct !== null && data.correct && data.correct[row] !== (correct === "1" ? 1 : 0)) continue;
      if (length !== null && this.lengthOf(row) !== length) continue;
      if (hard !== undefined && thirds[row] !== hard) continue;
      kept.push(row);
    }
    return kept;
  }

  lengthOf(row) {
    const { path, steps } = this.data;
    let length = 0;
    while (length < steps && path[row * steps + length] >= 0) length += 1;
    return length;
  }

  /** Which third of the loss each sample has: of the shown epoch, or of the last one. */
  thirds() {
    const data = this.judge;
    if (!data.thirds) {
      const order = Array.from(data.loss.keys()).sort((a, b) => data.loss[a] - data.loss[b]);
      data.thirds = new Uint8Array(data.samples);
      order.forEach((row, place) => { data.thirds[row] = Math.min(2, Math.floor((3 * place) / data.samples)); });
    }
    return data.thirds;
  }

  groupName(group) {
    return this.samples?.names.groups?.[group] ?? `group ${group}`;
  }

  labelName(label) {
    return this.samples?.names.labels[label] ?? String(label);
  }

  drawFilters() {
    const { data } = this;
    const asked = params();
    const count = (column) => [...new Set(column)].sort((a, b) => a - b);
    const labels = count(data.label);
    const lengths = count(Array.from({ length: data.samples }, (_, row) => this.lengthOf(row)));
    const pick = (name) => (value) => this.change({ [name]: value });
    const controls = [
      select("class", [["", "all"], ...labels.map((one) => [one, this.labelName(one)])], asked.get("class"), pick("class")),
      data.group ? select("group", [["", "all"], ...count(data.group).map((one) => [one, this.groupName(one)])], asked.get("group"), pick("group")) : null,
      data.correct ? select("answer", [["", "all"], ["1", "right"], ["0", "wrong"]], asked.get("correct"), pick("correct")) : null,
      data.loss && select("difficulty", [["", "all"], ["easy", "easy third"], ["middle", "middle third"], ["hard", "hard third"]], asked.get("hard"), pick("hard")),
      asked.get("hard") && this.epochs.length > 1 ? select("of the loss in", [["", "this epoch"], ["last", "the last epoch"]], asked.get("of"), pick("of")) : null,
      lengths.length > 1 ? select("path length", [["", "all"], ...lengths.map((one) => [one, one])], asked.get("len"), pick("len")) : null,
    ];
    const chosen = ["class", "group", "correct", "hard", "len"].some((name) => asked.get(name));
    const reset = h("button", { type: "button", disabled: !chosen, onclick: () => this.change({ class: "", group: "", correct: "", hard: "", of: "", len: "" }) }, "all samples");
    this.keepFocus(this.parts.filters, h("form", { class: "controls", onsubmit: (event) => event.preventDefault() }, controls, reset));
    const outcome = asked.get("correct") || asked.get("hard") ? " Selected on the outcome: kinds that are hard look special here." : "";
    this.parts.said.textContent = `${num(this.kept.length)} of ${num(data.samples)} ${data.unit || "validation samples"}.${outcome}`;
  }

  /** Put new controls in the place of old ones; the control with the focus keeps it. */
  keepFocus(place, fresh) {
    const focus = document.activeElement;
    const all = [...place.querySelectorAll("select, button, input")];
    const number = all.indexOf(focus);
    put(place, fresh);
    if (number >= 0) place.querySelectorAll("select, button, input")[number]?.focus();
  }

  // ------------------------------------------------------------------------------------------------------- time

  drawTime() {
    if (this.data.unit) return; // a trace of another model has no epochs
    const epoch = this.number();
    const place = this.epochs.findIndex((one) => one.epoch === epoch);
    const here = this.epochs[place];
    const slider = h("input", {
      type: "range", min: 0, max: this.epochs.length - 1, value: place, "aria-label": "epoch", "aria-valuetext": `epoch ${epoch}`, id: "slider",
      oninput: (event) => this.change({ epoch: this.epochs[event.target.value].epoch }),
    });
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const play = h("button", { type: "button", id: "play", disabled: this.epochs.length < 2 || still, onclick: () => this.play() }, this.playing ? "stop" : "play");
    const series = [["router_entropy", "router entropy"], ["path_class_nmi_adjusted", "path tells class (NMI over chance)"], ["path_group_nmi_adjusted", "path tells group (NMI over chance)"], ["planted_recovery", "planted path found"]];
    const drawn = series.map(([name, text]) => ({ name: text, points: this.epochs.filter((one) => typeof one[name] === "number").map((one) => [one.epoch, one[name]]) })).filter((one) => one.points.length > 1);
    const marks = [here.saved ? "the run's weights are of this epoch" : "", here.alarms.length ? `alarms: ${here.alarms.join(", ")}` : ""].filter(Boolean);
    this.keepFocus(this.parts.time, h("div", {}, h("div", { class: "controls" }, h("label", {}, `epoch ${epoch} `, slider), play, h("span", { class: "soft" }, marks.join("; "))), drawn.length ? h("details", {}, h("summary", {}, "over the epochs"), h("div", { class: "charts" }, lines("routing", drawn, "epoch"))) : null));
  }

  play() {
    if (this.playing) {
      clearInterval(this.playing);
      this.playing = null;
      this.drawTime();
      return;
    }
    this.playing = setInterval(() => {
      const place = this.epochs.findIndex((one) => one.epoch === this.number());
      this.change({ epoch: this.epochs[(place + 1) % this.epochs.length].epoch });
    }, PLAY_MS);
    this.drawTime();
  }

  // ------------------------------------------------------------------------------------------------------ graph

  drawGraph() {
    const { data } = this;
    const wanted = params().get("node");
    const sample = params().get("sample");
    const shown = { paths: data.path, steps: data.steps, correct: data.correct, kept: this.kept };
    shown.flow = flows(shown);
    const path = sample === null ? null : this.nodesOf(Number(sample));
    const focused = this.parts.graph.contains(document.activeElement) ? document.activeElement.dataset.node : null;
    const what = data.about_tokens ? "the most used expert of each layer" : "the expert of each step";
    const picture = draw(shown, { chosen: wanted, path, layers: data.about_tokens, title: `Paths of ${num(this.kept.length)} samples: ${what}`, select: (node) => this.change({ node, sample: "" }, true) });
    const whole = h("button", { type: "button", id: "whole", onclick: () => this.parts.graph.requestFullscreen?.() }, "whole window (f)");
    const parts = [picture, h("p", { class: "soft" }, "A bar is as high as its expert has samples. A ribbon has the colour of the expert that it leaves. Choose an expert: click, or arrow keys and Enter. "), whole];
    if (this.second) parts.push(...secondGraph(this));
    parts.push(...graphTables(shown, data.about_tokens, this.openTables));
    put(this.parts.graph, ...parts);
    if (focused) this.parts.graph.querySelector(`[data-node="${focused}"]`)?.focus();
  }

  nodesOf(row) {
    const { data } = this;
    const found = ["in"];
    for (let step = 0; step < data.steps && data.path[row * data.steps + step] >= 0; step += 1) found.push(`${step + 1}.${data.path[row * data.steps + step]}`);
    return [...found, data.correct ? (data.correct[row] ? "right" : "wrong") : "end"];
  }

  // ------------------------------------------------------------------------------------------------------ panel

  drawPanel() {
    const sample = params().get("sample");
    const node = params().get("node");
    const { panel } = this.parts;
    if (sample !== null) return this.samplePanel(Number(sample));
    if (node) return this.expertPanel(node);
    put(panel, h("h2", {}, "What to look at"), h("p", {}, "Choose an expert in the graph, or a sample in the list."), this.forceForm(), this.withForm());
    return undefined;
  }

  reaching(step) {
    const { data } = this;
    return this.kept.filter((row) => data.path[row * data.steps + step - 1] >= 0);
  }

  expertPanel(node) {
    const { data } = this;
    const [step, expert] = node.split(".").map(Number);
    const reached = this.reaching(step);
    const mine = reached.filter((row) => data.path[row * data.steps + step - 1] === expert);
    const inside = Uint8Array.from(reached, (row) => (data.path[row * data.steps + step - 1] === expert ? 1 : 0));
    const hits = data.correct ? mine.reduce((sum, row) => sum + data.correct[row], 0) : null;
    const interval = hits === null ? null : wilson(hits, mine.length);
    const chosen = data.chosen ? mine.reduce((sum, row) => sum + data.chosen[row * data.steps + step - 1], 0) / Math.max(mine.length, 1) / 255 : null;
    const facts = [
      ["samples", `${num(mine.length)} of ${num(reached.length)} that reach ${data.about_tokens ? "layer" : "step"} ${step} (${percent(mine.length / Math.max(reached.length, 1))})`],
      hits === null ? null : ["right answers", `${percent(hits / Math.max(mine.length, 1))}, 95 % interval ${percent(interval[0])} to ${percent(interval[1])}`],
      chosen === null ? null : [data.unit ? "mean weight" : data.about_tokens ? "share of their tokens" : "mean probability", num(chosen)],
    ].filter(Boolean);
    const members = (column) => {
      const kinds = new Map();
      reached.forEach((row, place) => listed(kinds, column[row]).push(place));
      return [...kinds].sort((a, b) => a[0] - b[0]);
    };
    const grouping = (title, column, name) => {
      const kinds = members(column);
      const found = enrichment(kinds.map(([, places]) => places), inside);
      return this.shares(title, found, kinds.map(([kind]) => name(kind)));
    };
    put(
      this.parts.panel,
      h("h2", {}, h("i", { class: "dot", css: { background: colour(expert) } }), `Expert ${expert} at ${data.about_tokens ? "layer" : "step"} ${step}`, h("button", { type: "button", class: "close", onclick: () => this.close({ node: "" }, `[data-node="${node}"]`) }, "close")),
      h("dl", {}, facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
      data.group ? grouping(data.unit ? "Domains" : "Groups", data.group, (kind) => this.groupName(kind)) : "",
      grouping("Classes", data.label, (kind) => this.labelName(kind)),
      this.tokenShares(reached, inside) || "",
      this.probeForm(step, expert),
      h("div", { id: "effects", "aria-live": "polite" }, this.effectTables(expert)),
    );
  }

  /** Bars of a node's shares beside those of all samples that reach its step. Grey ones may be chance. */
  shares(title, found, names, most = 20) {
    const rows = found.rows.map((row) => ({ ...row, name: names[row.kind] })).sort((a, b) => Math.abs(b.z) - Math.abs(a.z)).slice(0, most);
    const widest = Math.max(...rows.map((row) => Math.max(row.share, row.base)), 0.01);
    const special = found.rows.filter((row) => row.outside).length;
    const note = `${special} of ${found.rows.length} lie outside the band of chance (|z| above ${num(found.band, 2)} for the largest of all).`;
    const bar = (row) => h("td", { class: "bars" }, h("span", { class: row.outside ? "share" : "share inside", css: { width: `${(100 * row.share) / widest}%` } }), h("span", { class: "base", css: { left: `${(100 * row.base) / widest}%` }, title: `of all: ${percent(row.base)}` }));
    return h("section", {}, h("h3", {}, title), h("p", { class: "soft" }, note), table(["", "share here, and of all (line)", "here", "of all", "z"], rows.map((row) => [h("td", { class: row.outside ? "" : "inside" }, row.name), bar(row), percent(row.share), percent(row.base), num(row.z, 2)]), { class: "shares" }));
  }

  tokenShares(reached, inside) {
    const tokens = this.samples?.tokens;
    if (!tokens || reached.length > 20000) return null;
    const { offsets, names } = this.samples;
    const where = new Map();
    reached.forEach((row, place) => {
      for (const token of new Set(tokens.subarray(offsets[row], offsets[row + 1]))) listed(where, token).push(place);
    });
    const kept = [...where].filter(([, places]) => places.length >= 5 && places.length < reached.length).sort((a, b) => b[1].length - a[1].length || a[0] - b[0]).slice(0, TOKENS);
    if (!kept.length) return null;
    const found = enrichment(kept.map(([, places]) => places), inside, 100);
    return this.shares("Tokens (samples that contain one)", found, kept.map(([token]) => names.tokens[token] ?? `token ${token}`), 12);
  }

  // ------------------------------------------------------------------------------------------------------ probes

  probeForm(step, expert) {
    if (DATA) return h("p", { class: "soft" }, DATA.effects ? "What happens without an expert was computed when this file was made." : "");
    if (!this.probes) return h("p", { class: "soft" }, "Evaluations without an expert are off: start the dashboard with --allow-probes.");
    const others = Array.from({ length: this.data.experts }, (_, n) => n).filter((n) => n !== expert);
    const target = h("select", { "aria-label": "another expert" }, others.map((n) => h("option", { value: n }, `expert ${n}`)));
    const only = h("input", { type: "checkbox" });
    const ask = (body) => this.ask({ ...body, expert, step: only.checked ? step - 1 : null });
    return h(
      "section",
      { class: "probe" },
      h("h3", {}, `Without expert ${expert}`),
      h("button", { type: "button", id: "skip", onclick: () => ask({ kind: "skip" }) }, "leave out its work"),
      h("button", { type: "button", id: "forbid", onclick: () => ask({ kind: "forbid" }) }, "next best expert"),
      h("button", { type: "button", onclick: () => ask({ kind: "swap", to: Number(target.value) }) }, "work of"),
      target,
      h("label", {}, only, ` only at ${this.data.about_tokens ? "layer" : "step"} ${step}`),
    );
  }

  forceForm() {
    if (DATA || !this.probes || this.data.about_tokens) return "";
    const input = h("input", { placeholder: "0 1", "aria-label": "experts in order", size: 8 });
    const go = () => this.ask({ kind: "path", path: input.value.split(/[ ,]+/).filter(Boolean).map(Number) });
    return h("section", { class: "probe" }, h("h3", {}, "Force a path"), h("form", { onsubmit: (event) => { event.preventDefault(); go(); } }, h("label", {}, "all samples take ", input), h("button", {}, "evaluate")), h("div", { id: "effects", "aria-live": "polite" }, this.effectTables(null)));
  }

  withForm() {
    if (DATA) return "";
    const input = h("input", { placeholder: "id of another run", value: params().get("with") || "", "aria-label": "another run" });
    const go = () => {
      setParams({ with: input.value.trim() }, true);
      this.start();
    };
    return h("section", { class: "probe" }, h("h3", {}, "Beside another run"), h("form", { onsubmit: (event) => { event.preventDefault(); go(); } }, input, h("button", {}, "show")));
  }

  async ask(body, anyway = false) {
    const place = document.getElementById("effects");
    place.prepend(h("p", { class: "soft" }, "computing …"));
    try {
      const address = `/api/run/${this.id}/probe`;
      const [own, changed] = [await post(address, { kind: "none", anyway }), await post(address, { ...body, anyway })];
      this.effects.set(JSON.stringify(body), { body, own: { ...own, ...decode(own.columns) }, changed: { ...changed, ...decode(changed.columns) } });
      put(place, ...this.effectTables(body.expert ?? null));
    } catch (error) {
      const retry = error.busy ? h("button", { type: "button", onclick: () => this.ask(body, true) }, "evaluate anyway") : "";
      put(place, h("p", { class: "error", role: "alert" }, error.message, " ", retry), ...this.effectTables(body.expert ?? null));
    }
  }

  effectTables(expert) {
    const list = DATA?.effects ? DATA.effects.map((one) => ({ body: one.body, own: { ...DATA.own, ...decode(DATA.own.columns) }, changed: { ...one, ...decode(one.columns) } })) : [...this.effects.values()];
    const saved = this.epochs.find((one) => one.saved);
    return list.filter((one) => (one.body.expert ?? null) === expert).reverse().map(({ body, own, changed }) => {
      const all = pairedChange(own.correct, changed.correct, this.kept);
      const labels = [...new Set(this.kept.map((row) => this.data.label[row]))].sort((a, b) => a - b).slice(0, 30);
      const each = labels.map((label) => pairedChange(own.correct, changed.correct, this.kept.filter((row) => this.data.label[row] === label)));
      const adjusted = holm(each.map((one) => one.p));
      const at = body.step === null || body.step === undefined ? "" : ` at step ${body.step + 1}`;
      const what = { skip: `Without the work of expert ${body.expert}${at}`, forbid: `Next best expert for ${body.expert}${at}`, swap: `Expert ${body.to} works for ${body.expert}${at}`, path: `All take ${(body.path || []).join(" → ")}` }[body.kind];
      const points = (one) => `${one.mean >= 0 ? "+" : ""}${(100 * one.mean).toFixed(1)} ± ${(100 * one.half).toFixed(1)}`;
      const weights = saved && saved.epoch !== this.number() ? ` These are the weights of epoch ${saved.epoch}, not of the epoch shown.` : "";
      return h(
        "section",
        { class: "effect" },
        h("h3", {}, what),
        h("p", {}, `Accuracy changes by ${points(all)} points (n = ${num(all.n)}; ${num(all.lost)} lost, ${num(all.won)} won; McNemar p ${all.p < 0.001 ? "< 0.001" : num(all.p, 3)}).${weights} It holds for these weights and this seed.`),
        table(["class", "n", "points", "p (Holm)"], labels.map((label, n) => [this.labelName(label), num(each[n].n), points(each[n]), adjusted[n] < 0.001 ? "< 0.001" : num(adjusted[n], 3)]), { class: "shares" }),
      );
    });
  }

  // ----------------------------------------------------------------------------------------------------- samples

  words(row, most = 24) {
    const { samples } = this;
    if (!samples?.tokens) return [];
    const list = Array.from(samples.tokens.subarray(samples.offsets[row], Math.min(samples.offsets[row + 1], samples.offsets[row] + most)));
    return list.map((token) => samples.names.tokens[token] ?? String(token));
  }

  drawList() {
    const { data } = this;
    const focused = this.parts.list.contains(document.activeElement) ? document.activeElement.dataset.sample : null;
    const rows = this.kept.slice(0, LISTED);
    const sample = params().get("sample");
    const open = (row) => this.change({ sample: row, node: "" }, true);
    const line = (row) => h(
      "tr",
      { class: String(row) === sample ? "chosen" : "" },
      h("td", {}, h("button", { type: "button", class: "link", "data-sample": row, onclick: () => open(row) }, row)),
      h("td", {}, this.labelName(data.label[row])),
      h("td", {}, data.prediction ? this.labelName(data.prediction[row]) : "–"),
      h("td", {}, data.correct ? (data.correct[row] ? "right" : "wrong") : "–"),
      h("td", { class: "number" }, data.loss ? num(data.loss[row]) : "–"),
      h("td", {}, Array.from(data.path.subarray(row * data.steps, (row + 1) * data.steps)).filter((one) => one >= 0).join(" → ")),
      h("td", { class: "words" }, this.words(row).join(" ")),
    );
    const head = h("thead", {}, h("tr", {}, ["sample", "class", "answer", "", "loss", "path", "input"].map((text) => h("th", {}, text))));
    const note = this.samples && !this.samples.tokens ? " The inputs are not recorded: train again with this version." : "";
    put(this.parts.list, h("h2", {}, "Samples"), h("p", { class: "soft" }, `${num(rows.length)} of ${num(this.kept.length)} are listed.${note}`), h("div", { class: "wide" }, h("table", { class: "samples" }, head, h("tbody", {}, rows.map(line)))));
    if (focused) this.parts.list.querySelector(`[data-sample="${focused}"]`)?.focus();
  }

  async samplePanel(row) {
    const { data, parts, turn } = this;
    const title = h("h2", {}, `Sample ${row}`, h("button", { type: "button", class: "close", onclick: () => this.close({ sample: "" }, `[data-sample="${row}"]`) }, "close"));
    const words = h("p", { class: "tokens" }, this.words(row, 400).map((word) => h("span", {}, word)));
    const coloured = h("div");
    const facts = h("p", {}, `class ${this.labelName(data.label[row])}, ${data.prediction ? `answer ${this.labelName(data.prediction[row])}, ` : ""}${data.loss ? `loss ${num(data.loss[row])}, probability of the right class ${num(Math.exp(-data.loss[row]), 3)}` : data.unit}.`);
    put(parts.panel, title, facts, coloured, words);
    if (data.about_tokens && this.probes) this.colourTokens(row, words, coloured, turn);
    const found = await get(`/api/run/${this.id}/atlas/${data.epoch}/${row}`).catch(() => null);
    if (turn !== this.turn || !found) return;
    const all = found.probabilities || found.expert_share;
    if (!all) return;
    const bias = data.router?.balance_bias || [];
    const steps = all.slice(0, data.steps).map((actions, step) => {
      const taken = found.path[step];
      const likeliest = actions.slice(0, data.experts).indexOf(Math.max(...actions.slice(0, data.experts)));
      const moved = taken !== undefined && !data.about_tokens && likeliest !== taken ? ` The likeliest expert was ${likeliest}; the balance bias (${num((bias[step] || bias[0] || [])[taken], 2)} for ${taken}, ${num((bias[step] || bias[0] || [])[likeliest], 2)} for ${likeliest}) moved the choice.` : "";
      const strength = found.strength?.[step] === undefined || taken === undefined ? "" : `, strength ${num(found.strength[step], 3)}`;
      const name = (action) => (action < data.experts ? `expert ${action}` : "stop");
      const bars = actions.map((share, action) => h("tr", { class: action === taken ? "taken" : "" }, h("td", {}, name(action)), h("td", { class: "bars" }, h("span", { class: "share", css: { width: `${100 * share}%`, background: action < data.experts ? colour(action) : "#8a93a1", opacity: action === taken ? 1 : 0.35 } })), h("td", { class: "number" }, num(share, 3)), found.values?.[step] ? h("td", { class: "number" }, `Q ${num(found.values[step][action], 3)}`) : null));
      const says = taken === undefined ? "the path has ended" : `expert ${taken}${strength}`;
      return h("section", {}, h("h3", {}, `${data.about_tokens ? "layer" : "step"} ${step + 1}: ${says}`), moved ? h("p", { class: "soft" }, moved) : null, h("table", { class: "shares" }, h("tbody", {}, bars)));
    });
    parts.panel.append(...steps);
  }

  /** Give each token the colour of its expert in one layer, as the run's weights choose it. */
  async colourTokens(row, words, place, turn) {
    const found = await post(`/api/run/${this.id}/probe`, { kind: "tokens", sample: row, anyway: true }).catch(() => null);
    if (!found || turn !== this.turn) return;
    const paint = (layer) => {
      const experts = found.layers[layer];
      [...words.children].forEach((word, n) => {
        const expert = experts[n];
        word.style.borderColor = colour(expert);
        word.style.boxShadow = `inset 0 -4px 0 ${colour(expert)}`;
        word.title = `expert ${expert}`;
      });
      const used = [...new Set(experts)].sort((a, b) => a - b);
      put(place, select("tokens by their expert in", found.layers.map((_, n) => [n, `layer ${n + 1}`]), layer, (value) => paint(Number(value))), h("ul", { class: "legend" }, used.map((expert) => h("li", {}, h("i", { class: "dot", css: { background: colour(expert) } }), `expert ${expert}`))));
    };
    paint(0);
  }

  key(event) {
    if (!document.contains(this.parts.graph) || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "Escape" && !document.fullscreenElement) this.change({ node: "", sample: "" }, true);
    if (event.key === "f") this.parts.graph.requestFullscreen?.();
  }
}
