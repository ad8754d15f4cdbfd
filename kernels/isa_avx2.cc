// AVX2 + FMA + F16C: 8 outputs in a vector.
//
// 4-bit codes are unsigned, so vpmaddubsw takes them as they are: 8 steps of 4 columns sum to at most
// 8*2*15*127 = 30480 in 16 bits, and one vpmaddwd per unit widens. Where a unit is a whole block, the 16-bit sums start
// from the correction, split as they are: what they end with is at most 8*2*8*127, whatever wraps on the way. 8-bit integers (i8c, the NF4 table) would overflow
// there: they multiply as |w| * sign(w)x, at most 2*127*127, and widen every step.
#include "functions.h"

#if defined(__x86_64__)
#if defined(EP_FREESTANDING)
#define __MM_MALLOC_H  // clang's immintrin.h would ask for stdlib.h through it
#endif
#include <immintrin.h>

EP_TARGET_PUSH("avx2,fma,f16c")
namespace {

struct Avx2 {
  static constexpr int tiles = 1, lanes = 8;
  using F = __m256;
  using I = __m256i;

  static EP_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static EP_INLINE F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static EP_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static EP_INLINE F set1(float v) { return _mm256_set1_ps(v); }
  static EP_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static EP_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static EP_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static EP_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static EP_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  static EP_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  static EP_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static EP_INLINE F round(F v) { return _mm256_cvtepi32_ps(_mm256_cvtps_epi32(v)); }
  static EP_INLINE F power(F n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtps_epi32(add(n, set1(127.0f))), 23)); }
  static EP_INLINE float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static EP_INLINE float top(F v) {
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
  }
  static EP_INLINE F sum_each(const F (&v)[8]) {
    F pair[4], quad[2];  // by shuffles, of which two start per cycle; hadd takes two cycles each
    for (int i = 0; i < 4; i++) pair[i] = add(_mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 2; i++)
      quad[i] = add(_mm256_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0x44), _mm256_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0xee));
    return add(_mm256_blend_ps(quad[0], quad[1], 0xf0), _mm256_permute2f128_ps(quad[0], quad[1], 0x21));
  }
  static EP_INLINE void transpose(F (&v)[8]) {
    F pairs[8], quads[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int c = 0; c < 4; c++)
        quads[i + c] = c % 2 ? _mm256_shuffle_ps(pairs[i + c / 2], pairs[i + c / 2 + 2], 0xee)
                             : _mm256_shuffle_ps(pairs[i + c / 2], pairs[i + c / 2 + 2], 0x44);
    for (int c = 0; c < 4; c++) {
      v[c] = _mm256_permute2f128_ps(quads[c], quads[c + 4], 0x20);
      v[c + 4] = _mm256_permute2f128_ps(quads[c], quads[c + 4], 0x31);
    }
  }
  static EP_INLINE I load_int(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static EP_INLINE I set_int(int32_t v) { return _mm256_set1_epi32(v); }
  static EP_INLINE I field(I v, int shift, int mask) { return _mm256_and_si256(_mm256_srli_epi32(v, shift), set_int(mask)); }
  static EP_INLINE F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static EP_INLINE I rounded(F v) {
    const I u = _mm256_castps_si256(v);
    return _mm256_add_epi32(_mm256_add_epi32(u, set_int(0x7fff)), field(u, 16, 1));
  }
  static EP_INLINE F bfloat16_pair(F even, F odd) {
    return _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_srli_epi32(rounded(even), 16), rounded(odd), 0xaa));
  }
  static EP_INLINE F nf4(I index) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(load(kNf4), index), _mm256_permutevar8x32_ps(load(kNf4 + 8), index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }

  static EP_INLINE uint32_t peak(const float* x, int n) {
    I top = set_int(0);
    for (int i = 0; i < n; i += 8) top = _mm256_max_epi32(top, _mm256_and_si256(load_int(x + i), set_int(0x7fffffff)));
    __m128i t = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
  }
  static EP_INLINE void quantize_unit(const float* x, float step, int8_t* q) {
    I v[4];
    for (int i = 0; i < 4; i++) v[i] = _mm256_cvtps_epi32(mul(load(x + 8 * i), set1(step)));
    const I pairs = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    const I bytes = _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i*)q, bytes);
  }
  static EP_INLINE int32_t correction(const int8_t* q, int32_t zero, int n) {
    if (!zero) return 0;
    I sums = set_int(0);  // 16 bits: columns 4j and 4j+1, 4j+2 and 4j+3
    for (int i = 0; i < n; i += kUnit) sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(_mm256_set1_epi8(1), load_int(q + i)));
    __m128i s = _mm_add_epi16(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    s = _mm_add_epi16(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi16(s, _mm_shuffle_epi32(s, 0xb1));
    const __m128i factor = _mm_set1_epi16((int16_t)-zero);
    return _mm_cvtsi128_si32(n == kUnit ? _mm_mullo_epi16(s, factor) : _mm_madd_epi16(s, factor));
  }

  // ---- weights as integers
  template <Format F>
  static constexpr bool nibbles() { return info(F).bits == 4 && !info(F).nf4; }  // unsigned 0..15, else signed 8 bit
  template <Format F>
  static constexpr int32_t zero() { return nibbles<F>() ? info(F).zero : 0; }
  template <Format>
  static EP_INLINE F scaled(I d, F w_scale) { return mul(to_float(d), w_scale); }
  template <Format F>
  static constexpr int stage_bytes() { return kTileRows * kUnit; }

  // 8 outputs x 4 columns (step j of 8) of a packed unit, rows 8*v..
  template <Format F>
  static EP_INLINE I codes(const uint8_t* w, int j, int v) {
    if constexpr (info(F).bits == 8) return _mm256_xor_si256(load_int(w + j * 64 + v * 32), _mm256_set1_epi8(-128));
    I c = load_int(w + j % 4 * 64 + v * 32);
    if (j >= 4) c = _mm256_srli_epi16(c, 4);
    c = _mm256_and_si256(c, _mm256_set1_epi8(15));
    return info(F).nf4 ? _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)kNf4I8)), c) : c;
  }
  template <Format F>
  static EP_INLINE void unpack_unit(const uint8_t* w, uint8_t* out) {
    for (int j = 0; j < 8; j++)
      for (int v = 0; v < 2; v++) _mm256_store_si256((__m256i*)(out + j * 64 + v * 32), codes<F>(w, j, v));
  }
  static EP_INLINE I widen(I pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

  // 4 columns: R x 16 products of the codes in c0, c1. 4-bit ones gather in pairs, others in d at once. The empty asm
  // keeps gcc from starting all rows at once, which spills sums to memory and halves the speed.
  template <Format F, int R>
  static EP_INLINE void dot_step(I c0, I c1, const int8_t* q, I (&pairs)[R][2], I (&d)[R][2]) {
    for (int r = 0; r < R; r++) {
      int32_t x4;
      __builtin_memcpy(&x4, q + r * kChunk, 4);
      const I x = set_int(x4);
      if constexpr (nibbles<F>()) {
        pairs[r][0] = _mm256_add_epi16(pairs[r][0], _mm256_maddubs_epi16(c0, x));
        pairs[r][1] = _mm256_add_epi16(pairs[r][1], _mm256_maddubs_epi16(c1, x));
        asm volatile("" : "+x"(pairs[r][0]), "+x"(pairs[r][1]));
      } else {
        d[r][0] = _mm256_add_epi32(d[r][0], widen(_mm256_maddubs_epi16(_mm256_abs_epi8(c0), _mm256_sign_epi8(x, c0))));
        d[r][1] = _mm256_add_epi32(d[r][1], widen(_mm256_maddubs_epi16(_mm256_abs_epi8(c1), _mm256_sign_epi8(x, c1))));
        asm volatile("" : "+x"(d[r][0]), "+x"(d[r][1]));
      }
    }
  }
  template <Format F, int R, bool packed>
  static EP_INLINE void dot_unit(const uint8_t* w, const int64_t*, const int8_t* q, I (&d)[R][2]) {
    constexpr bool corrected = nibbles<F>() && info(F).act_block == kUnit;  // see correction()
    I pairs[R][2];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < 2; v++) pairs[r][v] = corrected ? d[r][v] : set_int(0);
    if constexpr (packed) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) dot_step<F, R>(codes<F>(w, j, 0), codes<F>(w, j, 1), q + 4 * j, pairs, d);
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) dot_step<F, R>(load_int(w + j * 64), load_int(w + j * 64 + 32), q + 4 * j, pairs, d);
    }
    if constexpr (nibbles<F>())
      for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++) d[r][v] = corrected ? widen(pairs[r][v]) : _mm256_add_epi32(d[r][v], widen(pairs[r][v]));
  }
};

#include "tile.h"
EP_ROWS_FROM(Avx2, Avx2)
#include "functions_simd.h"
EP_FUNCTIONS_FROM(Avx2)

}  // namespace
EP_TARGET_POP

#define EP_MINE_avx2 EP_YES
#define EP_ROW(op, format, act, tile_m, isa) EP_WHEN(EP_MINE_##isa, EP_DEFINE_ROW(op, format, act, tile_m, isa))
#define EP_FUNCTION(function, isa) EP_WHEN(EP_MINE_##isa, EP_DEFINE_FUNCTION(function, isa))
#include "kernels.inc"
#include "functions.inc"
#endif
