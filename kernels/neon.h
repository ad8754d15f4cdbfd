// What the ARM rows share: 4 outputs in a vector, base ARMv8-A (float16 is only ever widened, never computed with).
// Included inside an ISA file's anonymous namespace and target region; the file adds dot_unit and the stage's form.
#pragma once

struct NeonBase {
  static constexpr int tiles = 1, lanes = 4;
  using F = float32x4_t;
  using I = int32x4_t;

  static EP_INLINE F load(const float* p) { return vld1q_f32(p); }
  static EP_INLINE F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static EP_INLINE void store(float* p, F v) { vst1q_f32(p, v); }
  static EP_INLINE F set1(float v) { return vdupq_n_f32(v); }
  static EP_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
  static EP_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
  static EP_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static EP_INLINE F sub(F a, F b) { return vsubq_f32(a, b); }
  static EP_INLINE F div(F a, F b) { return vdivq_f32(a, b); }
  static EP_INLINE F min(F a, F b) { return vminq_f32(a, b); }
  static EP_INLINE F max(F a, F b) { return vmaxq_f32(a, b); }
  static EP_INLINE F round(F v) { return vrndnq_f32(v); }
  static EP_INLINE F power(F n) { return vreinterpretq_f32_s32(vshlq_n_s32(vcvtq_s32_f32(add(n, set1(127.0f))), 23)); }
  static EP_INLINE float sum(F v) { return vaddvq_f32(v); }
  static EP_INLINE float top(F v) { return vmaxvq_f32(v); }
  static EP_INLINE F sum_each(const F (&v)[4]) { return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])); }
  static EP_INLINE void transpose(F (&v)[4]) {
    const float32x4x2_t even = vtrnq_f32(v[0], v[1]), odd = vtrnq_f32(v[2], v[3]);
    for (int i = 0; i < 2; i++) {
      v[i] = vcombine_f32(vget_low_f32(even.val[i]), vget_low_f32(odd.val[i]));
      v[i + 2] = vcombine_f32(vget_high_f32(even.val[i]), vget_high_f32(odd.val[i]));
    }
  }
  static EP_INLINE I load_int(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
  static EP_INLINE I set_int(int32_t v) { return vdupq_n_s32(v); }
  static EP_INLINE F to_float(I v) { return vcvtq_f32_s32(v); }
  template <Format>
  static EP_INLINE F scaled(I d, F w_scale) { return mul(to_float(d), w_scale); }
  static EP_INLINE I field(I v, int shift, int mask) {
    const uint32x4_t low = vshlq_u32(vreinterpretq_u32_s32(v), vdupq_n_s32(-shift));
    return vreinterpretq_s32_u32(vandq_u32(low, vdupq_n_u32(static_cast<uint32_t>(mask))));
  }
  static EP_INLINE uint32x4_t rounded(F v) {
    const uint32x4_t u = vreinterpretq_u32_f32(v);
    return vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1)));
  }
  static EP_INLINE F bfloat16_pair(F even, F odd) {
    return vreinterpretq_f32_u32(vsriq_n_u32(rounded(odd), rounded(even), 16));
  }
  static EP_INLINE F nf4(I index) {  // the four bytes of each float, looked up one by one
    const uint8_t* table = reinterpret_cast<const uint8_t*>(kNf4);
    const uint8x16x4_t values = {{vld1q_u8(table), vld1q_u8(table + 16), vld1q_u8(table + 32), vld1q_u8(table + 48)}};
    const I bytes = vmlaq_s32(set_int(0x03020100), index, set_int(0x04040404));
    return vreinterpretq_f32_u8(vqtbl4q_u8(values, vreinterpretq_u8_s32(bytes)));
  }

  static EP_INLINE uint32_t peak(const float* x, int n) {
    uint32x4_t top = vdupq_n_u32(0);
    for (int i = 0; i < n; i += 4) top = vmaxq_u32(top, vreinterpretq_u32_f32(vabsq_f32(load(x + i))));
    return vmaxvq_u32(top);
  }
  static EP_INLINE void quantize_unit(const float* x, float step, int8_t* q) {
    int16x8_t pairs[4];
    for (int i = 0; i < 4; i++) {
      const I a = vcvtnq_s32_f32(mul(load(x + 8 * i), set1(step))), b = vcvtnq_s32_f32(mul(load(x + 8 * i + 4), set1(step)));
      pairs[i] = vcombine_s16(vqmovn_s32(a), vqmovn_s32(b));
    }
    vst1q_s8(q, vcombine_s8(vqmovn_s16(pairs[0]), vqmovn_s16(pairs[1])));
    vst1q_s8(q + 16, vcombine_s8(vqmovn_s16(pairs[2]), vqmovn_s16(pairs[3])));
  }
  static EP_INLINE int32_t correction(const int8_t* q, int32_t zero, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i += kUnit) sum += vaddlvq_s16(vpadalq_s8(vpaddlq_s8(vld1q_s8(q + i)), vld1q_s8(q + i + 16)));
    return -zero * sum;
  }

  // ---- weights as integers of 8 bits: 4-bit codes stay unsigned, since 0..15 is a signed byte as well
  template <Format F>
  static constexpr bool nibbles() { return info(F).bits == 4 && !info(F).nf4; }
  template <Format F>
  static constexpr int32_t zero() { return nibbles<F>() ? info(F).zero : 0; }

  // Outputs 4v..4v+3 x 4 columns (step j of 8) of a packed unit. Steps j and j + 4 are the nibbles of the same bytes.
  template <Format F>
  static EP_INLINE int8x16_t codes(const uint8_t* w, int j, int v) {
    if constexpr (info(F).bits == 8) return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + j * 64 + v * 16), vdupq_n_u8(128)));
    uint8x16_t c = vld1q_u8(w + j % 4 * 64 + v * 16);
    c = j < 4 ? vandq_u8(c, vdupq_n_u8(15)) : vshrq_n_u8(c, 4);
    return info(F).nf4 ? vqtbl1q_s8(vld1q_s8(kNf4I8), c) : vreinterpretq_s8_u8(c);
  }
};
