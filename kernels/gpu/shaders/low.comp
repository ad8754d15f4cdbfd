#version 450
#extension GL_GOOGLE_include_directive : require
// t = gate (A x) for all groups and rows: a workgroup sums one rank of one row of x.
#include "linear.glsl"

#include "sums.glsl"

void main() {
  const uint id = gl_LocalInvocationID.x, rank = gl_WorkGroupID.x, m = gl_WorkGroupID.y;
  uint g = 0u, row = rank;
  while (g < 2u && row >= p.group[g].rank) row -= p.group[g++].rank;
  float sum = 0.0;
  for (uint k8 = id; k8 < p.k / 8u; k8 += THREADS) sum += low8(g, row, m, k8);
  sum = add_up(sum);
  if (id == 0u) t[p.t + m * p.ranks + rank] = gated(g, row, m, sum);
}
