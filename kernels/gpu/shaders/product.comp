#version 450
#extension GL_GOOGLE_include_directive : require
// An adapted linear for many rows: a workgroup of 128 computes 32 rows of x times 4 tiles of 16 outputs, a unit of
// columns at a time in its own memory, and each thread 4 x 4 of them.
#include "linear.glsl"

const uint ROWS = 32u, OUTPUTS = 64u;
shared number4 w_kn[32][OUTPUTS / 4u];  // in float16 codes' numbers alone, whose scales come behind the sum of a unit
shared number4 x_km[32][ROWS / 4u];

void put_w(uint k, uint n4, number4 a, number4 b, number4 c, number4 d) {  // four columns of the rows a to d, turned
  w_kn[k][n4] = number4(a.x, b.x, c.x, d.x);
  w_kn[k + SECOND][n4] = number4(a.y, b.y, c.y, d.y);
  w_kn[k + THIRD][n4] = number4(a.z, b.z, c.z, d.z);
  w_kn[k + 3u][n4] = number4(a.w, b.w, c.w, d.w);
}

#ifdef FLOAT16
number4 scaled(number4 number, uint place, float scale) { return number; }
#else
number4 scaled(number4 number, uint place, float scale) { return number * factor_of(vec4(1.0), place) * scale; }
#endif

// Four rows of a tile, of one vector of lanes.
void unpack(uint tile, uint place, uint unit, uint vector) {
  const uint j = vector / 4u, n4 = vector % 4u, at = place * 4u + n4;
  const bool real = tile < p.tiles;
  const uvec4 v = real ? w4[(tile * (p.k / 32u) + unit) * LANES + vector] : uvec4(0u);
  const vec4 s = real ? scales(tile, unit, n4) : vec4(0.0);
  if (BITS == 8u) {
    put_w(4u * j, at, scaled(bytes(v.x), 0u, s.x), scaled(bytes(v.y), 0u, s.y), scaled(bytes(v.z), 0u, s.z), scaled(bytes(v.w), 0u, s.w));
    return;
  }
  put_w(4u * j, at, scaled(nibbles(v.x, 0u), 0u, s.x), scaled(nibbles(v.y, 0u), 0u, s.y), scaled(nibbles(v.z, 0u), 0u, s.z),
        scaled(nibbles(v.w, 0u), 0u, s.w));
  put_w(16u + 4u * j, at, scaled(nibbles(v.x, 4u), 4u, s.x), scaled(nibbles(v.y, 4u), 4u, s.y), scaled(nibbles(v.z, 4u), 4u, s.z),
        scaled(nibbles(v.w, 4u), 4u, s.w));
}

vec4 row_of_x(uint m, uint k4) { return m < p.m ? scaled_x(m, k4) / UP : vec4(0.0); }

void load_x(uint m, uint unit, uint k4) {  // four rows of x from m on, turned
  const uint at = unit * 8u + k4, place = m % ROWS / 4u;
  const vec4 a = row_of_x(m, at), b = row_of_x(m + 1u, at), c = row_of_x(m + 2u, at), d = row_of_x(m + 3u, at);
  x_km[4u * k4][place] = number4(a.x, b.x, c.x, d.x);
  x_km[4u * k4 + 1u][place] = number4(a.y, b.y, c.y, d.y);
  x_km[4u * k4 + 2u][place] = number4(a.z, b.z, c.z, d.z);
  x_km[4u * k4 + 3u][place] = number4(a.w, b.w, c.w, d.w);
}

// Four rows of x, each added up along the unit.
vec4 x_total(uint m4) {
  vec4 sum = vec4(0.0);
  for (uint k = 0u; k < 32u; k++) sum += vec4(x_km[k][m4]);
  return sum;
}

// Ends four outputs from n on, of one row of x.
void finish4(uint m, uint n, uint g, uint rank, vec4 v) {
  if (m >= p.m) return;
  for (uint r = 0u; r < p.group[g].rank; r++) {
    const float low = t[p.t + m * p.ranks + rank + r];
    if (n < p.group[g].n) v.x += b_at(g, n, r) * low;
    if (n + 1u < p.group[g].n) v.y += b_at(g, n + 1u, r) * low;
    if (n + 2u < p.group[g].n) v.z += b_at(g, n + 2u, r) * low;
    if (n + 3u < p.group[g].n) v.w += b_at(g, n + 3u, r) * low;
  }
  finish(g, m, n, v.x);
  finish(g, m, n + 1u, v.y);
  finish(g, m, n + 2u, v.z);
  finish(g, m, n + 3u, v.w);
}

void main() {
  const uint id = gl_LocalInvocationID.x, n4 = id % 16u, m4 = id / 16u;
  const uint first_tile = gl_WorkGroupID.x * 4u, own = first_tile + n4 / 4u, first_row = gl_WorkGroupID.y * ROWS;
  vec4 sum0 = vec4(0.0), sum1 = vec4(0.0), sum2 = vec4(0.0), sum3 = vec4(0.0);  // of four rows of x
  load_table();
  for (uint unit = 0u; unit < p.k / 32u; unit++) {
    barrier();
    for (uint i = id; i < 4u * LANES; i += 128u) unpack(first_tile + i / LANES, i / LANES, unit, i % LANES);
    if (id < ROWS * 2u) load_x(first_row + id / 8u * 4u, unit, id % 8u);
    barrier();
#ifdef FLOAT16
    vec4 part0 = vec4(0.0), part1 = vec4(0.0), part2 = vec4(0.0), part3 = vec4(0.0);
    for (uint k = 0u; k < 32u; k += 2u) {  // two columns are added up in float16
      const number4 w = w_kn[k][n4], v = x_km[k][m4], w_next = w_kn[k + 1u][n4], v_next = x_km[k + 1u][m4];
      part0 += vec4(w * v.x + w_next * v_next.x);
      part1 += vec4(w * v.y + w_next * v_next.y);
      part2 += vec4(w * v.z + w_next * v_next.z);
      part3 += vec4(w * v.w + w_next * v_next.w);
    }
    const vec4 s = UP * (own < p.tiles ? scales(own, unit, n4 % 4u) : vec4(0.0));
    sum0 += s * part0;
    sum1 += s * part1;
    sum2 += s * part2;
    sum3 += s * part3;
#else
    for (uint k = 0u; k < 32u; k++) {
      const vec4 w = w_kn[k][n4], v = x_km[k][m4];
      sum0 += w * v.x;
      sum1 += w * v.y;
      sum2 += w * v.z;
      sum3 += w * v.w;
    }
#endif
    if (OFFSETS != 0u && own < p.tiles) {
      const vec4 moved = UP * offsets(own, unit, n4 % 4u), x = x_total(m4);
      sum0 += moved * x.x;
      sum1 += moved * x.y;
      sum2 += moved * x.z;
      sum3 += moved * x.w;
    }
  }
  if (own >= p.tiles) return;
  uint first, rank;
  const uint g = group_of(own, first, rank), n = first_tile * 16u + n4 * 4u - first, m = first_row + 4u * m4;
  finish4(m, n, g, rank, sum0);
  finish4(m + 1u, n, g, rank, sum1);
  finish4(m + 2u, n, g, rank, sum2);
  finish4(m + 3u, n, g, rank, sum3);
}
