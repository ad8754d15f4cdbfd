#version 450
#extension GL_GOOGLE_include_directive : require
// An adapted linear for few rows: a workgroup sums one tile of 16 outputs of one row over all columns.
#include "linear.glsl"

shared vec4 sums[THREADS];
shared float low[MOST_RANK];

void add_up() {  // into the first four, each one of the four vectors of rows
  for (uint s = THREADS / 2u; s >= 4u; s /= 2u) {
    barrier();
    if (gl_LocalInvocationID.x < s) sums[gl_LocalInvocationID.x] += sums[gl_LocalInvocationID.x + s];
  }
  barrier();
}

void low_rank(uint g, uint m) {  // 16 threads for a row of A
  const uint lane = gl_LocalInvocationID.x % 16u;
  for (uint first = 0u; first < p.group[g].rank; first += THREADS / 16u) {
    const uint row = first + gl_LocalInvocationID.x / 16u;
    float sum = 0.0;
    if (row < p.group[g].rank)
      sum = low_part(g, row, m, lane);
    barrier();
    sums[gl_LocalInvocationID.x].x = sum;
    for (uint s = 8u; s > 0u; s /= 2u) {
      barrier();
      if (lane < s) sums[gl_LocalInvocationID.x].x += sums[gl_LocalInvocationID.x + s].x;
    }
    barrier();
    if (lane == 0u && row < p.group[g].rank) low[row] = gated(g, row, m, sums[gl_LocalInvocationID.x].x);
  }
  barrier();
}

vec4 unit_sum(uvec4 v, uint unit, uint vector, uint m) {
  const uint j = vector / 4u;
  const vec4 first = factor_of(scaled_x(m, unit * 8u + j), 0u);
  if (BITS == 8u)
    return vec4(dot(bytes(v.x), first), dot(bytes(v.y), first), dot(bytes(v.z), first), dot(bytes(v.w), first));
  const vec4 second = factor_of(scaled_x(m, unit * 8u + 4u + j), 4u);
  return vec4(dot(nibbles(v.x, 0u), first), dot(nibbles(v.y, 0u), first), dot(nibbles(v.z, 0u), first),
              dot(nibbles(v.w, 0u), first)) +
         vec4(dot(nibbles(v.x, 4u), second), dot(nibbles(v.y, 4u), second), dot(nibbles(v.z, 4u), second),
              dot(nibbles(v.w, 4u), second));
}

// The sums of four rows of a tile over every so many-th unit, two of them read before either is used.
vec4 part(uint tile, uint vector, uint m) {
  const uint units = p.k / 32u, step_size = THREADS / LANES;
  const uint base = tile * units;
  vec4 sum = vec4(0.0);
  uint unit = gl_LocalInvocationID.x / LANES;
  for (; unit + step_size < units; unit += 2u * step_size) {
    const uvec4 v = w4[(base + unit) * LANES + vector], w = w4[(base + unit + step_size) * LANES + vector];
    const vec4 s = scales(tile, unit, vector % 4u), t = scales(tile, unit + step_size, vector % 4u);
    sum += unit_sum(v, unit, vector, m) * s + unit_sum(w, unit + step_size, vector, m) * t;
  }
  if (unit < units) sum += unit_sum(w4[(base + unit) * LANES + vector], unit, vector, m) * scales(tile, unit, vector % 4u);
  return sum;
}

void main() {
  const uint id = gl_LocalInvocationID.x, vector = id % LANES, m = gl_WorkGroupID.y;
  uint done = NONE;
  load_table();
  for (uint i = 0u; i < TILES; i++) {
    const uint tile = gl_WorkGroupID.x * TILES + i;
    if (tile >= p.tiles) return;
    uint first, rank;
    const uint g = group_of(tile, first, rank);
    if (LOW_INSIDE && g != done) low_rank(g, m);
    done = g;
    const vec4 sum = part(tile, vector, m);
    barrier();
    sums[id] = sum;
    add_up();
    if (id < 16u) {
      const uint n = tile * 16u + id - first;
      float v = sums[id / 4u][id % 4u];
      if (n < p.group[g].n)
        for (uint r = 0u; r < p.group[g].rank; r++)
          v += b_at(g, n, r) * (LOW_INSIDE ? low[r] : t[p.t + m * p.ranks + rank + r]);
      finish(g, m, n, v);
    }
  }
}
