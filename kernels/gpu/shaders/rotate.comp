#version 450
// What comes before attention on a cache: queries and keys are rotated, keys and values go to their places in the cache.
// A thread takes the pair (i, i + rotated / 2) of one head, or two numbers beyond the rotated part.
layout(local_size_x = 64) in;
layout(push_constant) uniform Words {
  uint batch, tokens, heads, kv_heads, dim, rotated, q, q_row, k, k_row, v, v_row, out_q, key, value, capacity, past, cosine, sine;
} p;
layout(std430, binding = 0) readonly buffer X { float x[]; };
layout(std430, binding = 1) buffer Q { float q[]; };
layout(std430, binding = 2) buffer Key { float key[]; };
layout(std430, binding = 3) buffer Value { float value[]; };
layout(std430, binding = 4) readonly buffer Cosine { float cosine[]; };
layout(std430, binding = 5) readonly buffer Sine { float sine[]; };
layout(std430, binding = 6) readonly buffer Past { int past[]; };  // tokens before these, for each row of the batch

void main() {
  const uint pairs = p.dim / 2u, all = p.heads + 2u * p.kv_heads;
  uint i = gl_GlobalInvocationID.x;
  if (i >= p.batch * p.tokens * all * pairs) return;
  const uint pair = i % pairs, head = i / pairs % all, token = i / (pairs * all) % p.tokens, row = i / (pairs * all * p.tokens);
  const uint at = row * p.tokens + token, position = uint(past[p.past + row]) + token, half_rotated = p.rotated / 2u;
  const bool turned = pair < half_rotated;
  const uint first = turned ? pair : p.rotated + 2u * (pair - half_rotated), second = turned ? pair + half_rotated : first + 1u;
  const uint cached = (row * p.kv_heads * p.capacity + position) * p.dim;
  if (head >= p.heads + p.kv_heads) {
    const uint own = head - p.heads - p.kv_heads, from = p.v + at * p.v_row + own * p.dim;
    const uint to = p.value + cached + own * p.capacity * p.dim;
    value[to + first] = x[from + first];
    value[to + second] = x[from + second];
    return;
  }
  const bool query = head < p.heads;
  const uint own = query ? head : head - p.heads;
  const uint from = (query ? p.q + at * p.q_row : p.k + at * p.k_row) + own * p.dim;
  float a = x[from + first], b = x[from + second];
  if (turned) {
    const float c = cosine[p.cosine + position * half_rotated + pair], s = sine[p.sine + position * half_rotated + pair];
    const float turned_a = a * c - b * s;
    b = b * c + a * s;
    a = turned_a;
  }
  if (query) {
    const uint to = p.out_q + (at * p.heads + own) * p.dim;
    q[to + first] = a;
    q[to + second] = b;
  } else {
    const uint to = p.key + cached + own * p.capacity * p.dim;
    key[to + first] = a;
    key[to + second] = b;
  }
}
