// What the shaders of an adapted linear share: y_g = s_out_g (W_g (s_in x) + B_g (gate_g (A_g x))) + bias_g; with OFFSETS
// W_g + C_g [OFFSETS, N] in place of W_g, each number of which stands for a block of columns.
// Weights lie in tiles as kernels/formats.h says: a unit of 16 rows x 32 columns is 16 or 32 vectors of four rows' lanes.
layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint THREADS = 64;
layout(constant_id = 1) const uint BITS = 4;
layout(constant_id = 2) const uint BLOCK = 32;        // columns that share a scale; 0: the whole row
layout(constant_id = 3) const bool NF4 = false;
layout(constant_id = 4) const bool HALF_SCALE = true;
layout(constant_id = 5) const uint LOW = 0;           // where A x comes from, one of the next line's
layout(constant_id = 6) const uint TILES = 1;          // tiles a workgroup goes through, one after the other
layout(constant_id = 7) const uint OFFSETS = 0;        // blocks of a row's columns, 0 without offsets

const uint READ = 0u, INSIDE = 1u, BESIDE = 2u, BEHIND = 3u;
const uint NONE = 0xffffffffu;
const uint HALF = 1u, GATE_NUMBER = 2u, GATE_ROWS = 4u, S_OUT_NUMBER = 8u, BIAS_NUMBER = 16u;
const uint LANES = BITS * 4u;    // vectors in a unit
const uint MOST_RANK = 256u;     // that fits into a workgroup's own memory

struct Group { uint n, rank, a, b, gate, s_out, bias, y; };  // offsets in elements
layout(push_constant) uniform Words {
  uint k, m, tiles, x, s_in, t, flags, ranks;
  Group group[3];
} p;

layout(std430, binding = 0) readonly buffer W { uvec4 w4[]; };
layout(std430, binding = 1) readonly buffer ScaleHalf { uvec2 scale_half[]; };
layout(std430, binding = 1) readonly buffer ScaleFloat { vec4 scale_float[]; };
layout(std430, binding = 2) readonly buffer X { vec4 x4[]; };
layout(std430, binding = 3) buffer Y { float y[]; };
layout(std430, binding = 4) readonly buffer Adapter { uint adapter[]; };
layout(std430, binding = 4) readonly buffer Adapter4 { uvec4 adapter4[]; };
layout(std430, binding = 5) readonly buffer Factors { float factor[]; };
layout(std430, binding = 6) readonly buffer Bias { float bias[]; };
layout(std430, binding = 7) buffer T { float t[]; };
layout(std430, binding = 8) readonly buffer Offset { uint offset[]; };

#include "codes.glsl"

bool flag(uint g, uint bit) { return (p.flags >> (5u * g) & bit) != 0u; }

// The scales of rows 4 n4 .. 4 n4 + 3 of a tile for a unit of columns.
vec4 scales(uint tile, uint unit, uint n4) {
  const uint blocks = BLOCK == 0u ? 1u : p.k / BLOCK, block = BLOCK == 0u ? 0u : unit * 32u / BLOCK;
  const uint at = (tile * blocks + block) * 4u + n4;
  if (!HALF_SCALE) return scale_float[at];
  const uvec2 pair = scale_half[at];
  return vec4(unpackHalf2x16(pair.x), unpackHalf2x16(pair.y));
}

// Columns 4 k4 .. 4 k4 + 3 of row m of x, alone and times s_in.
vec4 plain_x(uint m, uint k4) { return x4[(p.x + m * p.k) / 4u + k4]; }
vec4 scaled_x(uint m, uint k4) {
  vec4 v = plain_x(m, k4);
  if (p.s_in != NONE) {
    const uint at = p.s_in + 4u * k4;
    v *= vec4(factor[at], factor[at + 1u], factor[at + 2u], factor[at + 3u]);
  }
  return v;
}

// Eight columns of A, which is [R, K], times x.
float low8(uint g, uint row, uint m, uint k8) {
  const vec4 lo = plain_x(m, 2u * k8), hi = plain_x(m, 2u * k8 + 1u);
  const uint at = p.group[g].a + row * p.k + 8u * k8;
  if (flag(g, HALF)) {
    const uvec4 v = adapter4[at / 8u];
    return dot(vec4(unpackHalf2x16(v.x), unpackHalf2x16(v.y)), lo) + dot(vec4(unpackHalf2x16(v.z), unpackHalf2x16(v.w)), hi);
  }
  return dot(uintBitsToFloat(adapter4[at / 4u]), lo) + dot(uintBitsToFloat(adapter4[at / 4u + 1u]), hi);
}

// Every 16th eight columns of that from `lane` on, four of them read before any is used.
float low_part(uint g, uint row, uint m, uint lane) {
  const uint count = p.k / 8u;
  float sum = 0.0;
  uint k8 = lane;
  for (; k8 + 48u < count; k8 += 64u)
    sum += low8(g, row, m, k8) + low8(g, row, m, k8 + 16u) + low8(g, row, m, k8 + 32u) + low8(g, row, m, k8 + 48u);
  for (; k8 < count; k8 += 16u) sum += low8(g, row, m, k8);
  return sum;
}

float gated(uint g, uint row, uint m, float low) {
  const Group group = p.group[g];
  if (group.gate == NONE) return low;
  if (!flag(g, GATE_ROWS)) return low * factor[group.gate + (flag(g, GATE_NUMBER) ? 0u : row)];
  const uint text = flag(g, GATE_NUMBER) ? m / (p.flags >> 16u) : m;  // both flags: gates are of texts, of so many rows
  return low * factor[group.gate + text * group.rank + row];
}

float half_of(uint word, uint at) {
  const vec2 pair = unpackHalf2x16(word);
  return at % 2u == 0u ? pair.x : pair.y;
}
float b_at(uint g, uint n, uint r) {  // B is [R, N]
  const uint at = p.group[g].b + r * p.group[g].n + n;
  return flag(g, HALF) ? half_of(adapter[at / 2u], at) : uintBitsToFloat(adapter[at]);
}

// What is added to the weights of rows 4 n4 .. 4 n4 + 3 of a tile, all columns of a unit alike.
float offset_at(uint at) { return flag(3u, HALF) ? half_of(offset[at / 2u], at) : uintBitsToFloat(offset[at]); }
vec4 offsets(uint tile, uint unit, uint n4) {
  const uint at = (unit / (p.k / 32u / OFFSETS) * p.tiles + tile) * 16u + 4u * n4;
  return vec4(offset_at(at), offset_at(at + 1u), offset_at(at + 2u), offset_at(at + 3u));
}

// Writes y of row n of a group, when it is one.
void finish(uint g, uint m, uint n, float v) {
  const Group group = p.group[g];
  if (group.s_out != NONE) v *= factor[group.s_out + (flag(g, S_OUT_NUMBER) ? 0u : n)];
  if (group.bias != NONE) v += bias[group.bias + (flag(g, BIAS_NUMBER) ? 0u : n)];
  if (n < group.n) y[group.y + m * group.n + n] = v;
}

// The group that a tile is of; `first` is the group's first row, `rank` where its ranks begin among all.
uint group_of(uint tile, out uint first, out uint rank) {
  uint g = 0u;
  first = 0u;
  rank = 0u;
  while (g < 2u && tile * 16u >= first + p.group[g].n) {
    first += p.group[g].n;
    rank += p.group[g].rank;
    g++;
  }
  return g;
}
