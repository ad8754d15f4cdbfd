#version 450
// y = a b + c in float32, a thread for one output: for small matrices that were not packed.
layout(local_size_x = 64) in;
layout(constant_id = 0) const bool TURNED = false;  // b is [N, K]
layout(push_constant) uniform Words { uint m, n, k, a, b, c, y; } p;
layout(std430, binding = 0) readonly buffer A { float a[]; };
layout(std430, binding = 1) readonly buffer B { float b[]; };
layout(std430, binding = 2) readonly buffer C { float c[]; };
layout(std430, binding = 3) buffer Y { float y[]; };

void main() {
  const uint i = gl_GlobalInvocationID.x;
  if (i >= p.m * p.n) return;
  const uint m = i / p.n, n = i % p.n;
  float sum = p.c == 0xffffffffu ? 0.0 : c[p.c + n];
  for (uint k = 0u; k < p.k; k++) sum += a[p.a + m * p.k + k] * b[p.b + (TURNED ? n * p.k + k : k * p.n + n)];
  y[p.y + i] = sum;
}
