/**
 * ONNX Runtime Web: one session on the GPU by WebGPU, or on the CPU by WebAssembly, each with its graph of the same weights.
 *
 *     "auto" ──► WebGPU where there is an adapter and it takes the graph, else WebAssembly and why
 *
 * Each has a build of its own, of which one is fetched: that for WebGPU lacks operators of the CPU.
 */

import { tensorOf } from "./adapters.js";
import { EdgePeftError } from "./files.js";
import { openGraph } from "./graph.js";

export const DEVICES = ["auto", "webgpu", "wasm"];
const GRAPHS = { webgpu: "model.webgpu.onnx", wasm: "model.onnx" };
const TERMS = ["float32", "float16", "uint8"]; // of adapters; a default of another kind is a setting of the graph
const BUILDS = {
  webgpu: ["./vendor/ort.webgpu.min.mjs", "web/vendor/ort-wasm-simd-threaded.asyncify.wasm"],
  wasm: ["./vendor/ort.wasm.min.mjs", "web/vendor/ort-wasm-simd-threaded.wasm"],
};
const MOST_THREADS = 8;
const SUBGROUP = 16; // ONNX Runtime's attention is wrong where subgroups are smaller; without the feature it uses none
const BUFFERS = "maxStorageBuffersPerShaderStage";
const STEP_BUFFERS = 10; // that a shader takes in a graph with a branch for single tokens
const LIMITS = [
  "maxBufferSize",
  "maxStorageBufferBindingSize",
  "maxComputeWorkgroupStorageSize",
  "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupSizeX",
  "maxComputeWorkgroupSizeY",
  "maxComputeWorkgroupSizeZ",
  "maxComputeWorkgroupsPerDimension",
  BUFFERS,
];
const ARRAYS = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array, bool: Uint8Array };
const PACKED = new Map([[Float32Array, "float32"], [Uint8Array, "uint8"]]);

/** Find the GPU: {device} of it, or {reason} why there is none. */
async function findGpu() {
  if (!globalThis.isSecureContext) return { reason: "WebGPU takes HTTPS, or a page from this machine" };
  if (!navigator.gpu) return { reason: "this browser has no WebGPU" };
  const found = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" }).catch(() => null);
  if (!found) return { reason: "WebGPU finds no GPU on this machine" };
  const wanted = found.info.subgroupMinSize >= SUBGROUP ? ["shader-f16", "subgroups"] : ["shader-f16"];
  const features = wanted.filter((name) => found.features.has(name));
  const limits = Object.fromEntries(LIMITS.map((name) => [name, found.limits[name]]));
  try {
    return { device: await found.requestDevice({ requiredFeatures: features, requiredLimits: limits }), reason: "" };
  } catch (error) {
    return { reason: `the GPU cannot be had (${error.message})` };
  }
}

/** A run that the GPU did not end. */
export class GaveUpError extends EdgePeftError {}

export class Engine {
  /** files: opened. device: of DEVICES. Returns an engine whose `note` says why it is not on the GPU, if so. */
  static async open(files, device, onProgress) {
    if (!DEVICES.includes(device)) {
      throw new EdgePeftError(`device: expected ${DEVICES.join(", ")}, found '${device}'.`);
    }
    if (!files.has(GRAPHS.webgpu)) {
      throw new EdgePeftError("this bundle has no page for browsers. Build it with --target web.");
    }
    const { device: gpu, reason } = device === "wasm" ? { reason: "it was asked for" } : await findGpu();
    if (reason && device === "webgpu") throw new EdgePeftError(`device 'webgpu': ${reason}. 'wasm' works everywhere.`);
    const engine = new Engine(gpu, (names) => files.read(names, (seen) => onProgress({ stage: "load", ...seen })));
    engine.prepares = () => onProgress({ stage: "prepare", file: "", loaded: 1, total: 1 });
    await engine.#start(reason, device);
    return engine;
  }

  constructor(gpu, read) {
    Object.assign(this, { gpu, read });
  }

  async #start(reason, device) {
    if (!reason) {
      try {
        await this.#session("webgpu");
        return this.#ready("webgpu", "");
      } catch (error) {
        if (device === "webgpu") throw new EdgePeftError(`device 'webgpu': this GPU does not run it: ${error.message}`);
        reason = `this GPU does not run it (${error.message})`;
      }
    }
    try {
      await this.#session("wasm");
    } catch (error) {
      throw new EdgePeftError(`ONNX Runtime Web refuses the model: ${error.message}`);
    }
    return this.#ready("wasm", device === "wasm" ? "" : `running on WebAssembly, which is slower: ${reason}`);
  }

  #ready(device, note) {
    this.device = device;
    this.note = note;
    this.graph.bytes = null; // the session has its own
  }

  /** Read the graph of a device; return the bytes of its weights by their files. */
  async #open(provider) {
    const file = GRAPHS[provider];
    this.graph = openGraph((await this.read([file]))[file]);
    const defaults = [...this.graph.defaults].filter(([, { kind }]) => TERMS.includes(kind));
    const outside = defaults.map(([, { location }]) => location).filter(Boolean);
    const bytes = await this.read([...new Set([...this.graph.locations, ...outside])]);
    this.defaults = new Map();
    for (const [name, { kind, dims, raw, location, offset, length }] of defaults) {
      const own = location ? bytes[location].subarray(offset, offset + length) : (raw ?? new Uint8Array());
      this.defaults.set(name, tensorOf(kind, dims, own));
    }
    return bytes;
  }

  async #runtime(provider) {
    const [module, binary] = BUILDS[provider];
    const { [binary]: code } = await this.read([binary]);
    this.ort = await import(module);
    const { env } = this.ort;
    env.logLevel = "error";
    env.wasm.wasmBinary ??= code.buffer;
    env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MOST_THREADS) : 1;
  }

  async #session(provider) {
    await this.#runtime(provider);
    const bytes = await this.#open(provider);
    const granted = this.gpu?.limits[BUFFERS];
    if (this.graph.inputs.has("one_token") && granted < STEP_BUFFERS) {
      throw new EdgePeftError(`it takes ${STEP_BUFFERS} storage buffers a shader, here are ${granted}`);
    }
    const present = this.graph.pasts.map((name) => [name.replace("past_key_values", "present"), "gpu-buffer"]);
    const gpu = {
      preferredOutputLocation: Object.fromEntries(present),
      extra: { session: { disable_cpu_ep_fallback: "1" } },
    };
    this.prepares();
    this.session = await this.ort.InferenceSession.create(this.graph.bytes, {
      executionProviders: [provider === "webgpu" ? { name: provider, device: this.gpu } : provider],
      externalData: [...this.graph.locations].map((path) => ({ path, data: bytes[path] })),
      logSeverityLevel: 3,
      ...(provider === "webgpu" ? gpu : {}),
    });
  }

  /** Return a tensor on the CPU; data are numbers. */
  tensor(kind, dims, data) {
    const values = kind === "int64" ? BigInt64Array.from(data, BigInt) : ARRAYS[kind].from(data);
    return new this.ort.Tensor(kind, values, dims);
  }

  /** Return of {input: tensor} what the graph has inputs for. */
  taken(feeds) {
    return Object.fromEntries(Object.entries(feeds).filter(([name]) => this.graph.inputs.has(name)));
  }

  /** Return tensors to feed for Map name -> tensor of `Places`, kept where the session runs until they are disposed of. */
  async place(values) {
    const out = {};
    const { Tensor } = this.ort;
    for (const [name, { kind, dims, data }] of values) {
      const dataType = kind ?? PACKED.get(data.constructor);
      if (this.device === "webgpu" && data.length) {
        out[name] = this.memory(dims, data.byteLength, dataType);
        this.gpu.queue.writeBuffer(out[name].gpuBuffer, 0, data);
      } else out[name] = new Tensor(dataType, data, dims);
    }
    return out;
  }

  /** Return memory of the GPU, all zeros. */
  memory(dims, bytes, dataType = "float32") {
    const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
    const gpuBuffer = this.gpu.createBuffer({ size: Math.ceil(bytes / 16) * 16, usage });
    return this.ort.Tensor.fromGpuBuffer(gpuBuffer, { dataType, dims, dispose: () => gpuBuffer.destroy() });
  }

  /** Run the graph: {input: tensor} -> {output: tensor}. Throws EdgePeftError with what ONNX Runtime says. */
  async run(feeds, fetches = this.session.outputNames) {
    try {
      return await this.session.run(feeds, fetches);
    } catch (error) {
      if (this.device !== "webgpu") throw new EdgePeftError(`the run failed: ${error.message}.`);
      const help = "If the GPU was lost or is full, load again, or with device 'wasm'.";
      throw new GaveUpError(`the run failed: ${error.message}. ${help}`);
    }
  }

  async close() {
    await this.session.release();
  }
}
