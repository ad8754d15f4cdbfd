// What this machine can do at most: bytes read a second, and 8-bit products summed into 32 bits a second. For the bench,
// which calls it from as many threads as it likes (Python's ctypes lets go of its lock); nothing that ships uses it.
//
// Products are those of 4-bit weights, the cheapest there are: where no instruction sums four of them at once, a lane of 16
// bits holds the sum of 8 steps, and only then is it widened.
#include <stddef.h>
#include <stdint.h>

#define EP_EXPORT extern "C" __attribute__((visibility("default")))

// Hides a value from the compiler: it neither takes a step for a repetition of the last nor sums in another order.
#if defined(__x86_64__)
#include <immintrin.h>
#define EP_HIDE(x) __asm__ volatile("" : "+v"(x))
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#define EP_HIDE(x) __asm__ volatile("" : "+w"(x))
#endif

constexpr int kStreams = 4;  // of a read: more pages at once than one stream of prefetches follows
constexpr int kAhead = 2048;
constexpr int kWide = 16;    // sums that do not wait for each other
constexpr int kNarrow = 4;   // and that are of 16 bits, with as many of 32 beside them

typedef uint64_t Words __attribute__((vector_size(16)));

// Sums the bytes of a buffer, a line of 64 of each stream at a time; size is a multiple of 256.
EP_EXPORT uint64_t ep_limit_read(const Words* data, size_t size_bytes) {
  Words sum[kStreams] = {};
  const size_t part = size_bytes / sizeof(Words) / kStreams;
  for (size_t i = 0; i < part; i += 4)
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const Words* at = data + s * part + i;
      __builtin_prefetch(reinterpret_cast<const char*>(at) + kAhead);
      sum[s] += (at[0] + at[1]) + (at[2] + at[3]);
    }
  for (int s = 1; s < kStreams; ++s) sum[0] += sum[s];
  return sum[0][0] + sum[0][1];
}

struct Peak {
  const char* name;
  int operations;  // of a step: a product and a sum are two
  int (*run)(long steps);
};

#if defined(__x86_64__)
__attribute__((target("avx2"))) static int avx2(long steps) {
  __m256i x = _mm256_set1_epi8(1), w = x, ones = _mm256_set1_epi16(1), sum[kNarrow] = {};
  for (long i = 0; i < steps; ++i) {
    __m256i pairs[kNarrow];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
#pragma GCC unroll 4
      for (int c = 0; c < kNarrow; ++c) {
        EP_HIDE(x);
        pairs[c] = j ? _mm256_add_epi16(pairs[c], _mm256_maddubs_epi16(x, w)) : _mm256_maddubs_epi16(x, w);
        EP_HIDE(pairs[c]);
      }
#pragma GCC unroll 4
    for (int c = 0; c < kNarrow; ++c) sum[c] = _mm256_add_epi32(sum[c], _mm256_madd_epi16(pairs[c], ones));
  }
#pragma GCC unroll 4
  for (int c = 1; c < kNarrow; ++c) sum[0] = _mm256_add_epi32(sum[0], sum[c]);
  return _mm256_extract_epi32(sum[0], 0);
}

__attribute__((target("avx512f,avx512bw,avx512vnni"))) static int avx512vnni(long steps) {
  __m512i x = _mm512_set1_epi8(1), w = x, sum[kWide] = {};
  for (long i = 0; i < steps; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < kWide; ++c) {
      sum[c] = _mm512_dpbusd_epi32(sum[c], x, w);
      EP_HIDE(sum[c]);
    }
#pragma GCC unroll 16
  for (int c = 1; c < kWide; ++c) sum[0] = _mm512_add_epi32(sum[0], sum[c]);
  return _mm512_reduce_add_epi32(sum[0]);
}

static const Peak* best() {
  static const Peak kAvx2 = {"avx2", 2 * 32 * 8 * kNarrow, avx2}, kVnni = {"avx512vnni", 2 * 64 * kWide, avx512vnni};
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) return &kVnni;
  return __builtin_cpu_supports("avx2") ? &kAvx2 : nullptr;
}
#elif defined(__aarch64__)
__attribute__((target("arch=armv8.2-a+dotprod"))) static int dotprod(long steps) {
  int8x16_t x = vdupq_n_s8(1), w = x;
  int32x4_t sum[kWide] = {};
  for (long i = 0; i < steps; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < kWide; ++c) {
      sum[c] = vdotq_s32(sum[c], x, w);
      EP_HIDE(sum[c]);
    }
#pragma GCC unroll 16
  for (int c = 1; c < kWide; ++c) sum[0] = vaddq_s32(sum[0], sum[c]);
  return vaddvq_s32(sum[0]);
}

static int neon(long steps) {
  int8x16_t x = vdupq_n_s8(1), w = x;
  int32x4_t sum[kNarrow] = {};
  for (long i = 0; i < steps; ++i) {
    int16x8_t low[kNarrow], high[kNarrow];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
#pragma GCC unroll 4
      for (int c = 0; c < kNarrow; ++c) {
        low[c] = j ? vmlal_s8(low[c], vget_low_s8(x), vget_low_s8(w)) : vmull_s8(vget_low_s8(x), vget_low_s8(w));
        high[c] = j ? vmlal_high_s8(high[c], x, w) : vmull_high_s8(x, w);
        EP_HIDE(low[c]);
        EP_HIDE(high[c]);
      }
#pragma GCC unroll 4
    for (int c = 0; c < kNarrow; ++c) sum[c] = vpadalq_s16(sum[c], vpaddq_s16(low[c], high[c]));
  }
#pragma GCC unroll 4
  for (int c = 1; c < kNarrow; ++c) sum[0] = vaddq_s32(sum[0], sum[c]);
  return vaddvq_s32(sum[0]);
}

static const Peak* best() {
  static const Peak kNeon = {"neon", 2 * 16 * 8 * kNarrow, neon}, kDot = {"dotprod", 2 * 16 * kWide, dotprod};
  constexpr unsigned long kHasDot = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kHasDot ? &kDot : &kNeon;
}
#else
static const Peak* best() { return nullptr; }
#endif

// The instruction set of ep_limit_int8, or "" where there is none.
EP_EXPORT const char* ep_limit_name() { return best() ? best()->name : ""; }

// Operations of one step.
EP_EXPORT int ep_limit_operations() { return best() ? best()->operations : 0; }

EP_EXPORT int ep_limit_int8(long steps) { return best() ? best()->run(steps) : 0; }
