#version 450
#extension GL_GOOGLE_include_directive : require
// t = gate (A x) for all groups and rows: a workgroup sums THREADS / 16 ranks of one row of x.
#include "linear.glsl"

shared float sums[THREADS];

void main() {
  const uint id = gl_LocalInvocationID.x, lane = id % 16u, m = gl_WorkGroupID.y;
  const uint rank = gl_WorkGroupID.x * (THREADS / 16u) + id / 16u;
  uint g = 0u, row = rank;
  while (g < 2u && row >= p.group[g].rank) row -= p.group[g++].rank;
  float sum = 0.0;
  if (rank < p.ranks) sum = low_part(g, row, m, lane);
  sums[id] = sum;
  for (uint s = 8u; s > 0u; s /= 2u) {
    barrier();
    if (lane < s) sums[id] += sums[id + s];
  }
  if (lane == 0u && rank < p.ranks) t[p.t + m * p.ranks + rank] = gated(g, row, m, sums[id]);
}
