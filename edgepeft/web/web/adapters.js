/**
 * Adapters as tensors to feed: read from safetensors files; packed where the graph for GPUs takes them so.
 *
 *     A [R, K], B [R, N] of each group ──► A [K, S], B [S, N] float32, S the ranks of all groups, filled to a vector of 4
 *                                      ──► or their 4-bit digits, see web/digits.js
 *
 * In files B is [N, R], as PEFT has it. A tensor is {kind, dims, data}, float16 as Uint16Array; packed ones have no kind,
 * their arrays tell it.
 * It is `edgepeft.runtime.adapters` and `edgepeft.runtime.webgpu` over again, and refuses what they refuse: an adapter of
 * another base or format, a tensor that the graph has no place for, a scale that was not folded into B.
 */

import * as digits from "./digits.js";
import { EdgePeftError } from "./files.js";

export const DEFAULT = "default";
export const BASE = "none";
export const TENSORS = "adapter_model.safetensors";
export const TERMS = "terms.safetensors";
const OWN = "adapters/base.safetensors";
const UP = ".lora_B.weight";
const PAST = "past_key_values.";
const BEFORE = /\.(prompt|prefix)$/; // rows before a classifier's text
export const RANKS = 4; // a vector of WebGPU
const PEFT_TYPES = ["LORA", "EXPERTS", "BOTTLENECK", "PARALLEL"];

/** Return the float32 values of float16 ones. */
export function fromHalves(halves) {
  const out = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) {
    const sign = halves[i] & 0x8000 ? -1 : 1;
    const exponent = (halves[i] >> 10) & 31;
    const fraction = halves[i] & 1023;
    if (exponent === 31) out[i] = fraction ? NaN : sign * Infinity;
    else out[i] = sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  }
  return out;
}

const ARRAYS = { float32: Float32Array, float16: Uint16Array, uint8: Uint8Array, int64: BigInt64Array };

/** Return a tensor of bytes. */
export function tensorOf(kind, dims, bytes) {
  return { kind, dims, data: new ARRAYS[kind](bytes.slice().buffer) }; // aligned, whatever file it lay in
}

/** Return the values of a tensor as float32 numbers. */
export const numbers = ({ kind, data }) => (kind === "float16" ? fromHalves(data) : data);

/** Read a safetensors file: {tensors: Map name -> tensor, metadata}. */
export function readTensors(name, bytes) {
  const damaged = (what) => new EdgePeftError(`${name}: no safetensors file: ${what}. Copy the adapter again.`);
  const length = bytes.length < 8 ? Infinity : Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  if (length > bytes.length - 8) throw damaged("its header is longer than it");
  const { __metadata__: metadata = {}, ...header } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const tensors = new Map();
  for (const [tensor, { dtype, shape, data_offsets: [start, end] }] of Object.entries(header)) {
    const kind = { F16: "float16", F32: "float32" }[dtype];
    if (!kind || 8 + length + end > bytes.length) throw damaged(`${tensor} is ${dtype}, or cut off`);
    const found = tensorOf(kind, shape, bytes.subarray(8 + length + start, 8 + length + end));
    if (!numbers(found).every(Number.isFinite)) {
      throw new EdgePeftError(`${name}: ${tensor} holds values that are not finite.`);
    }
    tensors.set(tensor, found);
  }
  for (const [alias, stored] of Object.entries(JSON.parse(metadata["edgepeft.alias"] ?? "{}"))) {
    if (!tensors.has(stored)) throw damaged(`${stored} is not in it`);
    tensors.set(alias, tensors.get(stored));
  }
  return { tensors, metadata };
}

/** Return the ranks that an adapter's tensors have in a node of groups {a, b, gate, n}. */
const ranks = (groups, tensors) => groups.reduce((sum, { a }) => sum + (tensors.get(a)?.dims[0] ?? 0), 0);

/** Return [A [width, k], B of each group [n, width]] of a node's groups, in float32; zeros where there are no ranks. */
function side(groups, tensors, k, width) {
  const down = new Float32Array(width * k);
  let first = 0;
  const ups = groups.map((group) => {
    const up = new Float32Array(group.n * width);
    const [a, b, gate] = [group.a, group.b, group.gate].map((name) => tensors.has(name) && numbers(tensors.get(name)));
    const rank = ranks([group], tensors);
    for (let r = 0; r < rank; r++) {
      const factor = gate ? gate[gate.length === 1 ? 0 : r] : 1;
      for (let i = 0; i < k; i++) down[(first + r) * k + i] = Math.fround(a[r * k + i] * factor);
      for (let i = 0; i < group.n; i++) up[i * width + first + r] = b[r * group.n + i];
    }
    first += rank;
    return up;
  });
  return [down, ups];
}

/** Return numbers [rows, columns] as [columns, rows]. */
function turned(data, rows, columns) {
  const out = new data.constructor(data.length);
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) out[j * rows + i] = data[i * columns + j];
  return out;
}

/** Return arrays of [n, ..] below each other. */
function below(parts) {
  const out = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.reduce((at, part) => (out.set(part, at), at + part.length), 0);
  return out;
}

/** Return {input: tensor} of a node's A [k, S] and B [S, N], and routers' shares, by tensors of its groups {a, b, gate, n}. */
function packed(node, groups, tensors, k) {
  const width = Math.max(Math.ceil(ranks(groups, tensors) / RANKS), 1) * RANKS;
  const [down, ups] = side(groups, tensors, k, width);
  const total = groups.reduce((sum, group) => sum + group.n, 0);
  return {
    [`${node}.lora_A`]: { dims: [k, width], data: turned(down, width, k) },
    [`${node}.lora_B`]: { dims: [width, total], data: turned(below(ups), total, width) },
    ...routers(node, groups, tensors, width),
  };
}

/** Return {input: tensor [experts, S]} of each group with a router: which of the packed ranks are an expert's. */
function routers(node, groups, tensors, width) {
  const out = {};
  const routed = groups.flatMap(({ router }, g) => (router ? [g] : []));
  for (const g of routed) {
    const experts = tensors.get(groups[g].router)?.dims[0] ?? 1;
    const data = new Float32Array(experts * width);
    groups.reduce((first, group, other) => {
      const rank = ranks([group], tensors);
      const alone = !routed.includes(other) && g === routed[0]; // its shares add up to 1
      for (let r = 0; r < rank; r++) {
        if (other === g) data[Math.floor((r * experts) / rank) * width + first + r] = 1;
        else if (alone) for (let e = 0; e < experts; e++) data[e * width + first + r] = 1;
      }
      return first + rank;
    }, 0);
    out[`${node}.lora_R${g}`] = { dims: [experts, width], data };
  }
  return out;
}

/** Return {input: tensor} of a node's adapter in digits; about: {groups, k, ranks, apart}, as the graph says. */
function inDigits(where, node, { groups, k, ranks: most, apart }, tensors) {
  const found = ranks(groups, tensors);
  if (found > most) {
    throw new EdgePeftError(`${where}: has ${found} ranks in ${node}, this graph takes ${most}. Put it in by \`edgepeft adapters add\`.`);
  }
  const [down, ups] = side(groups, tensors, k, most);
  const out = {};
  const put = (name, [codes, scales]) => Object.assign(out, { [`${node}.${name}`]: codes, [`${node}.${name}.scales`]: scales });
  put("lora_A", digits.down(down, most, k));
  (apart ? ups : [below(ups)]).forEach((part, g) => put(`lora_B.${g}`, digits.up(part, part.length / most, most)));
  return out;
}

/** The places that a graph has for adapters, and what to feed into them. */
export class Places {
  /** graph: of `openGraph`; defaults: Map name -> tensor, what the graph itself had. */
  constructor(graph, defaults) {
    this.defaults = defaults;
    this.packed = JSON.parse(graph.metadata["edgepeft.packed"] ?? "{}");
    this.digits = JSON.parse(graph.metadata["edgepeft.digits"] ?? "{}");
    const nodes = [...Object.keys(this.packed), ...Object.keys(this.digits)];
    const plain = [...defaults.keys()].filter((name) => !nodes.some((node) => name.startsWith(`${node}.lora_`)));
    this.plain = new Map(plain.map((name) => [name, graph.inputs.get(name)]));
    const groups = [...Object.values(this.packed), ...Object.values(this.digits).map((about) => about.groups)].flat();
    this.hides = graph.inputs.has("prompt_batch"); // a GPU's graph takes no empty rows before a text, and hides some
    this.groups = new Set(groups.flatMap(({ a, b, gate }) => [a, b, gate].filter(Boolean)));
  }

  get any() {
    return this.defaults.size > 0;
  }

  /** Return Map input -> tensor for an adapter's tensors; `own`: the base's own of what adapters replace. */
  feeds(where, tensors, own, isBase) {
    const odd = [...tensors.keys()].find((name) => !this.groups.has(name) && !this.plain.has(name));
    if (odd) throw new EdgePeftError(`${where}: the graph has no place for its ${odd}.`);
    const out = new Map();
    const put = (found) => Object.entries(found).forEach(([name, tensor]) => out.set(name, tensor));
    for (const [node, groups] of Object.entries(this.packed)) {
      const k = this.defaults.get(`${node}.lora_A`).dims[0];
      this.#check(where, groups, tensors, k);
      put(packed(node, groups, tensors, k));
    }
    for (const [node, about] of Object.entries(this.digits)) {
      this.#check(where, about.groups, tensors, about.k);
      put(inDigits(where, node, about, tensors));
    }
    for (const [name, { kind, dims }] of this.plain) {
      const given = tensors.get(name)?.data.length === 0 ? null : tensors.get(name);
      const found = given ?? own.get(name) ?? neutral(name, kind, dims, this.hides ? RANKS : 0);
      if (!found && !isBase) throw new EdgePeftError(`${where}: ${name} is missing.`);
      const value = found ?? this.defaults.get(name); // the base has the default adapter's head
      const right = value.dims.every((size, axis) => typeof dims[axis] === "string" || size === dims[axis]);
      if (value.dims.length !== dims.length || !right) {
        throw new EdgePeftError(`${where}: ${name} is [${value.dims}], expected [${dims}].`);
      }
      out.set(name, kind === value.kind ? value : { kind, dims: value.dims, data: numbers(value) });
    }
    return out;
  }

  #check(where, groups, tensors, k) {
    for (const { a, b, n } of groups) {
      const [down, up] = [tensors.get(a)?.dims ?? [0, k], tensors.get(b)?.dims ?? [0, n]];
      if (down[0] !== up[0] || down[1] !== k || up[1] !== n) {
        throw new EdgePeftError(`${where}: ${a} is [${down}] and its B [${up}], expected [R, ${k}] and [R, ${n}].`);
      }
    }
  }
}

/** Return what leaves the base as it is, or null where there is none. A and B are never of rank 0 here. */
function neutral(name, kind, dims, rows) {
  if (BEFORE.test(name)) return { kind, dims: [rows, dims[1]], data: new ARRAYS[kind](rows * dims[1]) };
  const low = /\.lora_([AB]|(beside_)?(down|up))\./.test(name);
  const router = name.endsWith(".lora_router.weight"); // of one expert
  if (!low && !router && !/\.(gate|s_in|s_out)$/.test(name)) return null;
  const sizes = dims.map((size) => (typeof size === "number" ? size : low ? RANKS : 1));
  const data = new ARRAYS[kind](sizes.reduce((a, b) => a * b, 1));
  return { kind, dims: sizes, data: low || router ? data : data.fill(1) };
}

/** Return how many rows an adapter's tensors have before a classifier's text. */
export const rowsOf = (tensors) => [...tensors].find(([name]) => BEFORE.test(name))?.[1].dims[0] ?? 0;

/** Take the keys and values out of an adapter's tensors that stand before the text: Map input -> tensor. */
export function takePrompt(where, tensors, graph) {
  const found = [...tensors.keys()].filter((name) => name.startsWith(PAST));
  const prompt = new Map(found.map((name) => [name, tensors.get(name)]));
  for (const name of found) tensors.delete(name);
  for (const name of found.length ? graph.pasts : []) {
    const [one, heads, , size] = prompt.get(name)?.dims ?? [];
    const wanted = graph.inputs.get(name).dims;
    if (one !== 1 || heads !== wanted[1] || size !== wanted[3]) throw new EdgePeftError(`${where}: ${name} does not fit.`);
  }
  return prompt;
}

/** Return the tensors of the default adapter that are not in the graph: what stands before the text. */
export async function defaultTensors(files) {
  const name = `adapters/${DEFAULT}/${TERMS}`;
  return files.has(name) ? readTensors(name, (await files.read([name]))[name]).tensors : new Map();
}

/** Read an adapter's folder: {tensors, labels}. Throws EdgePeftError where it does not belong to this bundle. */
export async function readAdapter(files, name) {
  const { manifest } = files;
  const folder = `adapters/${name}`;
  const bytes = async (file) => (files.has(file) ? (await files.read([file]))[file] : files.unnamed(file));
  const json = async (file) => {
    const found = await bytes(`${folder}/${file}`);
    return found && JSON.parse(new TextDecoder().decode(found));
  };
  let file = `${folder}/${TERMS}`;
  let found = files.has(`${folder}/${TENSORS}`) && !files.has(file) ? null : await bytes(file);
  if (!found) {
    file = `${folder}/${TENSORS}`;
    found = await bytes(file);
    if (!found) throw new EdgePeftError(`unknown adapter '${name}'. There are: ${[...named(files), BASE].join(", ")}.`);
    checkSettings(folder, await json("adapter_config.json"));
  }
  const { tensors, metadata } = readTensors(file, found);
  for (const [what, key, wanted] of [["base", "edgepeft.base", manifest.base_digest], ["format", "edgepeft.format", manifest.format]]) {
    if (metadata[key] !== wanted) {
      const says = `it names ${metadata[key] ?? "none"}, this bundle's is ${wanted}`;
      throw new EdgePeftError(`${file}: made for another ${what}: ${says}. Its answers would be wrong.`);
    }
  }
  return { where: folder, tensors: graphsOwn(tensors), labels: (await json("labels.json")) ?? manifest.labels ?? [] };
}

/** Return a file's tensors with each B as the graph takes it. */
function graphsOwn(tensors) {
  const put = ([name, tensor]) => {
    if (!name.endsWith(UP)) return [name, tensor];
    const [n, rank] = tensor.dims;
    return [name, { ...tensor, dims: [rank, n], data: turned(tensor.data, n, rank) }];
  };
  return new Map([...tensors].map(put));
}

function checkSettings(folder, settings) {
  const same = settings?.lora_alpha === settings?.r;
  const odd = ["use_dora", "use_rslora", "fan_in_fan_out"].some((key) => settings?.[key]);
  const patterns = JSON.stringify(settings?.alpha_pattern ?? {}) === JSON.stringify(settings?.rank_pattern ?? {});
  if (!PEFT_TYPES.includes(settings?.peft_type) || !same || odd || !patterns) {
    throw new EdgePeftError(`${folder}: not an exported adapter; put it in by \`edgepeft adapters add\`.`);
  }
}

/** Return the names of a bundle's adapters, the default one first. */
export function named(files) {
  const found = Object.keys(files.manifest.files).map((name) => /^adapters\/([^/]+)\/adapter_model\.safetensors$/.exec(name)?.[1]);
  return found.filter(Boolean).sort((a, b) => (b === DEFAULT) - (a === DEFAULT) || (a < b ? -1 : 1));
}

/** Return the base's own of what adapters replace: Map name -> tensor. */
export async function ownTensors(files) {
  return files.has(OWN) ? readTensors(OWN, (await files.read([OWN]))[OWN]).tensors : new Map();
}
