/** Text classification: scores = softmax(logits), the label is the greatest. */

import { RANKS } from "./adapters.js";
import { HIDDEN } from "./cache.js";
import { EdgePeftError } from "./files.js";
import { Model } from "./model.js";
import { softmax } from "./sampling.js";
import { checkText } from "./tokens.js";

export class Classifier extends Model {
  get labels() {
    return this.active.labels;
  }

  /** Return the logits of a text, one for each label: a Float32Array. */
  async logits(text, { adapter } = {}) {
    checkText("text", text);
    if (!text.trim()) throw new EdgePeftError("text: empty. There is nothing to classify.");
    return this.runs(adapter, (chosen) => this.#logits(text, chosen));
  }

  async #logits(text, { feeds, labels, rows }) {
    const ids = this.tokens.encode(text);
    const tensor = (...about) => this.engine.tensor(...about);
    const { inputs } = this.engine.graph;
    const shown = inputs.has("prompt_batch") ? rows || RANKS : 0; // before the text, hidden where the adapter has none
    const read = inputs.has("prompt_first") ? shown : 0; // of these, as tokens are
    const [width, queries, keys] = [ids.length, read + ids.length, shown + ids.length];
    const first = Array.from({ length: keys }, (_, key) => (key < shown && !rows ? HIDDEN : 0));
    const places = Array.from({ length: queries }, (_, place) => (place < read ? place : rows + place - read));
    const counted = {
      input_ids: tensor("int64", [1, width], ids),
      attention_mask: tensor("int64", [1, width], ids.map(() => 1)),
      token_type_ids: tensor("int64", [1, queries], places.map(() => 0)),
      position_ids: tensor("int64", [queries], places),
      attention_bias: tensor("float32", [1, 1, queries, keys], places.flatMap(() => first)),
      attention_bias_first: tensor("float32", [1, 1, 1, keys], first),
      prompt_batch: tensor("int64", [3], [1, 1, 1]),
      prompt_first: tensor("int64", [1], [rows ? 0 : shown]),
    };
    const { logits } = await this.engine.run({ ...feeds, ...this.engine.taken(counted) });
    if (logits.dims.at(-1) !== labels.length) {
      throw new EdgePeftError(`its head gives ${logits.dims.at(-1)} logits, the adapter names ${labels.length} labels.`);
    }
    if (!logits.data.every(Number.isFinite)) throw new EdgePeftError("the model gave logits that are not finite.");
    return logits.data;
  }

  /** Return {label, score, scores} of a text, or a list of them for a list of texts. */
  async classify(text, options = {}) {
    if (Array.isArray(text)) {
      const out = [];
      for (const one of text) out.push(await this.classify(one, options));
      return out;
    }
    const { labels } = await this.chosen(options.adapter);
    const shares = softmax(await this.logits(text, options));
    const order = labels.map((_, place) => place).sort((a, b) => shares[b] - shares[a] || a - b);
    const kept = order.slice(0, options.topK ?? order.length);
    const scores = Object.fromEntries(kept.map((place) => [labels[place], shares[place]]));
    return { label: labels[order[0]], score: shares[order[0]], scores };
  }
}
