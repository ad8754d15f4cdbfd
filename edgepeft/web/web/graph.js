/**
 * What ONNX Runtime Web cannot be asked: a graph's inputs that have defaults, and the files its weights lie in.
 *
 *     model.webgpu.onnx, or model.onnx ──► the same graph with no defaults, so that adapters can be fed    + the defaults, by name
 *
 * ONNX Runtime Web takes no value for an input that has a default, so defaults are cut out here and always fed. A protobuf
 * message is a row of fields: a varint key (number << 3 | wire type), then a varint (type 0), 8 bytes (1), a length and
 * bytes (2) or 4 bytes (5).
 *
 *     ModelProto.graph = 7, .metadata_props = 14 ► key = 1, value = 2
 *     GraphProto.initializer = 5 ► TensorProto.dims = 1, .data_type = 2, .name = 8, .raw_data = 9, .external_data = 13
 *     GraphProto.input = 11 ► ValueInfoProto.name = 1, .type = 2 ► .tensor_type = 1 ► .elem_type = 1, .shape = 2 ► .dim = 1
 */

export const KINDS = { 1: "float32", 2: "uint8", 6: "int32", 7: "int64", 9: "bool", 10: "float16" };
const decoder = new TextDecoder();

function varint(bytes, at) {
  let value = 0;
  for (let factor = 1; ; factor *= 128) {
    const byte = bytes[at++];
    value += (byte & 127) * factor;
    if (byte < 128) return [value, at];
  }
}

function* fields(bytes) {
  for (let at = 0; at < bytes.length; ) {
    const start = at;
    let key, value;
    [key, at] = varint(bytes, at);
    if (key % 8 === 0) [value, at] = varint(bytes, at);
    else if (key % 8 === 2) {
      [value, at] = varint(bytes, at);
      value = bytes.subarray(at, (at += value));
    } else at += key % 8 === 1 ? 8 : 4;
    yield { number: key >>> 3, value, whole: bytes.subarray(start, at) };
  }
}

const all = (bytes, number) => [...fields(bytes)].filter((field) => field.number === number).map((field) => field.value);
const first = (bytes, number) => all(bytes, number)[0];
const text = (bytes, number) => decoder.decode(first(bytes, number) ?? new Uint8Array());
const pairs = (bytes, number) => Object.fromEntries(all(bytes, number).map((pair) => [text(pair, 1), text(pair, 2)]));

function lengthOf(value) {
  const out = [];
  for (; value > 127; value = Math.floor(value / 128)) out.push((value % 128) | 128);
  return [...out, value];
}

function joined(parts) {
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.reduce((at, part) => (out.set(part, at), at + part.length), 0);
  return out;
}

/** Return {kind, dims} of a ValueInfoProto; a dimension is a number, or a name where any size goes. */
function described(value) {
  const tensor = first(first(value, 2), 1);
  const dims = all(first(tensor, 2) ?? new Uint8Array(), 1);
  return { kind: KINDS[first(tensor, 1)], dims: dims.map((dim) => first(dim, 1) ?? text(dim, 2)) };
}

function dimsOf(tensor) {
  return all(tensor, 1).flatMap((dim) => {
    if (typeof dim === "number") return [dim];
    const out = [];
    for (let at = 0, size; at < dim.length; out.push(size)) [size, at] = varint(dim, at);
    return out;
  });
}

/**
 * Open a serialized model. Returns its bytes without defaults; inputs: Map name -> {kind, dims}; defaults: Map name ->
 * {kind, dims, raw} or {kind, dims, location, offset, length}; locations: the files of its weights; pasts: its inputs of keys and values; metadata.
 */
export function openGraph(model) {
  const graph = first(model, 7);
  const inputs = new Map(all(graph, 11).map((value) => [text(value, 1), described(value)]));
  const defaults = new Map();
  const locations = new Set();
  const kept = [];
  for (const { number, value, whole } of fields(graph)) {
    const name = number === 5 ? text(value, 8) : "";
    const outside = number === 5 ? pairs(value, 13) : {};
    if (number === 5 && inputs.has(name)) {
      const { location, offset = 0, length } = outside;
      const place = location ? { location, offset: Number(offset), length: Number(length) } : { raw: first(value, 9) };
      defaults.set(name, { kind: KINDS[first(value, 2)], dims: dimsOf(value), ...place });
    } else {
      kept.push(whole);
      if (outside.location) locations.add(outside.location);
    }
  }
  const inner = joined(kept);
  const parts = [...fields(model)].map((field) =>
    field.number === 7 ? joined([[(7 << 3) | 2], lengthOf(inner.length), inner]) : field.whole,
  );
  const pasts = [...inputs.keys()].filter((name) => name.startsWith("past_key_values."));
  return { bytes: joined(parts), inputs, defaults, locations, pasts, metadata: pairs(model, 14) };
}
