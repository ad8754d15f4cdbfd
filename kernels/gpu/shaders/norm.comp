#version 450
#extension GL_GOOGLE_include_directive : require
// y = norm(x + skip) * weight + bias along rows of k, one workgroup a row: by the root mean square, or by mean and variance.
layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint THREADS = 64;
layout(constant_id = 1) const bool SKIP = false;
layout(constant_id = 2) const bool LAYER = false;
layout(push_constant) uniform Words { uint k, x, skip, y, total, weight, bias; float epsilon; } p;
layout(std430, binding = 0) readonly buffer X { float x[]; };
layout(std430, binding = 1) readonly buffer Skip { float skip[]; };
layout(std430, binding = 2) buffer Y { float y[]; };  // y and x + skip, which may lie in y
layout(std430, binding = 3) readonly buffer Weight { float weight[]; };
layout(std430, binding = 4) readonly buffer Bias { float bias[]; };
#include "sums.glsl"

void main() {
  const uint row = gl_WorkGroupID.x * p.k, id = gl_LocalInvocationID.x;
  float sum = 0.0;
  for (uint i = id; i < p.k; i += THREADS) {
    float v = x[p.x + row + i];
    if (SKIP) {
      v += skip[p.skip + row + i];
      y[p.total + row + i] = v;
    }
    sum += LAYER ? v : v * v;
  }
  sum = add_up(sum) / float(p.k);
  const float mean = LAYER ? sum : 0.0;
  if (LAYER) {
    float spread = 0.0;
    for (uint i = id; i < p.k; i += THREADS) {
      const float v = (SKIP ? y[p.total + row + i] : x[p.x + row + i]) - mean;
      spread += v * v;
    }
    sum = add_up(spread) / float(p.k);
  }
  const float factor = 1.0 / sqrt(sum + p.epsilon);
  for (uint i = id; i < p.k; i += THREADS) {
    const float v = SKIP ? y[p.total + row + i] : x[p.x + row + i];
    y[p.y + row + i] = (v - mean) * factor * weight[p.weight + i] + (LAYER ? bias[p.bias + i] : 0.0);
  }
}
