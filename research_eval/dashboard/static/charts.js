// Curves, points, bars and parallel axes as pictures that a screen reader can name.
import { colour, h, num, s } from "./dom.js";

const CHART_WIDTH = 560;
const CHART_HEIGHT = 230;
const SIDE = { left: 58, right: 12, top: 12, bottom: 34 };

/** A colour for a series by its name, the same one in every chart and page. */
export function colourOf(name) {
  let sum = 0;
  for (const letter of name) sum = (sum * 31 + letter.codePointAt(0)) >>> 0;
  return colour(sum % 8);
}

function scale(values, from, to) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
  if (!(high > low)) [low, high] = [low - 0.5, low + 0.5];
  const at = (value) => from + ((value - low) / (high - low)) * (to - from);
  const whole = high - low >= 4 && values.every(Number.isInteger);
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((share) => low + share * (high - low)).map((one) => (whole ? Math.round(one) : one));
  return { at, ticks, texts: ticks.map(tick) };
}

/** A scale that the server has chosen, with its ticks. */
function given(found, from, to) {
  const map = found.log ? Math.log : (value) => value;
  const [low, high] = [map(found.low), map(found.high)];
  return { at: (value) => from + ((map(value) - low) / (high - low)) * (to - from), ticks: found.ticks, texts: found.texts };
}

const tick = (value) => (Math.abs(value) >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3))));

function frame(title, x, y, xName, yName) {
  const bottom = CHART_HEIGHT - SIDE.bottom;
  const lines = y.ticks.map((value, place) => [
    s("line", { x1: SIDE.left, x2: CHART_WIDTH - SIDE.right, y1: y.at(value), y2: y.at(value), class: "grid" }),
    s("text", { x: SIDE.left - 6, y: y.at(value) + 4, class: "tick end" }, y.texts[place]),
  ]);
  const below = x.ticks.map((value, place) => s("text", { x: x.at(value), y: bottom + 16, class: x.at(value) > CHART_WIDTH - 40 ? "tick end" : "tick middle" }, x.texts[place]));
  const names = [
    s("text", { x: (SIDE.left + CHART_WIDTH - SIDE.right) / 2, y: CHART_HEIGHT - 4, class: "tick middle" }, xName),
    s("text", { x: 12, y: 10, class: "tick" }, yName),
  ];
  return s("svg", { viewBox: `0 0 ${CHART_WIDTH} ${CHART_HEIGHT}`, role: "img", "aria-label": title, class: "chart" }, s("title", {}, title), lines, below, names);
}

/** Every n-th point, so that at most `most` are drawn; the last one always. */
export function thinned(points, most = 600) {
  const stride = Math.ceil(points.length / most);
  return stride <= 1 ? points : points.filter((_, place) => place % stride === 0 || place === points.length - 1);
}

/** Exponential moving mean; `weight` 0 leaves the points as they are. */
export function smoothed(points, weight) {
  let mean = null;
  return points.map(([x, y]) => {
    mean = mean === null ? y : weight * mean + (1 - weight) * y;
    return [x, mean];
  });
}

/** Curves: `series` are {name, points [[x, y]], colour?, thin?}. */
export function lines(title, series, xName = "step", yName = "") {
  const drawn = series.map((one) => ({ ...one, points: thinned(one.points) })).filter((one) => one.points.length);
  if (!drawn.length) return h("p", { class: "soft" }, `${title}: nothing yet`);
  const points = drawn.flatMap((one) => one.points);
  const x = scale(points.map((point) => point[0]), SIDE.left, CHART_WIDTH - SIDE.right);
  const y = scale(points.map((point) => point[1]), CHART_HEIGHT - SIDE.bottom, SIDE.top);
  const picture = frame(title, x, y, xName, yName);
  for (const one of drawn) {
    const text = one.points.map(([a, b]) => `${x.at(a).toFixed(1)},${y.at(b).toFixed(1)}`).join(" ");
    const tone = one.colour || colourOf(one.name);
    const last = one.points[one.points.length - 1];
    picture.append(s("polyline", { points: text, stroke: tone, class: one.thin ? "curve thin" : "curve" }, s("title", {}, one.name)));
    if (one.points.length === 1) picture.append(s("circle", { cx: x.at(last[0]), cy: y.at(last[1]), r: 3, fill: tone }));
  }
  const legend = drawn.filter((one) => !one.thin).map((one) => h("li", {}, h("i", { class: "dot", css: { background: one.colour || colourOf(one.name) } }), `${one.name} ${num(one.points[one.points.length - 1][1])}`));
  return h("figure", {}, h("figcaption", {}, title), picture, h("ul", { class: "legend" }, legend));
}

/**
 * Points and a step line on scales of the server. `points` are {x, y, name, colour, faint?, open?}; `steps` are corners.
 * The mouse opens a point; with a keyboard, the table of the page has the same links.
 */
export function scatter(title, { points, steps, rises, xScale, yScale, xName, yName }) {
  const x = xScale ? given(xScale, SIDE.left, CHART_WIDTH - SIDE.right) : scale(points.map((one) => one.x), SIDE.left + 8, CHART_WIDTH - SIDE.right - 8);
  const y = given(yScale, CHART_HEIGHT - SIDE.bottom, SIDE.top);
  const picture = frame(title, x, y, xName, yName);
  const corners = steps.flatMap((one, place) => {
    const before = steps[place - 1];
    if (!before) return [one];
    return rises ? [[one[0], before[1]], one] : [[before[0], one[1]], one];
  });
  picture.append(s("polyline", { points: corners.map(([a, b]) => `${x.at(a).toFixed(1)},${y.at(b).toFixed(1)}`).join(" "), class: "curve steps" }));
  for (const one of points) {
    picture.append(s("circle", { cx: x.at(one.x).toFixed(1), cy: y.at(one.y).toFixed(1), r: one.faint ? 3 : 4.5, fill: one.colour, class: one.faint ? "point faint" : "point", onclick: one.open }, s("title", {}, one.name)));
  }
  return h("figure", {}, h("figcaption", {}, title), picture);
}

/** Lists of bars: shares from 0 to `limit`, each with a mark for what chance gives. */
export function bars(list, limit) {
  const width = (share) => `${(100 * Math.min(share, limit)) / limit}%`;
  const row = ([name, share, chance, clear]) => h(
    "tr",
    {},
    h("th", { scope: "row" }, name),
    h("td", { class: "bars" }, h("span", { class: clear ? "share" : "share inside", css: { width: width(share), background: clear ? list.colour : "" } }), chance === null ? null : h("span", { class: "base", css: { left: width(chance) } })),
    h("td", { class: "number" }, num(share, 2)),
    h("td", { class: "number soft" }, chance === null ? "–" : num(chance, 2)),
  );
  const head = h("thead", {}, h("tr", {}, ["parameter", "", "share", "by chance"].map((text) => h("th", { scope: "col" }, text))));
  return h(
    "figure",
    {},
    h("figcaption", {}, list.title, list.subtitle ? h("span", { class: "soft" }, ` ${list.subtitle}`) : null),
    list.bars.length ? h("table", { class: "shares" }, head, h("tbody", {}, list.bars.map(row))) : null,
    list.note ? h("p", { class: "soft" }, list.note) : null,
  );
}

const AXES = { width: 1160, height: 300, left: 40, right: 40, top: 46, bottom: 14 };

/** Trials as lines through upright axes. The last axis gives the shades; `name` says a trial and `open` shows it. */
export function parallel({ title, axes, trials, shades }, name, open) {
  const { width, height, left, right, top, bottom } = AXES;
  const x = (place) => left + (place * (width - left - right)) / Math.max(axes.length - 1, 1);
  const y = (at) => height - bottom - at * (height - top - bottom);
  const picture = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: parameters and result of every trial`, class: "parallel" });
  const order = trials.map((_, place) => place).sort((a, b) => shades[a] - shades[b]); // the best lie above the others
  for (const place of order) {
    const text = axes.map((axis, n) => `${x(n).toFixed(1)},${y(axis.places[place]).toFixed(1)}`).join(" ");
    picture.append(s("polyline", { points: text, class: `trial shade${shades[place]}`, onclick: () => open(trials[place]) }, s("title", {}, name(trials[place]))));
  }
  axes.forEach((axis, n) => {
    const words = axis.label.length > 18 ? `${axis.label.slice(0, 17)}…` : axis.label;
    const end = n === 0 ? "tick" : n === axes.length - 1 ? "tick end" : "tick middle";
    picture.append(
      s("line", { x1: x(n), x2: x(n), y1: y(0), y2: y(1), class: "axis" }),
      s("text", { x: n === 0 ? 2 : n === axes.length - 1 ? width - 2 : x(n), y: n % 2 ? 30 : 14, class: `${end} label` }, words, s("title", {}, axis.label)),
      ...axis.ticks.map(([at, text]) => s("text", { x: n === axes.length - 1 ? x(n) - 5 : x(n) + 5, y: y(at) + 4, class: n === axes.length - 1 ? "tick end" : "tick" }, text)),
    );
  });
  return h("figure", { class: "whole" }, h("figcaption", {}, title), picture);
}
