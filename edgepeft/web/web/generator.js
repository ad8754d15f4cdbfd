/**
 * A language model that writes: the prompt in parts, then token by token, keys and values on the GPU between runs.
 *
 *     ids ──► run ──► logits of the last token ──► Sampler ──► Decoding ──► Stops ──► shown
 *
 * The last answer's keys and values stay for a prompt that begins alike, under the same adapter only. An adapter's own
 * keys and values stand before the text, and take their columns from the context.
 */

import { cacheOf, hidden } from "./cache.js";
import { chatTemplate } from "./chat.js";
import { EdgePeftError } from "./files.js";
import { Model } from "./model.js";
import { Sampler } from "./sampling.js";
import { Decoding, Stops, checkText } from "./tokens.js";

const CHUNK = 256; // tokens of a prompt that one run reads
const MAX_NEW_TOKENS = 256;

/** Return how many columns of the context an adapter's own keys and values take. */
const columns = (adapter) => [...adapter.prompt.values()][0]?.dims[2] ?? 0;

export class Generator extends Model {
  async prepare() {
    this.about = this.files.manifest.decoder;
    this.context = this.files.manifest.context;
    this.template = await chatTemplate(this.files);
  }

  /** Return the tokens of a prompt: a text, or messages. */
  encode(prompt, templateOptions) {
    const words = typeof prompt === "string" ? prompt : this.#rendered(prompt, templateOptions);
    checkText("prompt", words);
    const ids = this.tokens.ids(words);
    const { bos, add_bos: first } = this.about;
    if (typeof prompt === "string" && first && bos != null && ids[0] !== bos) ids.unshift(bos);
    if (!ids.length) throw new EdgePeftError("prompt: empty, and this model has no token to begin with.");
    if (ids.length > this.context) {
      throw new EdgePeftError(`prompt: ${ids.length} tokens, this model's context has ${this.context}. Shorten it.`);
    }
    return ids;
  }

  /** Write an answer; see edgepeft.d.ts. */
  generate(prompt, options = {}) {
    const pieces = this.#write(prompt, options);
    if (options.stream) return pieces;
    return (async () => {
      for (;;) {
        const { done, value } = await pieces.next();
        if (done) return value;
      }
    })();
  }

  /** Answer messages, or one of the user. */
  chat(messages, options) {
    return this.generate(typeof messages === "string" ? [{ role: "user", content: messages }] : messages, options);
  }

  /** Return the logits of the last token of a list: a Float32Array [vocabulary]. */
  async logits(ids, { adapter } = {}) {
    return this.runs(adapter, (chosen) => this.#read(ids, chosen));
  }

  // --- how it is done ---

  #rendered(messages, options) {
    if (!this.template) throw new EdgePeftError("this bundle has no chat template. Give a text in place of messages.");
    return this.template(messages, options);
  }

  async *#write(prompt, options) {
    const { maxNewTokens = MAX_NEW_TOKENS, stop = [], signal, adapter, templateOptions } = options;
    if (!Number.isInteger(maxNewTokens) || maxNewTokens < 1) {
      throw new EdgePeftError(`maxNewTokens: expected a whole number of at least 1, found ${maxNewTokens}.`);
    }
    const ids = this.encode(prompt, templateOptions);
    const chosen = await this.chosen(adapter);
    const room = this.context - columns(chosen) - ids.length;
    if (room < 0) throw new EdgePeftError(`prompt: ${-room} tokens more than fit behind adapter '${chosen.name}'.`);
    const row = {
      limit: Math.min(maxNewTokens, room),
      sampler: new Sampler(options, ids),
      decoding: new Decoding(this.tokens, typeof prompt === "string" ? ids : []),
      stops: new Stops([stop].flat()),
      answer: { text: "", tokens: [], finish: "", promptTokens: ids.length },
    };
    const { answer } = row;
    if (row.limit === 0) answer.finish = "length";
    while (!answer.finish) {
      if (signal?.aborted) {
        answer.finish = "cancelled";
        answer.text += row.stops.push(row.decoding.flush()) + row.stops.flush();
        break;
      }
      const logits = await this.runs(chosen.name, (own) => this.#read([...ids, ...answer.tokens], own));
      const piece = this.#take(row, row.sampler.pick(logits));
      answer.text += piece;
      if (piece) yield piece;
    }
    return answer;
  }

  #take({ limit, decoding, stops, answer }, token) {
    const ended = this.about.eos.includes(token);
    answer.tokens.push(token);
    let piece = ended ? "" : stops.push(decoding.push(token));
    if (ended || stops.hit || answer.tokens.length === limit) {
      answer.finish = ended ? "eos" : stops.hit ? "stop" : "length";
      if (!stops.hit) {
        piece += stops.push(decoding.flush());
        if (stops.hit) answer.finish = "stop";
        piece += stops.flush();
      }
    }
    return piece;
  }

  /** Drop what was read, and begin as an adapter does. */
  #begin(adapter) {
    this.cache?.free();
    this.cache = cacheOf(this.engine, this.about, adapter.prompt, this.context);
    this.seen = [];
    this.seenBy = adapter;
  }

  /** Read tokens, of which those read last need not be read again, and return the logits of the last. */
  async #read(ids, adapter) {
    if (this.seenBy !== adapter) this.#begin(adapter);
    let known = 0;
    while (known < Math.min(this.seen.length, ids.length - 1) && this.seen[known] === ids[known]) known++;
    if (2 * known < this.seen.length) this.#begin(adapter); // what is read again costs less than to carry so much along
    this.seen = this.seen.slice(0, known);
    let logits;
    for (let start = this.seen.length; start < ids.length; start += CHUNK) {
      logits = await this.#run(ids.slice(start, start + CHUNK), adapter);
    }
    return logits;
  }

  async #run(ids, adapter) {
    const tensor = (...about) => this.engine.tensor(...about);
    const start = columns(adapter) + this.seen.length;
    const total = start + ids.length;
    const { feeds, fetches } = this.cache.bind(total);
    const { capacity } = this.cache;
    const counted = {
      input_ids: tensor("int64", [1, ids.length], ids),
      attention_mask: tensor("int64", [1, total], new Array(total).fill(1)),
      logits_to_keep: tensor("int64", [1], [1]),
      one_token: tensor("bool", [], [ids.length === 1]),
      seqlens_k: tensor("int32", [1], [total - 1]),
      total_sequence_length: tensor("int32", [], [total]),
      logits_index: tensor("int64", [1, 1, 1], [ids.length - 1]),
      positions: tensor("int64", [1, ids.length], ids.map((_, place) => start + place)),
    };
    for (const [name, values] of Object.entries(hidden(this.engine.graph, start, ids.length, capacity))) {
      counted[name] = tensor("float32", [1, 1, ids.length, capacity], values);
    }
    let out;
    try {
      out = await this.engine.run({ ...adapter.feeds, ...feeds, ...this.engine.taken(counted) }, fetches);
    } catch (error) {
      this.seenBy = null; // what is there may be half of something
      throw error;
    }
    this.cache.take(out);
    this.seen = [...this.seen, ...ids];
    return out.logits.data;
  }
}
