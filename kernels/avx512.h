// What the AVX-512 rows share: a tile's outputs are one vector, and vpdpbusd multiplies codes as the unsigned bytes they are.
// Included inside an ISA file's anonymous namespace and target region.
//
// What is then subtracted is zero * sum(q): 8 for 4-bit codes, 128 for 8-bit ones and for the NF4 table, which is
// stored 128 up. Sums of a block are below 2^21: they are held kUp up, as bits of 12582912.0f + sum.
#pragma once

// Lane i takes lane i ^ bit, of the first of two vectors or, where i has the bit, of the second.
template <int bit>
struct Fold {
  alignas(64) int32_t lane[16];
  constexpr Fold() : lane() {
    for (int i = 0; i < 16; i++) lane[i] = (i ^ bit) + (i & bit ? 16 : 0);
  }
};
template <int bit>
constexpr Fold<bit> kFold;

constexpr uint32_t kUp = 0x4b400000;  // 1.5 * 2^23 as a float

struct Avx512 {
  static constexpr int tiles = 2, lanes = 16;
  using F = __m512;
  using I = __m512i;

  static EP_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static EP_INLINE F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static EP_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static EP_INLINE F set1(float v) { return _mm512_set1_ps(v); }
  static EP_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static EP_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static EP_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static EP_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static EP_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static EP_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  static EP_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static EP_INLINE F round(F v) { return _mm512_cvtepi32_ps(_mm512_cvtps_epi32(v)); }
  static EP_INLINE F power(F n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtps_epi32(add(n, set1(127.0f))), 23)); }
  static EP_INLINE __m256 halves(F v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
  static EP_INLINE float top(F v) {
    const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
  }
  static EP_INLINE float sum(F v) {
    const __m256 h = halves(v);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  // Of the lanes that differ in one bit of their number, those without it go on for a and those with it for b.
  template <int bit>
  static EP_INLINE F fold(F a, F b) {
    constexpr uint16_t with = bit == 8 ? 0xff00 : bit == 4 ? 0xf0f0 : bit == 2 ? 0xcccc : 0xaaaa;
    return add(_mm512_mask_blend_ps(with, a, b), _mm512_permutex2var_ps(a, load_int(kFold<bit>.lane), b));
  }
  static EP_INLINE F sum_each(F (&v)[16]) {
    for (int i = 0; i < 8; i++) v[i] = fold<8>(v[i], v[i + 8]);
    for (int i = 0; i < 4; i++) v[i] = fold<4>(v[i], v[i + 4]);
    for (int i = 0; i < 2; i++) v[i] = fold<2>(v[i], v[i + 2]);
    return fold<1>(v[0], v[1]);
  }
  template <int which>  // two of a's, then two of b's; SIMDe has no shuffle_f32x4
  static EP_INLINE F quarters(F a, F b) {
    return _mm512_castsi512_ps(_mm512_shuffle_i32x4(_mm512_castps_si512(a), _mm512_castps_si512(b), which));
  }
  static EP_INLINE void transpose(F (&v)[16]) {
    F pairs[16];
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)  // columns 0..3 of each quarter, of 4 rows
      for (int c = 0; c < 4; c++)
        v[i + c] = c % 2 ? _mm512_shuffle_ps(pairs[i + c / 2], pairs[i + c / 2 + 2], 0xee)
                         : _mm512_shuffle_ps(pairs[i + c / 2], pairs[i + c / 2 + 2], 0x44);
    for (int c = 0; c < 4; c++) {
      const F a = quarters<0x88>(v[c], v[c + 4]), b = quarters<0x88>(v[c + 8], v[c + 12]);
      const F d = quarters<0xdd>(v[c], v[c + 4]), e = quarters<0xdd>(v[c + 8], v[c + 12]);
      v[c] = quarters<0x88>(a, b);
      v[c + 4] = quarters<0x88>(d, e);
      v[c + 8] = quarters<0xdd>(a, b);
      v[c + 12] = quarters<0xdd>(d, e);
    }
  }
  static EP_INLINE I load_int(const void* p) { return _mm512_loadu_si512(p); }
  static EP_INLINE I set_int(int32_t v) { return _mm512_set1_epi32(v); }
  static EP_INLINE I field(I v, int shift, int mask) { return _mm512_and_si512(_mm512_srli_epi32(v, shift), set_int(mask)); }
  static EP_INLINE F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static EP_INLINE I rounded(F v) {
    const I u = _mm512_castps_si512(v);
    return _mm512_add_epi32(_mm512_add_epi32(u, set_int(0x7fff)), field(u, 16, 1));
  }
  static EP_INLINE F bfloat16_pair(F even, F odd) {
    const I high = _mm512_and_si512(rounded(odd), set_int(-0x10000));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(rounded(even), 16), high));
  }
  static EP_INLINE F nf4(I index) { return _mm512_permutexvar_ps(index, load(kNf4)); }

  static EP_INLINE uint32_t peak(const float* x, int n) {
    I top = set_int(0);
    for (int i = 0; i < n; i += 16) top = _mm512_max_epi32(top, _mm512_and_si512(load_int(x + i), set_int(0x7fffffff)));
    const __m256i h = _mm256_max_epi32(_mm512_castsi512_si256(top), _mm512_extracti64x4_epi64(top, 1));
    __m128i t = _mm_max_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
  }
  static EP_INLINE void quantize_unit(const float* x, float step, int8_t* q) {
    const I a = _mm512_cvtps_epi32(mul(load(x), set1(step))), b = _mm512_cvtps_epi32(mul(load(x + 16), set1(step)));
    _mm256_storeu_si256((__m256i*)q, _mm256_set_m128i(_mm512_cvtsepi32_epi8(b), _mm512_cvtsepi32_epi8(a)));
  }
  static EP_INLINE int32_t correction(const int8_t* q, int32_t zero, int n) {
    __m256i sums = _mm256_setzero_si256();  // of signed bytes as unsigned ones, 128 up
    for (int i = 0; i < n; i += kUnit) {
      const __m256i up = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(q + i)), _mm256_set1_epi8(-128));
      sums = _mm256_add_epi64(sums, _mm256_sad_epu8(up, _mm256_setzero_si256()));
    }
    const __m128i s = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    return static_cast<int32_t>(kUp) - zero * (_mm_cvtsi128_si32(_mm_add_epi64(s, _mm_unpackhi_epi64(s, s))) - 128 * n);
  }

  // ---- weights as unsigned bytes
  template <Format F>
  static constexpr int32_t zero() { return info(F).bits == 4 && !info(F).nf4 ? info(F).zero : 128; }
  // d is kUp above its sum, and its bits those of such a float, so it need not be converted. What is up is taken off together
  // with the scaling where kUp * w_scale has no more bits than a float.
  template <Format format>
  static EP_INLINE F scaled(I d, F w_scale) {
    const F up = set1(bits_float(kUp));
    if constexpr (info(format).half_scale) return _mm512_fmsub_ps(_mm512_castsi512_ps(d), w_scale, mul(up, w_scale));
    return mul(sub(_mm512_castsi512_ps(d), up), w_scale);
  }
  template <Format F>
  static constexpr int stage_bytes() { return kTileRows * kUnit; }

  template <Format F>
  static EP_INLINE I codes(const uint8_t* w, int j) {  // 16 outputs x 4 columns, step j of 8
    if constexpr (info(F).bits == 8) return load_int(w + j * 64);
    I c = load_int(w + j % 4 * 64);
    if (j >= 4) c = _mm512_srli_epi16(c, 4);
    c = _mm512_and_si512(c, _mm512_set1_epi8(15));
    if constexpr (!info(F).nf4) return c;
    const __m128i table = _mm_xor_si128(_mm_load_si128((const __m128i*)kNf4I8), _mm_set1_epi8(-128));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), c);
  }
  template <Format F>
  static EP_INLINE void unpack_unit(const uint8_t* w, uint8_t* out) {
    for (int j = 0; j < 8; j++) _mm512_storeu_si512(out + j * 64, codes<F>(w, j));
  }

  static EP_INLINE I columns(const int8_t* q) {  // 4 columns, once for each output
    int32_t four;
    __builtin_memcpy(&four, q, 4);
    return set_int(four);
  }
  // One row of x: codes in the upper halves of bytes are multiplied where they are, and their sum is shifted.
  template <int T>
  static EP_INLINE void dot_nibbles(const uint8_t* w, const int64_t (&at)[T], const int8_t* q, I (&d)[T]) {
    I high[T];
    for (int t = 0; t < T; t++) high[t] = set_int(0);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
      for (int t = 0; t < T; t++) {
        const I c = load_int(w + at[t] + j * 64);
        d[t] = _mm512_dpbusd_epi32(d[t], _mm512_and_si512(c, _mm512_set1_epi8(15)), columns(q + 4 * j));
        high[t] = _mm512_dpbusd_epi32(high[t], _mm512_and_si512(c, _mm512_set1_epi8(-16)), columns(q + 16 + 4 * j));
      }
    for (int t = 0; t < T; t++) d[t] = _mm512_add_epi32(d[t], _mm512_srai_epi32(high[t], 4));
  }
  template <Format F, int R, bool packed, int T>
  static EP_INLINE void dot_unit(const uint8_t* w, const int64_t (&at)[T], const int8_t* q, I (&d)[R][T]) {
    if constexpr (packed && R == 1 && info(F).bits == 4 && !info(F).nf4) return dot_nibbles(w, at, q, d[0]);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
      I c[T];
      for (int t = 0; t < T; t++) c[t] = packed ? codes<F>(w + at[t], j) : load_int(w + at[t] + j * 64);
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) d[r][t] = _mm512_dpbusd_epi32(d[r][t], c[t], columns(q + r * kChunk + 4 * j));
    }
  }
};

// One row of x waits for its weights: four streams of them bring more bytes a second than two.
struct Avx512Alone : Avx512 {
  static constexpr int tiles = 4;
};
