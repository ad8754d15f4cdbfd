/**
 * A bundle of edgepeft in a browser: classify or write with it, on the GPU by WebGPU or on the CPU by WebAssembly.
 *
 *     import { load } from "./edgepeft.js";
 *     const model = await load("./", { onProgress: ({ loaded, total }) => console.log(loaded / total) });
 *     console.log(await model.classify("turn the kitchen lights off"));               // of a classifier
 *     for await (const piece of model.generate("Hello", { stream: true })) show(piece);  // of a language model
 *
 * Types are in edgepeft.d.ts. Calls of one model run one after the other. Left out: rows with adapters of their own in one
 * run, several prompts in one run, an int8 cache.
 */

import { BASE, DEFAULT, Places, defaultTensors, named, ownTensors, readAdapter, rowsOf, takePrompt } from "./web/adapters.js";
import { Engine } from "./web/engine.js";
import { EdgePeftError, Files } from "./web/files.js";
import { Generator } from "./web/generator.js";
import { Classifier } from "./web/classifier.js";
import { Tokens } from "./web/tokens.js";

export { EdgePeftError };

const TASKS = { "text-classification": Classifier, "text-generation": Generator };

/** The adapters of a loaded bundle: which there are, the one in use, and what to feed for each. */
class Adapters {
  #made = new Map();

  constructor(files, engine) {
    this.files = files;
    this.engine = engine;
    this.places = new Places(engine.graph, engine.defaults);
  }

  get names() {
    return this.places.any ? named(this.files) : [];
  }

  /** Return {name, labels, prompt, rows, feeds} of an adapter, made ready at its first use. */
  async get(name) {
    if (!this.#made.has(name)) this.#made.set(name, await this.#make(name));
    return this.#made.get(name);
  }

  async #make(name) {
    if (name !== DEFAULT && !this.places.any) {
      throw new EdgePeftError("merged at export, so it has no adapters to choose from.");
    }
    const { labels, values, prompt = new Map(), rows = 0 } = await this.#values(name);
    return { name, labels, prompt, rows, feeds: await this.engine.place(values) };
  }

  async #values(name) {
    const file = `adapters/${DEFAULT}/labels.json`;
    const labels = this.files.has(file) ? await this.files.json(file) : (this.files.manifest.labels ?? []);
    const { graph } = this.engine;
    if (name === DEFAULT) {
      const { defaults } = this.places;
      const prompt = takePrompt(name, await defaultTensors(this.files), graph);
      return { labels, values: defaults, prompt, rows: rowsOf(defaults) };
    }
    const own = await ownTensors(this.files);
    if (name === BASE) return { labels, values: this.places.feeds("the base", new Map(), own, true) };
    const found = await readAdapter(this.files, name);
    const prompt = takePrompt(found.where, found.tensors, graph);
    const values = this.places.feeds(found.where, found.tensors, own, false);
    return { labels: found.labels, prompt, rows: rowsOf(found.tensors), values };
  }
}

/** Load a bundle; see edgepeft.d.ts. */
export async function load(url, { adapter = DEFAULT, device = "auto", onProgress = () => {} } = {}) {
  const files = new Files(url);
  const manifest = await files.open();
  const Task = TASKS[manifest.task];
  if (!Task) throw new EdgePeftError(`unknown task '${manifest.task}'. Take a newer edgepeft.`);
  const opened = async (where) => {
    const engine = await Engine.open(files, where, onProgress);
    return { engine, all: new Adapters(files, engine) };
  };
  const { engine, all } = await opened(device);
  const about = await files.json("tokenizer.json");
  const tokens = new Tokens(about, manifest.task === "text-generation" ? null : manifest.max_length);
  const model = new Task(files, engine, tokens, all);
  await model.use(adapter);
  await model.prepare();
  model.kept = files.keep();
  if (device === "auto" && engine.device === "webgpu") {
    model.instead = async (reason) => {
      const found = await opened("wasm");
      found.engine.note = `running on WebAssembly, which is slower: ${reason.message}`;
      return found;
    };
  }
  onProgress({ stage: "ready", file: "", loaded: 1, total: 1 });
  return model;
}
