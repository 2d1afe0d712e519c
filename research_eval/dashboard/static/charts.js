// Curves and clouds of points as pictures that a screen reader can name.
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

function scale(values, from, to, logarithmic = false) {
  const map = logarithmic ? (value) => Math.log10(Math.max(value, 1e-12)) : (value) => value;
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) [low, high] = [Math.min(low, map(value)), Math.max(high, map(value))];
  if (!(high > low)) [low, high] = [low - 0.5, low + 0.5];
  const at = (value) => from + ((map(value) - low) / (high - low)) * (to - from);
  const back = (share) => (logarithmic ? 10 ** (low + share * (high - low)) : low + share * (high - low));
  return { at, ticks: [0, 0.25, 0.5, 0.75, 1].map(back) };
}

const tick = (value) => (Math.abs(value) >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3))));

function frame(title, x, y, xName, yName) {
  const bottom = CHART_HEIGHT - SIDE.bottom;
  const lines = y.ticks.map((value) => [
    s("line", { x1: SIDE.left, x2: CHART_WIDTH - SIDE.right, y1: y.at(value), y2: y.at(value), class: "grid" }),
    s("text", { x: SIDE.left - 6, y: y.at(value) + 4, class: "tick end" }, tick(value)),
  ]);
  const below = x.ticks.map((value, place) => s("text", { x: x.at(value), y: bottom + 16, class: place === 4 ? "tick end" : "tick middle" }, tick(value)));
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

/** A cloud: `points` are {x, y, name, colour, href}. */
export function cloud(title, points, xName, yName, logarithmic = false) {
  if (!points.length) return h("p", { class: "soft" }, `${title}: nothing to show`);
  const x = scale(points.map((one) => one.x), SIDE.left, CHART_WIDTH - SIDE.right - 6, logarithmic);
  const y = scale(points.map((one) => one.y), CHART_HEIGHT - SIDE.bottom - 6, SIDE.top + 6);
  const picture = frame(title, x, y, xName, yName);
  for (const one of points) {
    const dot = s("circle", { cx: x.at(one.x).toFixed(1), cy: y.at(one.y).toFixed(1), r: 4, fill: one.colour || colour(0), class: "point" }, s("title", {}, one.name));
    picture.append(one.href ? s("a", { href: one.href, "aria-label": one.name }, dot) : dot);
  }
  return h("figure", {}, h("figcaption", {}, title), picture);
}
