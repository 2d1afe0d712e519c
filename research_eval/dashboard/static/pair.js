// The graph of a second run, whose experts get the numbers of the first run that fit best.
import { h, percent } from "./dom.js";
import { draw, flows } from "./graph.js";
import { matching, profileMatching } from "./stats.js";

const equal = (first, second) => Boolean(first && second && first.length === second.length && first.every((one, place) => one === second[place]));

/** What stands below the first graph. `view` is the Atlas. */
export function secondGraph({ second, data, kept, samples }) {
  if (second.error) return [h("p", { class: "error" }, second.error)];
  const other = second.data;
  if (second.beside !== data) Object.assign(second, { beside: data, ...matched(second, data, samples) }); // it takes long
  const { found, isSame } = second;
  const inverse = new Map(found?.order.map((b, a) => [b, a]));
  const numbers = found?.fits ? (expert) => inverse.get(expert) : (expert) => expert;
  const rows = isSame ? kept : Array.from({ length: other.samples }, (_, row) => row);
  const shown = { paths: other.path, steps: other.steps, correct: other.correct, kept: rows };
  const picture = draw({ ...shown, flow: flows(shown) }, { title: `Paths of run ${second.id}`, order: numbers, numbers });
  return [h("h2", {}, `Run ${second.id}, epoch ${second.epoch}`), h("p", { class: "soft" }, isSame ? saidOfSamples(found) : saidOfClasses(found)), picture];
}

/** Whether both runs have the same samples, and how their experts fit each other; null if nothing can be said. */
function matched(second, data, samples) {
  const other = second.data;
  const isSame = other.samples === data.samples && other.steps === data.steps && equal(other.label, data.label) && equal(second.tokens, samples?.tokens);
  const experts = Math.max(data.experts, other.experts);
  const hasSameClasses = equal(second.labels, samples?.names.labels) && new Set(other.label).size === new Set(data.label).size;
  const found = isSame ? matching(data.path, other.path, data.steps, experts) : hasSameClasses ? profileMatching(data, other, experts) : null;
  return { isSame, found };
}

function saidOfSamples({ fits, overlap, chance, band }) {
  const limit = `up to ${percent(band)} with the best numbers for samples in random order`;
  return fits
    ? `Its experts have the numbers of the first run that fit best: ${percent(overlap)} of all decisions agree (${percent(chance)} with random numbers; ${limit}).`
    : `No numbering fits better than chance (the best ${percent(overlap)}; ${limit}), so its experts keep their own numbers.`;
}

function saidOfClasses(found) {
  const begin = "Its validation samples are other ones, so the filters do not count here.";
  if (!found) return `${begin} It has other classes, so its experts keep their own numbers.`;
  const said = `the classes that the experts get have ${percent(found.overlap)} in common (${percent(found.chance)} with random numbers; up to ${percent(found.band)} with the best numbers for classes in random order)`;
  return found.fits ? `${begin} Its experts have the numbers that fit best: ${said}.` : `${begin} No numbering fits better than chance: ${said}. So its experts keep their own numbers.`;
}
