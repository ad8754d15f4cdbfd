/**
 * Choosing the next token, by the rules of `edgepeft.runtime.sampling`:
 *
 *     logits ─► repetition penalty ─► / temperature ─► top-k ─► top-p ─► min-p ─► softmax ─► one draw
 *
 * Chance is a generator of its own (mulberry32), so a seed gives the same answer again here, and another than in Python.
 */

import { EdgePeftError } from "./files.js";

const RANGES = {
  // lowest, highest, whether the lowest itself is allowed
  temperature: [0, Infinity, true],
  topK: [0, Infinity, true],
  topP: [0, 1, false],
  minP: [0, 1, true],
  repetitionPenalty: [0, Infinity, false],
};
const GREEDY = { temperature: 0, topK: 0, topP: 1, minP: 0, repetitionPenalty: 1 };

function chance(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Return probabilities of scores. */
export function softmax(scores) {
  const most = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Array.from(scores, (score) => Math.exp(score - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

/** Return [{id, score}] of the tokens that the filters leave; logits are after the penalty. */
export function candidates(logits, { temperature, topK, topP, minP }) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  let rows = Array.from(logits, (logit, id) => ({ id, score: (logit - most) / temperature }));
  if (topK > 0) {
    const edge = rows.map((row) => row.score).sort((a, b) => b - a)[Math.min(topK, rows.length) - 1];
    rows = rows.filter((row) => row.score >= edge);
  }
  if (topP < 1) {
    const shares = softmax(rows.map((row) => row.score));
    const order = rows.map((_, place) => place).sort((a, b) => rows[a].score - rows[b].score || a - b);
    const dropped = new Set();
    let below = 0;
    for (const place of order.slice(0, -1)) if ((below += shares[place]) <= 1 - topP) dropped.add(place);
    rows = rows.filter((_, place) => !dropped.has(place));
  }
  if (minP > 0) rows = rows.filter((row) => Math.exp(row.score - Math.max(...rows.map((r) => r.score))) >= minP);
  return rows;
}

export class Sampler {
  /** Throws EdgePeftError for a setting that cannot be. */
  constructor(options, seen) {
    this.settings = { ...GREEDY };
    for (const [name, [low, high, closed]] of Object.entries(RANGES)) {
      const value = options[name] ?? GREEDY[name];
      const right = Number.isFinite(value) && value >= low && value <= high && (closed || value > low);
      if (!right || (name === "topK" && !Number.isInteger(value))) {
        throw new EdgePeftError(`${name}: expected a number from ${low} to ${high}, found ${value}.`);
      }
      this.settings[name] = value;
    }
    this.seen = new Set(seen);
    this.random = chance(options.seed ?? Math.random() * 2 ** 32);
  }

  /** Return the next token. Throws EdgePeftError for logits that are not finite. */
  pick(logits) {
    if (!logits.every(Number.isFinite)) throw new EdgePeftError("the model gave logits that are not finite.");
    const token = this.#choose(this.#penalized(logits));
    this.seen.add(token);
    return token;
  }

  #penalized(logits) {
    const { repetitionPenalty: penalty } = this.settings;
    if (penalty === 1) return logits;
    const out = Float64Array.from(logits);
    for (const id of this.seen) out[id] *= out[id] < 0 ? penalty : 1 / penalty;
    return out;
  }

  #choose(logits) {
    if (this.settings.temperature === 0) return logits.reduce((best, logit, id) => (logit > logits[best] ? id : best), 0);
    const rows = candidates(logits, this.settings);
    const shares = softmax(rows.map((row) => row.score));
    let left = this.random();
    const place = shares.findIndex((share) => (left -= share) < 0);
    return rows.at(place).id; // -1, by rounding, is the last
  }
}
