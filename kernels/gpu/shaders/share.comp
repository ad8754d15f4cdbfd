#version 450
// gate[m, r] = softmax(score[m, :])[expert of r]: a thread for one rank of one row, of which each expert has as many.
layout(local_size_x = 64) in;
layout(push_constant) uniform Words { uint rows, ranks, experts, score, gate; } p;
layout(std430, binding = 0) readonly buffer Score { float score[]; };
layout(std430, binding = 1) buffer Gate { float gate[]; };

void main() {
  const uint i = gl_GlobalInvocationID.x;
  if (i >= p.rows * p.ranks) return;
  const uint at = p.score + i / p.ranks * p.experts, own = i % p.ranks / (p.ranks / p.experts);
  float top = score[at], sum = 0.0;
  for (uint e = 1u; e < p.experts; e++) top = max(top, score[at + e]);
  for (uint e = 0u; e < p.experts; e++) sum += exp(score[at + e] - top);
  gate[p.gate + i] = exp(score[at + own] - top) / sum;
}
