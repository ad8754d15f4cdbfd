#version 450
// y[i, :] = value(code[id[i], :]) * scale[id[i], block]: rows of a packed table, in tiles or in rows.
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint BITS = 4;
layout(constant_id = 1) const uint BLOCK = 32;  // 0: the whole row
layout(constant_id = 2) const bool NF4 = false;
layout(constant_id = 3) const bool HALF_SCALE = true;
layout(constant_id = 4) const bool TILED = true;
layout(push_constant) uniform Words { uint count, k, w, scale, id, y; } p;
layout(std430, binding = 0) readonly buffer W { uint w[]; };
layout(std430, binding = 1) readonly buffer Scale { uint scale[]; };
layout(std430, binding = 2) readonly buffer Id { uint id[]; };
layout(std430, binding = 3) buffer Y { float y[]; };

const float NF4_VALUES[16] = float[](
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0);

uint tiled_code(uint row, uint k) {
  const uint unit = row / 16u * (p.k / 32u) + k / 32u, c = k % 32u;
  const uint lane = unit * BITS * 16u + c % (4u * BITS) / 4u * 16u + row % 16u;
  const uint shift = 8u * (c % 4u) + (BITS == 4u ? 4u * (c / 16u) : 0u);
  return w[p.w + lane] >> shift & (BITS == 4u ? 15u : 255u);
}

uint row_code(uint row, uint k) {
  const uint at = row * p.k + k, in_word = 32u / BITS;
  return w[p.w + at / in_word] >> at % in_word * BITS & (BITS == 4u ? 15u : 255u);
}

float value_at(uint row, uint k) {
  const uint code = TILED ? tiled_code(row, k) : row_code(row, k);
  return NF4 ? NF4_VALUES[code] : float(code) - (BITS == 4u ? 8.0 : 128.0);
}

float scale_at(uint row, uint k) {
  const uint blocks = BLOCK == 0u ? 1u : p.k / BLOCK, block = BLOCK == 0u ? 0u : k / BLOCK;
  const uint at = p.scale + (TILED ? (row / 16u * blocks + block) * 16u + row % 16u : row * blocks + block);
  if (!HALF_SCALE) return uintBitsToFloat(scale[at]);
  const vec2 pair = unpackHalf2x16(scale[at / 2u]);
  return at % 2u == 0u ? pair.x : pair.y;
}

void main() {
  const uint step_size = gl_NumWorkGroups.x * 64u;
  for (uint i = gl_GlobalInvocationID.x; i < p.count * p.k; i += step_size) {
    const uint row = id[p.id + i / p.k], k = i % p.k;
    y[p.y + i] = value_at(row, k) * scale_at(row, k);
  }
}
