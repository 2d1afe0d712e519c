// What the page computes about samples and experts. tests/test_dashboard.py computes the same with numpy and scipy.

/** A generator of numbers from 0 to 1 that a seed decides (mulberry32). */
export function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

/** How far `both` of `node` samples lie from chance, if `kind` of `all` samples are of a kind (hypergeometric). */
export function zScore(both, node, kind, all) {
  const mean = (node * kind) / all;
  const variance = all > 1 ? (mean * (all - kind) * (all - node)) / (all * (all - 1)) : 0;
  return variance > 1e-12 ? (both - mean) / Math.sqrt(variance) : 0;
}

function quantile(values, share) {
  const sorted = Float64Array.from(values).sort();
  const place = share * (sorted.length - 1);
  const low = Math.floor(place);
  return sorted[low] + (place - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

/**
 * The kinds of the samples in a node beside those of all samples that reach its step.
 * `members` has for each kind the places (0..all-1) of its samples; `inside` is 1 at the places in the node.
 * The band is the 95th percentile of the largest |z| over all kinds when the node's samples are drawn at random.
 */
export function enrichment(members, inside, shuffles = 300, seed = 1) {
  const all = inside.length;
  const node = inside.reduce((sum, one) => sum + one, 0);
  const counts = counter(members, all);
  const both = counts(Int32Array.from(inside.keys()).filter((place) => inside[place]));
  const rows = members.map((places, kind) => ({ kind, both: both[kind], total: places.length, share: node ? both[kind] / node : 0, base: places.length / Math.max(all, 1), z: zScore(both[kind], node, places.length, all) }));
  // |z| of a kind grows with the distance of its count from the mean, the same for a set and for its complement: so we
  // draw the smaller of the two.
  const drawn = Math.min(node, all - node);
  const means = members.map((places) => (drawn * places.length) / all);
  const scales = members.map((places, kind) => zScore(means[kind] + 1, drawn, places.length, all)); // 1 / deviation
  const random = generator(seed);
  const places = Int32Array.from(inside.keys());
  const largest = [];
  for (let turn = 0; turn < shuffles; turn += 1) {
    for (let place = 0; place < drawn; place += 1) {
      const other = place + Math.floor(random() * (all - place));
      [places[place], places[other]] = [places[other], places[place]];
    }
    const found = counts(places.subarray(0, drawn));
    let most = 0;
    for (let kind = 0; kind < means.length; kind += 1) most = Math.max(most, Math.abs(found[kind] - means[kind]) * scales[kind]);
    largest.push(most);
  }
  const band = largest.length ? quantile(largest, 0.95) : 0;
  return { rows: rows.map((row) => ({ ...row, outside: Math.abs(row.z) > band })), band, node, all };
}

/** A function that counts the kinds of some places. The next call writes into the same array. */
function counter(members, all) {
  const starts = new Int32Array(all + 1); // the kinds of place n stand in `kinds` from starts[n] on
  for (const places of members) for (const place of places) starts[place + 1] += 1;
  for (let place = 0; place < all; place += 1) starts[place + 1] += starts[place];
  const kinds = new Int32Array(starts[all]);
  const next = starts.slice();
  members.forEach((places, kind) => { for (const place of places) kinds[next[place]++] = kind; });
  const found = new Int32Array(members.length);
  return (places) => {
    found.fill(0);
    for (const place of places) for (let at = starts[place]; at < starts[place + 1]; at += 1) found[kinds[at]] += 1;
    return found;
  };
}

/** The 95 % interval of a share (Wilson). */
export function wilson(hits, trials) {
  if (!trials) return [0, 1];
  const z = 1.959963984540054;
  const rate = hits / trials;
  const middle = (rate + (z * z) / (2 * trials)) / (1 + (z * z) / trials);
  const half = (z / (1 + (z * z) / trials)) * Math.sqrt((rate * (1 - rate)) / trials + (z * z) / (4 * trials * trials));
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}

/** The exact p-value of McNemar's test, two-sided, from the numbers of samples that changed in each direction. */
export function mcnemar(lost, won) {
  const total = lost + won;
  if (!total) return 1;
  let logarithm = -total * Math.LN2;
  let tail = 0;
  for (let k = 0; k <= Math.min(lost, won); k += 1) {
    tail += Math.exp(logarithm);
    logarithm += Math.log(total - k) - Math.log(k + 1);
  }
  return Math.min(1, 2 * tail);
}

/** The mean change of paired right answers, and half of its normal 95 % interval. */
export function pairedChange(before, after, places) {
  const n = places.length;
  let sum = 0;
  let squares = 0;
  let lost = 0;
  let won = 0;
  for (const place of places) {
    const change = after[place] - before[place];
    sum += change;
    squares += change * change;
    lost += change < 0;
    won += change > 0;
  }
  const mean = n ? sum / n : 0;
  const variance = n > 1 ? (squares - n * mean * mean) / (n - 1) : 0;
  return { n, mean, half: n ? 1.959963984540054 * Math.sqrt(variance / n) : 0, lost, won, p: mcnemar(lost, won) };
}

/** p-values after Holm's correction, in their order. */
export function holm(values) {
  const order = values.map((_, place) => place).sort((a, b) => values[a] - values[b]);
  const found = new Array(values.length);
  let largest = 0;
  order.forEach((place, rank) => {
    largest = Math.max(largest, Math.min(1, (values.length - rank) * values[place]));
    found[place] = largest;
  });
  return found;
}

/** The assignment of rows to columns with the least cost (Hungarian method); `cost` is square. */
export function assignment(cost) {
  const n = cost.length;
  const u = new Array(n + 1).fill(0);
  const v = new Array(n + 1).fill(0);
  const match = new Array(n + 1).fill(0);
  const way = new Array(n + 1).fill(0);
  for (let row = 1; row <= n; row += 1) {
    match[0] = row;
    let column = 0;
    const least = new Array(n + 1).fill(Infinity);
    const used = new Array(n + 1).fill(false);
    do {
      used[column] = true;
      const current = match[column];
      let delta = Infinity;
      let next = 0;
      for (let j = 1; j <= n; j += 1) {
        if (used[j]) continue;
        const reduced = cost[current - 1][j - 1] - u[current] - v[j];
        if (reduced < least[j]) [least[j], way[j]] = [reduced, column];
        if (least[j] < delta) [delta, next] = [least[j], j];
      }
      for (let j = 0; j <= n; j += 1) {
        if (used[j]) [u[match[j]], v[j]] = [u[match[j]] + delta, v[j] - delta];
        else least[j] -= delta;
      }
      column = next;
    } while (match[column] !== 0);
    do {
      match[column] = match[way[column]];
      column = way[column];
    } while (column);
  }
  const found = new Array(n);
  for (let j = 1; j <= n; j += 1) found[match[j] - 1] = j - 1;
  return found;
}

/** How much two sets of paths agree when expert i of the first is expert order[i] of the second. */
export function overlap(first, second, steps, experts, order) {
  let same = 0;
  const size = first.length / steps;
  for (let place = 0; place < size * steps; place += 1) {
    const mine = first[place];
    same += mine >= 0 ? order[mine] === second[place] : second[place] < 0;
  }
  return same / Math.max(size * steps, 1);
}

/** The assignment of experts of two sets of paths whose samples overlap most (Jaccard), and the share that then agrees. */
function fitted(first, second, steps, experts) {
  const both = Array.from({ length: experts }, () => new Float64Array(experts));
  const ofFirst = new Float64Array(experts);
  const ofSecond = new Float64Array(experts);
  for (let place = 0; place < first.length; place += 1) {
    const [a, b] = [first[place], second[place]];
    if (a >= 0) ofFirst[a] += 1;
    if (b >= 0) ofSecond[b] += 1;
    if (a >= 0 && b >= 0) both[a][b] += 1;
  }
  const cost = both.map((row, a) => Array.from(row, (n, b) => 1 - n / Math.max(ofFirst[a] + ofSecond[b] - n, 1)));
  const order = assignment(cost);
  return { order, overlap: overlap(first, second, steps, experts, order) };
}

function shuffle(values, random) {
  for (let place = values.length - 1; place > 0; place -= 1) {
    const other = Math.floor(random() * (place + 1));
    [values[place], values[other]] = [values[other], values[place]];
  }
}

/**
 * Experts of a second run renumbered to fit the first, and whether they fit better than by chance.
 * `chance` is the mean over random numbers. The best of all numbers is better than that for any two runs, so that `fits`
 * compares with the best numbers for samples of the second run in random order; `band` is their 95th percentile.
 */
export function matching(first, second, steps, experts, turns = 200, seed = 1) {
  const found = fitted(first, second, steps, experts);
  const random = generator(seed);
  const any = Array.from({ length: experts }, (_, n) => n);
  let sum = 0;
  const largest = [];
  const rows = Array.from({ length: first.length / steps }, (_, n) => n);
  const mixed = second.slice();
  for (let turn = 0; turn < turns; turn += 1) {
    shuffle(any, random);
    sum += overlap(first, second, steps, experts, any);
    shuffle(rows, random);
    rows.forEach((row, place) => {
      for (let step = 0; step < steps; step += 1) mixed[place * steps + step] = second[row * steps + step];
    });
    largest.push(fitted(first, mixed, steps, experts).overlap);
  }
  const band = quantile(largest, 0.95);
  return { ...found, chance: sum / turns, band, fits: found.overlap > band };
}

/** For each expert the number of its decisions by class, as shares of all decisions of the run [experts][kinds]. */
function profiles(paths, label, steps, experts, kinds) {
  const found = Array.from({ length: experts }, () => new Float64Array(kinds));
  let all = 0;
  for (let place = 0; place < paths.length; place += 1) {
    if (paths[place] < 0) continue;
    found[paths[place]][label[Math.floor(place / steps)]] += 1;
    all += 1;
  }
  for (const row of found) row.forEach((n, kind) => { row[kind] = n / Math.max(all, 1); });
  return found;
}

/** What two lists of profiles have in common when expert i of the first is expert order[i] of the second, from 0 to 1. */
function inCommon(first, second, order) {
  return first.reduce((sum, row, a) => sum + row.reduce((part, share, kind) => part + Math.min(share, second[order[a]][kind]), 0), 0);
}

/**
 * As `matching`, for runs with other samples: by the classes that the experts get. The null gives the samples of the
 * second run their classes in random order, and takes the best numbers again.
 */
export function profileMatching(first, second, experts, turns = 200, seed = 1) {
  const kinds = 1 + Math.max(...new Set(first.label), ...new Set(second.label));
  const mine = profiles(first.path, first.label, first.steps, experts, kinds);
  const best = (label) => {
    const other = profiles(second.path, label, second.steps, experts, kinds);
    const order = assignment(mine.map((_, a) => other.map((_row, b) => -mine[a].reduce((sum, share, kind) => sum + Math.min(share, other[b][kind]), 0))));
    return { order, other, overlap: inCommon(mine, other, order) };
  };
  const { order, other, overlap: found } = best(second.label);
  const random = generator(seed);
  const any = Array.from({ length: experts }, (_, n) => n);
  const mixed = second.label.slice();
  const largest = [];
  let sum = 0;
  for (let turn = 0; turn < turns; turn += 1) {
    shuffle(any, random);
    sum += inCommon(mine, other, any);
    shuffle(mixed, random);
    largest.push(best(mixed).overlap);
  }
  const band = quantile(largest, 0.95);
  return { order, overlap: found, chance: sum / turns, band, fits: found > band };
}
