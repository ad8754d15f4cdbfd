#version 450
#extension GL_GOOGLE_include_directive : require
// An adapted linear for few rows: a workgroup sums one tile of 16 outputs of one row over all columns.
#include "linear.glsl"

shared vec4 sums[THREADS];
shared float low[MOST_RANK];

// `add_up` takes each thread's sums of four rows, which are the rows of every fourth thread; `row_sum` is a row's in all.
// `add_up_16` adds up what 16 threads in a row hold, for all of them.
#ifdef SUBGROUPS
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require
void add_up(vec4 v) {  // each subgroup leaves four vectors
  for (uint s = min(gl_SubgroupSize, THREADS) / 2u; s >= 4u; s /= 2u) v += subgroupShuffleXor(v, s);
  barrier();
  if (gl_SubgroupInvocationID < 4u) sums[4u * gl_SubgroupID + gl_SubgroupInvocationID] = v;
  barrier();
}

float row_sum(uint row) {
  float v = 0.0;
  for (uint i = 0u; i < gl_NumSubgroups; i++) v += sums[4u * i + row / 4u][row % 4u];
  return v;
}

float add_up_16(float v) {
  const uint width = min(gl_SubgroupSize, 16u), left = 16u / width, id = gl_LocalInvocationID.x;
  for (uint s = width / 2u; s > 0u; s /= 2u) v += subgroupShuffleXor(v, s);
  if (left == 1u) return v;
  barrier();
  sums[id].x = v;
  barrier();
  v = 0.0;
  for (uint i = 0u; i < left; i++) v += sums[id / 16u * 16u + i * width].x;
  return v;
}
#else
#include "halves.glsl"
#define VECTOR(i) sums[i]
#define NUMBER(i) sums[i].x

void add_up(vec4 v) {  // into the first four vectors
  const uint id = gl_LocalInvocationID.x;
  barrier();
  sums[id] = v;
  BY_HALVES(VECTOR, THREADS, 4u, PLUS);
}

float row_sum(uint row) { return sums[row / 4u][row % 4u]; }

float add_up_16(float v) {
  const uint id = gl_LocalInvocationID.x;
  barrier();
  sums[id].x = v;
  BY_HALVES(NUMBER, 16u, 1u, PLUS);
  return sums[id / 16u * 16u].x;
}
#endif

void low_rank(uint g, uint m) {  // 16 threads for a row of A
  const uint lane = gl_LocalInvocationID.x % 16u;
  for (uint first = 0u; first < p.group[g].rank; first += THREADS / 16u) {
    const uint row = first + gl_LocalInvocationID.x / 16u;
    const float sum = add_up_16(row < p.group[g].rank ? low_part(g, row, m, lane) : 0.0);
    if (lane == 0u && row < p.group[g].rank) low[row] = gated(g, row, m, sum);
  }
  barrier();
}

vec4 unit_sum(uvec4 v, uint unit, uint vector, uint m) {
  const uint j = vector / 4u;
  const number4 first = factor_of(scaled_x(m, unit * 8u + j), 0u);
  if (BITS == 8u)
    return vec4(product(bytes(v.x), first), product(bytes(v.y), first), product(bytes(v.z), first), product(bytes(v.w), first));
  const number4 second = factor_of(scaled_x(m, unit * 8u + 4u + j), 4u);
  return vec4(product(nibbles(v.x, 0u), first), product(nibbles(v.y, 0u), first), product(nibbles(v.z, 0u), first),
              product(nibbles(v.w, 0u), first)) +
         vec4(product(nibbles(v.x, 4u), second), product(nibbles(v.y, 4u), second), product(nibbles(v.z, 4u), second),
              product(nibbles(v.w, 4u), second));
}

// What offsets add to the sums of four rows, of the same columns.
vec4 offset_sum(uint tile, uint unit, uint vector, uint m) {
  vec4 x = scaled_x(m, unit * 8u + vector / 4u);
  if (BITS == 4u) x += scaled_x(m, unit * 8u + 4u + vector / 4u);
  return offsets(tile, unit, vector % 4u) * dot(x, vec4(1.0));
}

// The sums of four rows of a tile over every so many-th unit, two of them read before either is used.
vec4 part(uint tile, uint vector, uint m) {
  const uint units = p.k / 32u, step_size = THREADS / LANES;
  const uint base = tile * units;
  vec4 sum = vec4(0.0), moved = vec4(0.0);
  uint unit = gl_LocalInvocationID.x / LANES;
  if (OFFSETS != 0u)
    for (uint i = unit; i < units; i += step_size) moved += offset_sum(tile, i, vector, m);
  for (; unit + step_size < units; unit += 2u * step_size) {
    const uvec4 v = w4[(base + unit) * LANES + vector], w = w4[(base + unit + step_size) * LANES + vector];
    const vec4 s = scales(tile, unit, vector % 4u), t = scales(tile, unit + step_size, vector % 4u);
    sum += unit_sum(v, unit, vector, m) * s + unit_sum(w, unit + step_size, vector, m) * t;
  }
  if (unit < units) sum += unit_sum(w4[(base + unit) * LANES + vector], unit, vector, m) * scales(tile, unit, vector % 4u);
  return UP * sum + moved;
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
    add_up(part(tile, vector, m));
    if (id < 16u) {
      const uint n = tile * 16u + id - first;
      float v = row_sum(id);
      if (n < p.group[g].n)
        for (uint r = 0u; r < p.group[g].rank; r++)
          v += b_at(g, n, r) * (LOW_INSIDE ? low[r] : t[p.t + m * p.ranks + rank + r]);
      finish(g, m, n, v);
    }
  }
}
