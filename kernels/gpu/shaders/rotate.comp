#version 450
// What comes before attention on a cache: queries and keys are rotated, keys and values go to their places in the cache.
// A thread takes the pair (i, i + rotated / 2) of one head, or two numbers beyond the rotated part; and the next pair too
// where the cache is in float16, of which a word holds two numbers.
layout(local_size_x = 64) in;
layout(constant_id = 0) const bool HALF = false;
layout(push_constant) uniform Words {
  uint batch, tokens, heads, kv_heads, dim, rotated, q, q_row, k, k_row, v, v_row, out_q, key, value, capacity, past, cosine, sine;
} p;
layout(std430, binding = 0) readonly buffer X { float x[]; };
layout(std430, binding = 1) buffer Q { float q[]; };
layout(std430, binding = 2) buffer Key { float key[]; };
layout(std430, binding = 2) buffer KeyHalf { uint key_half[]; };
layout(std430, binding = 3) buffer Value { float value[]; };
layout(std430, binding = 3) buffer ValueHalf { uint value_half[]; };
layout(std430, binding = 4) readonly buffer Cosine { float cosine[]; };
layout(std430, binding = 5) readonly buffer Sine { float sine[]; };
layout(std430, binding = 6) readonly buffer Past { int past[]; };  // tokens before these, for each row of the batch
const uint PAIRS = HALF ? 2u : 1u;

// Two numbers that lie beside each other in the cache.
void put_key(uint at, vec2 v) {
  if (HALF) {
    key_half[at / 2u] = packHalf2x16(v);
  } else {
    key[at] = v.x;
    key[at + 1u] = v.y;
  }
}
void put_value(uint at, vec2 v) {
  if (HALF) {
    value_half[at / 2u] = packHalf2x16(v);
  } else {
    value[at] = v.x;
    value[at + 1u] = v.y;
  }
}

// Numbers `at` and at + rotated / 2 of a head, of which the pair is i, rotated.
vec2 rotated(uint at, uint i, uint position, uint half_rotated) {
  const float a = x[at], b = x[at + half_rotated];
  const float c = cosine[p.cosine + position * half_rotated + i], s = sine[p.sine + position * half_rotated + i];
  return vec2(a * c - b * s, b * c + a * s);
}

void main() {
  const uint pairs = p.dim / 2u / PAIRS, all = p.heads + 2u * p.kv_heads;
  uint i = gl_GlobalInvocationID.x;
  if (i >= p.batch * p.tokens * all * pairs) return;
  const uint pair = i % pairs * PAIRS, head = i / pairs % all, token = i / (pairs * all) % p.tokens, row = i / (pairs * all * p.tokens);
  const uint at = row * p.tokens + token, position = uint(past[p.past + row]) + token, half_rotated = p.rotated / 2u;
  const uint cached = (row * p.kv_heads * p.capacity + position) * p.dim;
  if (head >= p.heads + p.kv_heads) {
    const uint own = head - p.heads - p.kv_heads, from = p.v + at * p.v_row + own * p.dim + 2u * pair;
    const uint to = p.value + cached + own * p.capacity * p.dim + 2u * pair;
    for (uint n = 0u; n < PAIRS; n++) put_value(to + 2u * n, vec2(x[from + 2u * n], x[from + 2u * n + 1u]));
    return;
  }
  const bool query = head < p.heads;
  const uint own = query ? head : head - p.heads;
  const uint from = (query ? p.q + at * p.q_row : p.k + at * p.k_row) + own * p.dim;
  const uint to = query ? p.out_q + (at * p.heads + own) * p.dim : p.key + cached + own * p.capacity * p.dim;
  for (uint n = 0u; n < PAIRS && pair + n >= half_rotated; n++) {  // beyond the rotated part
    const uint d = 2u * (pair + n);
    if (!query) put_key(to + d, vec2(x[from + d], x[from + d + 1u]));
    if (query) q[to + d] = x[from + d];
    if (query) q[to + d + 1u] = x[from + d + 1u];
  }
  if (pair >= half_rotated) return;
  vec2 turned[2];
  for (uint n = 0u; n < PAIRS; n++) turned[n] = rotated(from + pair + n, pair + n, position, half_rotated);
  for (uint n = 0u; n < PAIRS && query; n++) {
    q[to + pair + n] = turned[n].x;
    q[to + pair + n + half_rotated] = turned[n].y;
  }
  if (query) return;
  if (HALF) {
    put_key(to + pair, vec2(turned[0].x, turned[1].x));
    put_key(to + pair + half_rotated, vec2(turned[0].y, turned[1].y));
  } else {
    key[to + pair] = turned[0].x;
    key[to + pair + half_rotated] = turned[0].y;
  }
}
