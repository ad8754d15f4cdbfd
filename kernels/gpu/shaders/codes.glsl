// The numbers that codes stand for, four columns of a row at a time, to be multiplied by `factor_of` four numbers of x.
//
//     sum over the columns of code_value * x  =  UP * product(number of a lane, factor_of(x))
//
// In float32, or under FLOAT16 in float16 but for the last sum of `product`: codes are exact in both, x is brought down by UP
// first, so that nothing overflows below what float16 holds, and each product and the sum of two are rounded to 11 bits.
const uint MASK = BITS == 8u ? 0x00ff00ffu : 0x000f000fu, ZERO = BITS == 8u ? 128u : 8u;
shared float nf4[16];

// To be called by all before codes are read.
void load_table() {
  const float values[16] = float[](
      -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
      -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
      0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0);
  if (NF4 && gl_LocalInvocationID.x < 16u) nf4[gl_LocalInvocationID.x] = values[gl_LocalInvocationID.x];
  if (NF4) barrier();
}

#ifdef FLOAT16
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#define number4 f16vec4
#define UP (NF4 ? 2.0 : 2.0 * float(ZERO))
const uint SECOND = 2u, THIRD = 1u;  // the columns of a number4's .y and .z

// Two bytes or nibbles as the last bits of 1024 and more, less 1024 and the zero: exact, and no conversion.
f16vec2 placed(uint v) { return unpackFloat2x16(v & MASK | 0x64006400u) - float16_t(1024u + ZERO); }
number4 lane(uint v) { return number4(placed(v), placed(v >> 8)); }

// The four numbers of the lower (or, with place 4, the upper) nibbles of a lane, to go with `factor_of` of that place.
number4 nibbles(uint v, uint place) {
  const uint w = v >> place;
  if (!NF4) return lane(w);
  return number4(nf4[w & 15u], nf4[w >> 16 & 15u], nf4[w >> 8 & 15u], nf4[w >> 24 & 15u]);
}
number4 bytes(uint v) { return lane(v); }
number4 factor_of(vec4 x, uint place) { return number4(x.xzyw / UP); }
float product(number4 a, number4 b) {
  const number4 all = a * b;
  const f16vec2 two = all.xy + all.zw;
  return float(two.x) + float(two.y);
}
#else
#define number4 vec4
#define UP 1.0
const uint SECOND = 1u, THIRD = 2u;

// Codes become numbers without a conversion, which is slow on many GPUs: 2^23 + code * 2^place is a float whose last bits
// are the code's, and less 2^23 + zero * 2^place it is (code - zero) * 2^place, all exactly. The place is left to
// `factor_of`, which takes it from what the number is multiplied by.
number4 placed(uint v, uint place) {
  const uint high = v >> 16, mask = MASK & 0xffffu;
  const uvec4 raw = uvec4(v, v, high, high) & (uvec4(mask, mask << 8, mask, mask << 8) << place);
  return uintBitsToFloat(raw | 0x4b000000u) - (8388608.0 + float(ZERO << place) * vec4(1.0, 256.0, 1.0, 256.0));
}

number4 nibbles(uint v, uint place) {
  if (!NF4) return placed(v, place);
  const uint w = v >> place;
  return number4(nf4[w & 15u], nf4[w >> 8 & 15u], nf4[w >> 16 & 15u], nf4[w >> 24 & 15u]);
}
number4 bytes(uint v) { return placed(v, 0u); }
number4 factor_of(vec4 x, uint place) { return NF4 ? x : x * (vec4(1.0, 1.0 / 256.0, 1.0, 1.0 / 256.0) / float(1u << place)); }
float product(number4 a, number4 b) { return dot(a, b); }
#endif
