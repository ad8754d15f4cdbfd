/** What models of every task have: adapters, where they run, and calls that wait for each other. */

import { GaveUpError } from "./engine.js";

export class Model {
  #last = Promise.resolve();

  constructor(files, engine, tokens, adapters) {
    Object.assign(this, { files, engine, tokens });
    this.all = adapters;
  }

  get name() {
    return this.files.manifest.name;
  }

  get device() {
    return this.engine.device;
  }

  /** What the user should know: why it does not run on the GPU, what could not be kept. */
  get notes() {
    return [this.engine.note, ...this.files.notes].filter(Boolean);
  }

  get adapters() {
    return this.all.names;
  }

  get adapter() {
    return this.active.name;
  }

  /** Take another adapter for the calls that name none. */
  async use(name) {
    this.active = await this.all.get(name);
  }

  async prepare() {}

  /** Return the adapter of a call: the one it names, or the one in use. */
  async chosen(name) {
    return name == null ? this.active : this.all.get(name);
  }

  /** Run a function once all before it are done. */
  async inTurn(work) {
    const before = this.#last;
    let done;
    this.#last = new Promise((resolve) => (done = resolve));
    await before;
    try {
      return await work();
    } finally {
      done();
    }
  }

  /**
   * Run a function of an adapter once all before it are done; where the GPU gives up and `instead` makes {engine, all} on
   * the CPU, again there, and so from then on.
   */
  async runs(name, work) {
    const { name: own } = await this.chosen(name);
    return this.inTurn(async () => {
      try {
        return await work(await this.all.get(own));
      } catch (error) {
        if (!this.instead || !(error instanceof GaveUpError)) throw error;
        Object.assign(this, await this.instead(error), { instead: null });
        await this.use(this.active.name);
        return work(await this.all.get(own));
      }
    });
  }

  async close() {
    await this.inTurn(() => this.engine.close());
  }
}
