#version 450
#extension GL_GOOGLE_include_directive : require
// An adapted linear for many rows: a workgroup of 128 computes 32 rows of x times 4 tiles of 16 outputs, a unit of
// columns at a time in its own memory, and each thread 4 x 4 of them.
#include "linear.glsl"

const uint ROWS = 32u, OUTPUTS = 64u;
shared vec4 w_kn[32][OUTPUTS / 4u];
shared vec4 x_km[32][ROWS / 4u];

// Four rows of a tile, of one vector of lanes: turned, so that a row's columns lie one below the other.
void unpack(uint tile, uint place, uint unit, uint vector) {
  const uint j = vector / 4u, n4 = vector % 4u;
  const uvec4 v = tile < p.tiles ? w4[(tile * (p.k / 32u) + unit) * LANES + vector] : uvec4(0u);
  const vec4 scale = tile < p.tiles ? scales(tile, unit, n4) : vec4(0.0);
  mat4 first, second;
  for (uint c = 0u; c < 4u; c++) {
    first[c] = (BITS == 8u ? bytes(v[c]) : nibbles(v[c])) * scale[c];
    if (BITS == 4u) second[c] = nibbles(v[c] >> 4) * scale[c];
  }
  first = transpose(first);
  for (uint i = 0u; i < 4u; i++) w_kn[4u * j + i][place * 4u + n4] = first[i];
  if (BITS == 8u) return;
  second = transpose(second);
  for (uint i = 0u; i < 4u; i++) w_kn[16u + 4u * j + i][place * 4u + n4] = second[i];
}

void load_x(uint row4, uint unit, uint k4) {
  mat4 rows;
  for (uint c = 0u; c < 4u; c++) rows[c] = row4 + c < p.m ? scaled_x(row4 + c, unit * 8u + k4) : vec4(0.0);
  rows = transpose(rows);
  for (uint i = 0u; i < 4u; i++) x_km[4u * k4 + i][row4 % ROWS / 4u] = rows[i];
}

void main() {
  const uint id = gl_LocalInvocationID.x, n4 = id % 16u, m4 = id / 16u;
  const uint first_tile = gl_WorkGroupID.x * 4u, first_row = gl_WorkGroupID.y * ROWS;
  mat4 sum = mat4(0.0);  // a column for each of four rows of x
  for (uint unit = 0u; unit < p.k / 32u; unit++) {
    barrier();
    for (uint i = id; i < 4u * LANES; i += 128u) unpack(first_tile + i / LANES, i / LANES, unit, i % LANES);
    if (id < ROWS * 2u) load_x(first_row + id / 8u * 4u, unit, id % 8u);
    barrier();
    for (uint k = 0u; k < 32u; k++) sum += outerProduct(w_kn[k][n4], x_km[k][m4]);
  }
  const uint tile = first_tile + n4 / 4u;
  if (tile >= p.tiles) return;
  uint first, rank;
  const uint g = group_of(tile, first, rank);
  for (uint i = 0u; i < 4u; i++) {
    const uint m = first_row + 4u * m4 + i;
    if (m >= p.m) return;
    for (uint c = 0u; c < 4u; c++) {
      const uint n = first_tile * 16u + n4 * 4u + c - first;
      float v = sum[i][c];
      if (n < p.group[g].n)
        for (uint r = 0u; r < p.group[g].rank; r++) v += b_at(g, n, r) * t[p.t + m * p.ranks + rank + r];
      finish(g, m, n, v);
    }
  }
}
