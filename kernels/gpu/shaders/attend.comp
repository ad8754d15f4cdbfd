#version 450
#extension GL_GOOGLE_include_directive : require
// y = softmax(scale q K + what is added to scores) V, a workgroup for one query of one head, 64 keys at a time.
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint MASK = 0;  // 0: a causal one, of a cache's lengths; 1: of padded keys
layout(constant_id = 1) const bool HALF = false;  // keys and values are float16
layout(push_constant) uniform Words {
  uint queries, keys, heads, kv_heads, dim, q, key, value, y, key_batch, key_head, key_row, lengths, window;
  float scale, softcap;
} p;
layout(std430, binding = 0) readonly buffer Q { float q[]; };
layout(std430, binding = 1) readonly buffer Key { float key[]; };
layout(std430, binding = 1) readonly buffer KeyHalf { uint key_half[]; };
layout(std430, binding = 2) readonly buffer Value { float value[]; };
layout(std430, binding = 2) readonly buffer ValueHalf { uint value_half[]; };
layout(std430, binding = 3) buffer Y { float y[]; };
layout(std430, binding = 4) readonly buffer Lengths { int lengths[]; };
const uint THREADS = 64u, NONE = 0xffffffffu;
const float HIDDEN = -10000.0, LOWEST = -3.0e38;
shared float query[256];
shared float share[THREADS];
#include "sums.glsl"

// The query times the key that lies at an offset.
float scored(uint from) {
  float sum = 0.0;
  if (HALF) {
    for (uint d = 0u; d < p.dim; d += 2u) sum += dot(vec2(query[d], query[d + 1u]), unpackHalf2x16(key_half[(from + d) / 2u]));
  } else {
    for (uint d = 0u; d < p.dim; d++) sum += query[d] * key[from + d];
  }
  return sum;
}

float value_at(uint at) {
  if (!HALF) return value[at];
  const vec2 pair = unpackHalf2x16(value_half[at / 2u]);
  return at % 2u == 0u ? pair.x : pair.y;
}

void main() {
  const uint id = gl_LocalInvocationID.x, head = gl_WorkGroupID.x, row = gl_WorkGroupID.y, batch = gl_WorkGroupID.z;
  const uint at = ((batch * p.queries + row) * p.heads + head) * p.dim;
  const uint own = batch * p.key_batch + head / (p.heads / p.kv_heads) * p.key_head;
  for (uint d = id; d < p.dim; d += THREADS) query[d] = q[p.q + at + d] * p.scale;
  uint first = 0u, last = p.keys;
  if (MASK == 0u) {
    last = uint(lengths[p.lengths + batch]) + row + 1u;
    if (p.window != 0u && last > p.window) first = last - p.window;
  }
  float top = LOWEST, sum = 0.0, mixed[4] = float[](0.0, 0.0, 0.0, 0.0);
  for (uint start = first; start < last; start += THREADS) {
    barrier();
    const uint j = start + id, from = p.key + own + j * p.key_row;
    float score = LOWEST;
    if (j < last) {
      score = scored(from);
      if (p.softcap != 0.0) score = p.softcap * tanh(score / p.softcap);
      if (MASK == 1u && lengths[p.lengths + batch * p.keys + j] == 0) score += HIDDEN;
    }
    const float new_top = max(top, highest(score)), kept = exp(top - new_top);
    const float part = j < last ? exp(score - new_top) : 0.0;
    share[id] = part;
    sum = sum * kept + add_up(part);
    top = new_top;
    const uint count = min(THREADS, last - start);
    for (uint i = 0u; i < 4u; i++) {
      const uint d = id + i * THREADS;
      if (d >= p.dim) break;
      float v = mixed[i] * kept;
      for (uint n = 0u; n < count; n++) v += share[n] * value_at(p.value + own + (start + n) * p.key_row + d);
      mixed[i] = v;
    }
  }
  for (uint i = 0u; i < 4u; i++) {
    const uint d = id + i * THREADS;
    if (d < p.dim) y[p.y + at + d] = mixed[i] / sum;
  }
}
