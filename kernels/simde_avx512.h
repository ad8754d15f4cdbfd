// For tests only (EP_SIMDE): AVX-512 by the SIMDe headers, so that isa_avx512vnni.cc runs on any CPU. What follows the
// includes are the few functions that SIMDe 0.7.4 (Debian 12) lacks, or does not compute to the bit.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O1")  // minutes less of compiling
#endif
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

template <class To, class From>
static inline To part(const From& from, int index) {
  To to;
  __builtin_memcpy(&to, reinterpret_cast<const char*>(&from) + index * sizeof(To), sizeof(To));
  return to;
}
template <class Whole, class Half>
static inline Whole joined(const Half& low, const Half& high) {
  Whole whole;
  __builtin_memcpy(&whole, &low, sizeof(Half));
  __builtin_memcpy(reinterpret_cast<char*>(&whole) + sizeof(Half), &high, sizeof(Half));
  return whole;
}
// Rounded once, as the instruction does: SIMDe multiplies, then adds.
static inline __m512 fused(__m512 a, __m512 b, __m512 c) {
  float sums[16];
  for (int i = 0; i < 16; i++) sums[i] = __builtin_fmaf(part<float>(a, i), part<float>(b, i), part<float>(c, i));
  return part<__m512>(sums, 0);
}
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps(a, b, c) fused(a, b, c)
#undef _mm512_fmsub_ps
#define _mm512_fmsub_ps(a, b, c) fused(a, b, _mm512_sub_ps(_mm512_setzero_ps(), c))
#undef _mm512_cvtph_ps
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtps_epi32
#undef _mm512_extractf32x8_ps
#define _mm512_cvtph_ps(h) joined<__m512>(_mm256_cvtph_ps(part<__m128i>(h, 0)), _mm256_cvtph_ps(part<__m128i>(h, 1)))
#define _mm512_cvtepi32_ps(i) joined<__m512>(_mm256_cvtepi32_ps(part<__m256i>(i, 0)), _mm256_cvtepi32_ps(part<__m256i>(i, 1)))
#define _mm512_cvtps_epi32(f) joined<__m512i>(_mm256_cvtps_epi32(part<__m256>(f, 0)), _mm256_cvtps_epi32(part<__m256>(f, 1)))
#define _mm512_extractf32x8_ps(f, index) part<__m256>(f, index)
#undef _mm512_srai_epi32
#define _mm512_srai_epi32(i, by) joined<__m512i>(_mm256_srai_epi32(part<__m256i>(i, 0), by), _mm256_srai_epi32(part<__m256i>(i, 1), by))
