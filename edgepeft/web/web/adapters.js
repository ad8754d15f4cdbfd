/**
 * Adapters as tensors to feed: read from safetensors files, packed as the graph for GPUs takes them.
 *
 *     A [R, K], B [N, R] of each group ──► A [K, S], B [S, N] float32, S the ranks of all groups, filled to a vector of 4
 *
 * It is `edgepeft.runtime.adapters` and `edgepeft.runtime.webgpu` over again, and refuses what they refuse: an adapter of
 * another base or format, a tensor that the graph has no place for, a scale that was not folded into B.
 */

import { EdgePeftError } from "./files.js";

export const DEFAULT = "default";
export const BASE = "none";
export const TENSORS = "adapter_model.safetensors";
export const TERMS = "terms.safetensors";
const OWN = "adapters/base.safetensors";
const PAST = "past_key_values.";
const RANKS = 4; // a vector of WebGPU
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

/** Return the values of bytes as float32 numbers. */
export function floats(kind, bytes) {
  const own = bytes.slice(); // aligned, whatever file it lay in
  return kind === "float16" ? fromHalves(new Uint16Array(own.buffer)) : new Float32Array(own.buffer);
}

/** Read a safetensors file: {tensors: Map name -> {dims, data: Float32Array}, metadata}. */
export function readTensors(name, bytes) {
  const damaged = (what) => new EdgePeftError(`${name}: no safetensors file: ${what}. Copy the adapter again.`);
  const length = bytes.length < 8 ? Infinity : Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  if (length > bytes.length - 8) throw damaged("its header is longer than it");
  const { __metadata__: metadata = {}, ...header } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const tensors = new Map();
  for (const [tensor, { dtype, shape, data_offsets: [start, end] }] of Object.entries(header)) {
    const kind = { F16: "float16", F32: "float32" }[dtype];
    if (!kind || 8 + length + end > bytes.length) throw damaged(`${tensor} is ${dtype}, or cut off`);
    const data = floats(kind, bytes.subarray(8 + length + start, 8 + length + end));
    if (!data.every(Number.isFinite)) throw new EdgePeftError(`${name}: ${tensor} holds values that are not finite.`);
    tensors.set(tensor, { dims: shape, data });
  }
  for (const [alias, stored] of Object.entries(JSON.parse(metadata["edgepeft.alias"] ?? "{}"))) {
    if (!tensors.has(stored)) throw damaged(`${stored} is not in it`);
    tensors.set(alias, tensors.get(stored));
  }
  return { tensors, metadata };
}

/** Return A [k, S] and B [S, total] of a node's groups {a, b, gate, n}, of tensors by name; rank 0 where there is none. */
export function pack(groups, tensors, k) {
  const total = groups.reduce((sum, group) => sum + group.n, 0);
  const rank = (group) => tensors.get(group.a)?.dims[0] ?? 0;
  const width = Math.max(Math.ceil(groups.reduce((sum, group) => sum + rank(group), 0) / RANKS), 1) * RANKS;
  const down = new Float32Array(k * width);
  const up = new Float32Array(width * total);
  let column = 0;
  let start = 0;
  for (const group of groups) {
    const [a, b, gate] = [group.a, group.b, group.gate].map((name) => tensors.get(name)?.data);
    for (let r = 0; r < rank(group); r++, column++) {
      const factor = gate ? gate[gate.length === 1 ? 0 : r] : 1;
      for (let i = 0; i < k; i++) down[i * width + column] = Math.fround(a[r * k + i] * factor);
      for (let i = 0; i < group.n; i++) up[column * total + start + i] = b[i * rank(group) + r];
    }
    start += group.n;
  }
  return [{ dims: [k, width], data: down }, { dims: [width, total], data: up }];
}

/** The places that a graph has for adapters, and what to feed into them. */
export class Places {
  /** graph: of `openGraph`; defaults: Map name -> {dims, data}, what the graph itself had. */
  constructor(graph, defaults) {
    this.defaults = defaults;
    this.packed = JSON.parse(graph.metadata["edgepeft.packed"] ?? "{}");
    const inside = new Set(Object.keys(this.packed).flatMap((node) => [`${node}.lora_A`, `${node}.lora_B`]));
    this.plain = new Map([...defaults.keys()].filter((name) => !inside.has(name)).map((n) => [n, graph.inputs.get(n)]));
    this.groups = new Map();
    for (const groups of Object.values(this.packed)) {
      for (const { a, b, gate } of groups) for (const name of [a, b, gate]) if (name) this.groups.set(name, true);
    }
  }

  get any() {
    return this.defaults.size > 0;
  }

  /** Return Map input -> {dims, data} for an adapter's tensors; `own`: the base's own of what adapters replace. */
  feeds(where, tensors, own, isBase) {
    const odd = [...tensors.keys()].find((name) => !this.groups.has(name) && !this.plain.has(name));
    if (odd) throw new EdgePeftError(`${where}: the graph has no place for its ${odd}.`);
    const out = new Map();
    for (const [node, groups] of Object.entries(this.packed)) {
      const k = this.defaults.get(`${node}.lora_A`).dims[0];
      this.#check(where, groups, tensors, k);
      const [a, b] = pack(groups, tensors, k);
      out.set(`${node}.lora_A`, a);
      out.set(`${node}.lora_B`, b);
    }
    for (const [name, { dims }] of this.plain) {
      const given = tensors.get(name)?.data.length === 0 ? null : tensors.get(name);
      const found = given ?? own.get(name) ?? neutral(name, dims);
      if (!found && !isBase) throw new EdgePeftError(`${where}: ${name} is missing.`);
      const value = found ?? this.defaults.get(name); // the base has the default adapter's head
      const right = value.dims.every((size, axis) => typeof dims[axis] === "string" || size === dims[axis]);
      if (value.dims.length !== dims.length || !right) {
        throw new EdgePeftError(`${where}: ${name} is [${value.dims}], expected [${dims}].`);
      }
      out.set(name, value);
    }
    return out;
  }

  #check(where, groups, tensors, k) {
    for (const { a, b, n } of groups) {
      const [down, up] = [tensors.get(a)?.dims ?? [0, k], tensors.get(b)?.dims ?? [n, 0]];
      if (down[0] !== up[1] || down[1] !== k || up[0] !== n) {
        throw new EdgePeftError(`${where}: ${a} is [${down}] and its B [${up}], expected [R, ${k}] and [${n}, R].`);
      }
    }
  }
}

/** Return what leaves the base as it is, or null where there is none. A and B are never of rank 0 here. */
function neutral(name, dims) {
  if (/\.lora_[AB]\.weight$/.test(name)) {
    const sizes = dims.map((size) => (typeof size === "number" ? size : RANKS));
    return { dims: sizes, data: new Float32Array(sizes[0] * sizes[1]) };
  }
  if (!/\.(gate|s_in|s_out)$/.test(name)) return null;
  const sizes = dims.map((size) => (typeof size === "number" ? size : 1));
  return { dims: sizes, data: new Float32Array(sizes.reduce((a, b) => a * b, 1)).fill(1) };
}

/** Take the keys and values out of an adapter's tensors that stand before the text: Map input -> {dims, data}. */
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
  return { where: folder, tensors, labels: (await json("labels.json")) ?? manifest.labels ?? [] };
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

/** Return the base's own of what adapters replace: Map name -> {dims, data}. */
export async function ownTensors(files) {
  return files.has(OWN) ? readTensors(OWN, (await files.read([OWN]))[OWN]).tensors : new Map();
}
