/**
 * ONNX Runtime Web: one session on the GPU by WebGPU, or on the CPU by WebAssembly, of the same graph.
 *
 *     "auto" ──► WebGPU where there is an adapter and it takes the graph, else WebAssembly and why
 *
 * Each has a build of its own, of which one is fetched: that for WebGPU lacks operators of the CPU.
 */

import { floats } from "./adapters.js";
import { EdgePeftError } from "./files.js";
import { openGraph } from "./graph.js";

export const GRAPH = "model.webgpu.onnx";
export const DEVICES = ["auto", "webgpu", "wasm"];
const BUILDS = {
  webgpu: ["./vendor/ort.webgpu.min.mjs", "web/vendor/ort-wasm-simd-threaded.asyncify.wasm"],
  wasm: ["./vendor/ort.wasm.min.mjs", "web/vendor/ort-wasm-simd-threaded.wasm"],
};
const MOST_THREADS = 8;
const SUBGROUP = 16; // ONNX Runtime's attention is wrong where subgroups are smaller; without the feature it uses none
const LIMITS = [
  "maxBufferSize",
  "maxStorageBufferBindingSize",
  "maxComputeWorkgroupStorageSize",
  "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupSizeX",
  "maxComputeWorkgroupSizeY",
  "maxComputeWorkgroupSizeZ",
  "maxComputeWorkgroupsPerDimension",
  "maxStorageBuffersPerShaderStage",
];
const ARRAYS = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array };

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

export class Engine {
  /** files: opened. device: of DEVICES. Returns an engine whose `note` says why it is not on the GPU, if so. */
  static async open(files, device, onProgress) {
    if (!DEVICES.includes(device)) {
      throw new EdgePeftError(`device: expected ${DEVICES.join(", ")}, found '${device}'.`);
    }
    if (!files.has(GRAPH)) {
      throw new EdgePeftError("this bundle has no page for browsers. Build it with --target web.");
    }
    const { device: gpu, reason } = device === "wasm" ? { reason: "it was asked for" } : await findGpu();
    if (reason && device === "webgpu") throw new EdgePeftError(`device 'webgpu': ${reason}. 'wasm' works everywhere.`);
    const first = await files.read([GRAPH]);
    const graph = openGraph(first[GRAPH]);
    if (graph.metadata["edgepeft.digits"]) {
      throw new EdgePeftError("this bundle's graph for GPUs is not one for browsers. Build it with --target web.");
    }
    const outside = [...graph.defaults.values()].map((value) => value.location).filter(Boolean);
    const names = [...new Set([...graph.locations, ...outside])];
    const progress = (seen) => onProgress({ stage: "load", ...seen });
    const bytes = await files.read(names, progress);
    const engine = new Engine(graph, bytes, gpu, (name) => files.read([name], progress));
    await engine.#start(reason, device);
    return engine;
  }

  constructor(graph, bytes, gpu, read) {
    Object.assign(this, { graph, bytes, gpu, read });
    this.defaults = new Map();
    for (const [name, { kind, dims, raw, location, offset, length }] of graph.defaults) {
      if (kind !== "float32" && kind !== "float16") throw new EdgePeftError(`${GRAPH}: ${name} is ${kind}.`);
      const own = location ? bytes[location].subarray(offset, offset + length) : (raw ?? new Uint8Array());
      this.defaults.set(name, { dims, data: floats(kind, own) });
    }
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
    this.bytes = this.graph.bytes = null; // the session has its own
    return this;
  }

  async #runtime(provider) {
    const [module, binary] = BUILDS[provider];
    const { [binary]: code } = await this.read(binary);
    this.ort = await import(module);
    const { env } = this.ort;
    env.logLevel = "error";
    env.wasm.wasmBinary ??= code.buffer;
    env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MOST_THREADS) : 1;
  }

  async #session(provider) {
    await this.#runtime(provider);
    const present = this.graph.pasts.map((name) => [name.replace("past_key_values", "present"), "gpu-buffer"]);
    const gpu = {
      preferredOutputLocation: Object.fromEntries(present),
      extra: { session: { disable_cpu_ep_fallback: "1" } },
    };
    this.session = await this.ort.InferenceSession.create(this.graph.bytes, {
      executionProviders: [provider === "webgpu" ? { name: provider, device: this.gpu } : provider],
      externalData: [...this.graph.locations].map((path) => ({ path, data: this.bytes[path] })),
      logSeverityLevel: 3,
      ...(provider === "webgpu" ? gpu : {}),
    });
  }

  /** Return a tensor on the CPU; data are numbers. */
  tensor(kind, dims, data) {
    const values = kind === "int64" ? BigInt64Array.from(data, BigInt) : ARRAYS[kind].from(data);
    return new this.ort.Tensor(kind, values, dims);
  }

  /** Return tensors to feed for Map name -> {dims, data}, kept where the session runs until `free`. */
  async place(values) {
    const out = {};
    const { Tensor } = this.ort;
    const device = this.device === "webgpu" ? this.gpu : null;
    for (const [name, { dims, data }] of values) {
      if (device && data.length) {
        const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
        const gpuBuffer = device.createBuffer({ size: Math.ceil(data.byteLength / 16) * 16, usage });
        device.queue.writeBuffer(gpuBuffer, 0, data);
        out[name] = Tensor.fromGpuBuffer(gpuBuffer, { dataType: "float32", dims, dispose: () => gpuBuffer.destroy() });
      } else out[name] = new Tensor("float32", data, dims);
    }
    return out;
  }

  /** Run the graph: {input: tensor} -> {output: tensor}. Throws EdgePeftError with what ONNX Runtime says. */
  async run(feeds) {
    try {
      return await this.session.run(feeds);
    } catch (error) {
      const help = this.device === "webgpu" ? " If the GPU was lost or is full, load again, or with device 'wasm'." : "";
      throw new EdgePeftError(`the run failed: ${error.message}.${help}`);
    }
  }

  async close() {
    await this.session.release();
  }
}
