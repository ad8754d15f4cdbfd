/**
 * Keys and values of the tokens that a language model has seen, between its runs.
 *
 *     on the GPU      [1, heads, capacity, width], past and present at once: a run writes its own columns and copies nothing
 *     on the CPU      what comes out of a run goes into the next
 *
 * An adapter's own keys and values are the first columns.
 */

const STEP = 256; // columns
const BIAS = "attention_bias."; // the window follows, 0 for none
export const HIDDEN = -1e4; // far below any score of attention
const FLOAT = 4; // bytes

/** Return an empty cache that begins with a prompt: Map input -> tensor. context: the most columns there can be. */
export function cacheOf(engine, { kv_heads: heads, head_dim: width }, prompt, context) {
  return new (engine.device === "webgpu" ? InPlace : Carried)(engine, heads, width, prompt, context);
}

/** Return {input: numbers [count, capacity]} of the biases a graph takes: what `count` tokens from `start` on do not see. */
export function hidden(graph, start, count, capacity) {
  const out = {};
  for (const name of [...graph.inputs.keys()].filter((name) => name.startsWith(BIAS))) {
    const window = Number(name.slice(BIAS.length)) || Infinity;
    out[name] = Float32Array.from({ length: count * capacity }, (_, place) => {
      const back = start + Math.floor(place / capacity) - (place % capacity);
      return back >= 0 && back < window ? 0 : HIDDEN;
    });
  }
  return out;
}

const present = (name) => name.replace("past_key_values", "present");

class Carried {
  constructor(engine, heads, width, prompt) {
    const none = { dims: [1, heads, 0, width], data: [] };
    const tensor = ({ dims, data }) => engine.tensor("float32", dims, data);
    this.past = Object.fromEntries(engine.graph.pasts.map((name) => [name, tensor(prompt.get(name) ?? none)]));
  }

  /** Return {feeds, fetches} for a run after which there are so many columns. */
  bind() {
    return { feeds: this.past };
  }

  /** Take what a run gave. */
  take(out) {
    for (const [name, value] of Object.entries(this.past)) {
      value.dispose();
      this.past[name] = out[present(name)];
    }
  }

  free() {
    for (const value of Object.values(this.past)) value.dispose();
  }
}

class InPlace {
  constructor(engine, heads, width, prompt, context) {
    Object.assign(this, { engine, heads, width, prompt, context });
    this.capacity = 0;
    this.past = {};
  }

  bind(columns) {
    if (columns > this.capacity) this.#grow(columns);
    const fetches = Object.entries(this.past).map(([name, value]) => [present(name), value]);
    return { feeds: this.past, fetches: { ...Object.fromEntries(fetches), logits: null } };
  }

  take() {}

  free() {
    for (const value of Object.values(this.past)) value.dispose();
  }

  /** Make memory for so many columns and some more, and move there what is known. */
  #grow(columns) {
    const { engine, heads, width, prompt } = this;
    const capacity = Math.min(this.context, Math.max(Math.ceil(columns / STEP) * STEP, 2 * this.capacity));
    const [before, after] = [this.capacity * width * FLOAT, capacity * width * FLOAT]; // bytes of a head
    const commands = engine.gpu.createCommandEncoder();
    const grown = {};
    for (const name of engine.graph.pasts) {
      const old = this.past[name];
      const made = engine.memory([1, heads, capacity, width], heads * after);
      const own = prompt.get(name)?.data;
      for (let head = 0; head < heads; head++) {
        if (old) commands.copyBufferToBuffer(old.gpuBuffer, head * before, made.gpuBuffer, head * after, before);
        else if (own) {
          const part = own.subarray((head * own.length) / heads, ((head + 1) * own.length) / heads);
          engine.gpu.queue.writeBuffer(made.gpuBuffer, head * after, part);
        }
      }
      grown[name] = made;
    }
    engine.gpu.queue.submit([commands.finish()]);
    this.free();
    this.past = grown;
    this.capacity = capacity;
  }
}
