/** A bundle of edgepeft in a browser. Made by `edgepeft build --target web`. */

export class EdgePeftError extends Error {}

export interface Progress {
  /** "load" while files are read, "prepare" while the model is made ready, "ready" at the end. */
  stage: "load" | "prepare" | "ready";
  /** The file that is being read. */
  file: string;
  /** Bytes of the files that are read together, here and in all. */
  loaded: number;
  total: number;
}

export interface LoadOptions {
  /** An adapter's name, or "none" for the base model. Default: "default". */
  adapter?: string;
  /** "auto" takes WebGPU where it is, goes on on the CPU where it gives up, and says in `notes` why. Default: "auto". */
  device?: "auto" | "webgpu" | "wasm";
  onProgress?: (progress: Progress) => void;
}

export interface Model {
  readonly name: string;
  readonly device: "webgpu" | "wasm";
  /** What the user should know: why it does not run on the GPU, what could not be checked or kept. */
  readonly notes: string[];
  /** The adapters that the manifest names; none where the adapter was merged. Others in its folder can be used too. */
  readonly adapters: string[];
  /** The adapter in use. */
  readonly adapter: string;
  /** Resolves, behind the load, to whether the browser keeps all adapters too: from then on no call needs the network. */
  readonly kept: Promise<boolean>;
  /** Take another adapter, or "none", for the calls that name none. */
  use(adapter: string): Promise<void>;
  /** Free its memory; it cannot be used after. */
  close(): Promise<void>;
}

export interface Prediction {
  label: string;
  /** Probability of the label. */
  score: number;
  /** {label: probability}, the best first. */
  scores: Record<string, number>;
}

export interface ClassifyOptions {
  adapter?: string;
  /** How many labels `scores` holds. Default: all. */
  topK?: number;
}

export interface Classifier extends Model {
  readonly labels: string[];
  classify(text: string, options?: ClassifyOptions): Promise<Prediction>;
  classify(texts: string[], options?: ClassifyOptions): Promise<Prediction[]>;
  /** One number for each label. */
  logits(text: string, options?: { adapter?: string }): Promise<Float32Array>;
}

export interface Message {
  role: string;
  content: string;
}

export interface GenerateOptions {
  adapter?: string;
  /** Default: 256, or what the context has left. */
  maxNewTokens?: number;
  /** 0, the default, takes the likeliest token. */
  temperature?: number;
  topK?: number;
  topP?: number;
  minP?: number;
  repetitionPenalty?: number;
  /** The same seed gives the same answer again, though not Python's. */
  seed?: number;
  /** Texts that end the answer and are cut off. */
  stop?: string | string[];
  /** Ends the answer when it is aborted. */
  signal?: AbortSignal;
  /** Names that the chat template may read. */
  templateOptions?: Record<string, unknown>;
}

export interface Answer {
  text: string;
  /** With the one that ended it. */
  tokens: number[];
  finish: "eos" | "stop" | "length" | "cancelled";
  promptTokens: number;
}

/** Pieces of the text as they come; the generator's return value is the answer. */
export type Pieces = AsyncGenerator<string, Answer, void>;

export interface Generator extends Model {
  /** Most tokens of prompt and answer together. */
  readonly context: number;
  /** Continue a text, or answer messages. */
  generate(prompt: string | Message[], options: GenerateOptions & { stream: true }): Pieces;
  generate(prompt: string | Message[], options?: GenerateOptions & { stream?: false }): Promise<Answer>;
  /** Answer messages, or one of the user. */
  chat(messages: string | Message[], options: GenerateOptions & { stream: true }): Pieces;
  chat(messages: string | Message[], options?: GenerateOptions & { stream?: false }): Promise<Answer>;
  encode(prompt: string | Message[], templateOptions?: Record<string, unknown>): number[];
  /** What the model expects after the last of some tokens: one number for each token there is. */
  logits(tokens: number[], options?: { adapter?: string }): Promise<Float32Array>;
}

/**
 * Load a bundle: every file is checked by its digest and kept by the browser, so that the next time needs no network.
 * What it is depends on the bundle's task: name it, as in load<Classifier>(url), or ask `"classify" in model`.
 *
 * Throws EdgePeftError for a folder that is no bundle, a file that was changed, a device or an adapter that cannot be had.
 */
export function load<Task extends Model = Classifier | Generator>(url: string | URL, options?: LoadOptions): Promise<Task>;
