#version 450
#extension GL_GOOGLE_include_directive : require
// An adapted linear for few rows: a workgroup sums one tile of 16 outputs of one row over all columns. A x was computed
// before (READ), or by each workgroup for itself (INSIDE), or by the dispatch's first workgroups, one a rank (BESIDE); BEHIND
// makes them the last ones, for tests.
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

// ---- BESIDE: nobody waits for A x, as no GPU promises to run what is waited for -----------------------------------------
//
//   of a row of x     state: ranks that are there | tiles that are done << 16      pending: 1 for each tile left without B
//
// A tile whose W x is summed before all ranks are there is put down without its adapter, and left to the workgroup of the
// last rank. One that was told so too late takes it itself: whoever takes the 1 out of `pending` ends the tile. All of it is
// 0 again when the dispatch ends.
layout(std430, binding = 3) coherent buffer YNow { float y_now[]; };
layout(std430, binding = 7) coherent buffer State { uint state[]; };
layout(std430, binding = 7) coherent buffer TNow { float t_now[]; };
const uint MOST_ROWS = 8u, RANKS_MASK = 0xffffu, TILE = 0x10000u;
shared uint seen;

uint pending(uint m, uint tile) { return MOST_ROWS + m * p.tiles + tile; }

// Makes what the workgroup wrote seen by whoever reads behind the next atomic.
void publish() {
  memoryBarrierBuffer();
  barrier();
  if (gl_LocalInvocationID.x == 0u) memoryBarrierBuffer();
}

// What thread 0 found, for all; behind it what others published is there.
uint told() {
  barrier();
  const uint found = seen;
  barrier();
  memoryBarrierBuffer();
  return found;
}

// Counts something in, and returns what was there before.
uint arrive(uint m, uint what) {
  publish();
  if (gl_LocalInvocationID.x == 0u) {
    seen = atomicAdd(state[m], what);
    if (seen + what == p.ranks + p.tiles * TILE) atomicExchange(state[m], 0u);
  }
  return told();
}

bool all_ranks(uint found) { return (found & RANKS_MASK) == p.ranks; }

uint look(uint m) {
  if (gl_LocalInvocationID.x == 0u) seen = atomicAdd(state[m], 0u);
  return told();
}

bool take(uint m, uint tile) {
  if (gl_LocalInvocationID.x == 0u) seen = atomicExchange(state[pending(m, tile)], 0u);
  return told() == 1u;
}
// -----------------------------------------------------------------------------------------------------------------------

// y of row n of a group: what W x is, and B A x.
void end(uint g, uint rank, uint m, uint n, float v) {
  if (n >= p.group[g].n) return;
  for (uint r = 0u; r < p.group[g].rank; r++) {
    const uint at = p.t + m * p.ranks + rank + r;
    v += b_at(g, n, r) * (LOW == INSIDE ? low[r] : LOW == READ ? t[at] : t_now[at]);
  }
  finish(g, m, n, v);
}

// A x of one rank, and the tiles that waited for the last one.
void one_rank(uint rank, uint m) {
  const uint id = gl_LocalInvocationID.x;
  uint g = 0u, row = rank;
  while (g < 2u && row >= p.group[g].rank) row -= p.group[g++].rank;
  float sum = 0.0;
  for (uint k8 = id; k8 < p.k / 8u; k8 += THREADS) sum += low8(g, row, m, k8);
  add_up(vec4(sum, 0.0, 0.0, 0.0));
  if (id == 0u) t_now[p.t + m * p.ranks + rank] = gated(g, row, m, row_sum(0u) + row_sum(4u) + row_sum(8u) + row_sum(12u));
  const uint before = arrive(m, 1u);
  if (!all_ranks(before + 1u) || before < TILE) return;
  for (uint tile = id; tile < p.tiles; tile += THREADS) {
    if (atomicExchange(state[pending(m, tile)], 0u) == 0u) continue;
    memoryBarrierBuffer();
    uint first, from;
    const uint own = group_of(tile, first, from);
    for (uint n = tile * 16u - first; n < min(tile * 16u + 16u - first, p.group[own].n); n++)
      end(own, from, m, n, y_now[p.group[own].y + m * p.group[own].n + n]);
  }
}

// Ends a tile of which each of the first 16 threads holds v, or leaves it.
void end_beside(uint tile, uint g, uint first, uint rank, uint m, float v) {
  const uint id = gl_LocalInvocationID.x, n = tile * 16u + id - first;
  const bool ready = all_ranks(look(m));
  if (!ready) {
    if (id < 16u && n < p.group[g].n) y_now[p.group[g].y + m * p.group[g].n + n] = v;
    publish();
    if (id == 0u) atomicExchange(state[pending(m, tile)], 1u);
  }
  const uint before = arrive(m, TILE);
  if (!ready && (!all_ranks(before) || !take(m, tile))) return;
  if (id < 16u) end(g, rank, m, n, v);
}

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
  const uint id = gl_LocalInvocationID.x, vector = id % LANES, m = gl_WorkGroupID.y, group = gl_WorkGroupID.x;
  const uint before = LOW == BESIDE ? p.ranks : 0u;
  if (LOW == BESIDE && group < p.ranks) {
    one_rank(group, m);
    return;
  }
  if (LOW == BEHIND && group >= gl_NumWorkGroups.x - p.ranks) {
    one_rank(group + p.ranks - gl_NumWorkGroups.x, m);
    return;
  }
  uint done = NONE;
  load_table();
  for (uint i = 0u; i < TILES; i++) {
    const uint tile = (group - before) * TILES + i;
    if (tile >= p.tiles) return;
    uint first, rank;
    const uint g = group_of(tile, first, rank);
    if (LOW == INSIDE && g != done) low_rank(g, m);
    done = g;
    add_up(part(tile, vector, m));
    const float v = id < 16u ? row_sum(id) : 0.0;
    if (LOW == BESIDE || LOW == BEHIND) end_beside(tile, g, first, rank, m, v);
    else if (id < 16u) end(g, rank, m, tile * 16u + id - first, v);
  }
}
