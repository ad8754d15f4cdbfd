#version 450
// y[i] = op(a[i mod count], b[i mod count]): a shorter operand is repeated. b is another one for every b_span outputs.
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint OP = 0;
layout(push_constant) uniform Words { uint count, a, a_count, b, b_count, y, b_span; } p;
layout(std430, binding = 0) readonly buffer A { float a[]; };
layout(std430, binding = 1) readonly buffer B { float b[]; };
layout(std430, binding = 2) buffer Y { float y[]; };
const uint ADD = 0u, SUB = 1u, MUL = 2u, DIV = 3u, TANH = 4u, GELU = 5u, GELU_TANH = 6u, RELU = 7u, SIGMOID = 8u, SILU_MUL = 9u,
           GELU_TANH_MUL = 10u, COPY = 11u;

// Abramowitz and Stegun 7.1.26: within 1.5e-7.
float erf(float v) {
  const float t = 1.0 / (1.0 + 0.3275911 * abs(v));
  const float s = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return sign(v) * (1.0 - s * exp(-v * v));
}
float safe_tanh(float v) { return tanh(clamp(v, -20.0, 20.0)); }  // drivers overflow beyond
float gelu_tanh(float v) { return 0.5 * v * (1.0 + safe_tanh(0.7978845608028654 * (v + 0.044715 * v * v * v))); }

float apply(float v, float w) {
  switch (OP) {
    case ADD: return v + w;
    case SUB: return v - w;
    case MUL: return v * w;
    case DIV: return v / w;
    case TANH: return safe_tanh(v);
    case GELU: return 0.5 * v * (1.0 + erf(v * 0.7071067811865476));
    case GELU_TANH: return gelu_tanh(v);
    case RELU: return max(v, 0.0);
    case SIGMOID: return 1.0 / (1.0 + exp(-v));
    case SILU_MUL: return v / (1.0 + exp(-v)) * w;
    case GELU_TANH_MUL: return gelu_tanh(v) * w;
    default: return v;
  }
}

void main() {
  const uint step_size = gl_NumWorkGroups.x * 64u;
  for (uint i = gl_GlobalInvocationID.x; i < p.count; i += step_size)
    y[p.y + i] = apply(a[p.a + i % p.a_count], p.b_count == 0u ? 0.0 : b[p.b + i / p.b_span * p.b_count + i % p.b_count]);
}
