/**
 * Text to tokens and back, as `edgepeft.runtime.tokens` and `.stream` do it; the tokenizer itself is @huggingface/tokenizers.
 */

import { Tokenizer } from "./vendor/tokenizers.min.mjs";
import { EdgePeftError } from "./files.js";

const CONTEXT = 8; // tokens of the prompt that a continuation is decoded after

/** Raise EdgePeftError for what is no text that can be encoded. */
export function checkText(what, text) {
  if (typeof text !== "string") throw new EdgePeftError(`${what}: expected a text, found ${typeof text}.`);
  if (/[\uD800-\uDFFF]/u.test(text)) throw new EdgePeftError(`${what}: not valid Unicode (half of a surrogate pair).`);
}

export class Tokens {
  /** about: tokenizer.json's value. maxLength: the longest sequence, or null. */
  constructor(about, maxLength) {
    this.tokenizer = new Tokenizer(about, { clean_up_tokenization_spaces: false });
    this.maxLength = maxLength;
  }

  /** Return a text's tokens with what the tokenizer puts around them, cut so that they fit. */
  encode(text) {
    const whole = this.tokenizer.encode(text).ids;
    const alone = this.ids(text);
    const over = this.maxLength === null ? 0 : whole.length - this.maxLength;
    if (over <= 0) return whole;
    const before = whole.findIndex((_, place) => alone.every((id, i) => whole[place + i] === id));
    return [...whole.slice(0, before), ...alone.slice(0, alone.length - over), ...whole.slice(before + alone.length)];
  }

  /** Return a text's tokens and none put around them. */
  ids(text) {
    return this.tokenizer.encode(text, { add_special_tokens: false }).ids;
  }

  /** Return the text of tokens, special ones left out. */
  text(ids) {
    return ids.length ? this.tokenizer.decode(ids, { skip_special_tokens: true }) : "";
  }
}

/** The text of one answer's tokens while they come: nothing is given that a later token could change. */
export class Decoding {
  constructor(tokens, before = []) {
    this.tokens = tokens;
    this.window = before.slice(-CONTEXT);
    this.shown = this.window.length;
  }

  #new() {
    return this.tokens.text(this.window).slice(this.tokens.text(this.window.slice(0, this.shown)).length);
  }

  push(token) {
    this.window.push(token);
    const found = this.#new();
    if (!found || found.endsWith("\uFFFD")) return "";
    this.window = this.window.slice(this.shown);
    this.shown = this.window.length;
    return found;
  }

  flush() {
    const found = this.#new();
    this.shown = this.window.length;
    return found;
  }
}

/** Stop strings: text before the first is shown, what may be the beginning of one is held back. */
export class Stops {
  constructor(strings) {
    this.strings = strings;
    this.held = "";
    this.hit = false;
  }

  push(text) {
    const held = this.held + text;
    const found = this.strings.map((s) => [held.indexOf(s) + s.length, held.indexOf(s)]).filter(([, place]) => place >= 0);
    this.hit = found.length > 0;
    const shown = this.hit ? found.sort((a, b) => a[0] - b[0] || a[1] - b[1])[0][1] : held.length - this.#begun(held);
    this.held = this.hit ? "" : held.slice(shown);
    return held.slice(0, shown);
  }

  #begun(text) {
    const longest = Math.max(0, ...this.strings.map((string) => string.length - 1));
    for (let size = Math.min(longest, text.length); size > 0; size--) {
      if (this.strings.some((string) => string.startsWith(text.slice(-size)))) return size;
    }
    return 0;
  }

  flush() {
    const held = this.held;
    this.held = "";
    return held;
  }
}
