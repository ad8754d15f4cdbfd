#version 450
// y[i, :] = x[index[i], :] for rows of k 32-bit words, of which each source row begins `stride` after the one before;
// or y = x turned, rows for columns.
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint HOW = 0;
layout(push_constant) uniform Words { uint count, k, x, stride, index, y; } p;
layout(std430, binding = 0) readonly buffer X { uint x[]; };
layout(std430, binding = 1) readonly buffer Index { uint index[]; };
layout(std430, binding = 2) buffer Y { uint y[]; };

const uint INDEXED = 1u, TURNED = 2u;

void main() {
  const uint step_size = gl_NumWorkGroups.x * 64u;
  for (uint i = gl_GlobalInvocationID.x; i < p.count * p.k; i += step_size) {
    const uint row = i / p.k, column = i % p.k;
    const uint from = HOW == INDEXED ? index[p.index + row] : row;
    y[p.y + i] = x[p.x + (HOW == TURNED ? column * p.stride + row : from * p.stride + column)];
  }
}
