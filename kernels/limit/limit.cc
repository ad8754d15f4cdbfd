// What this machine can do at most: bytes read a second, and 8-bit products summed into 32 bits a second. For the bench,
// which calls it from as many threads as it likes (Python's ctypes lets go of its lock); nothing that ships uses it.
#include <stddef.h>
#include <stdint.h>

#define EP_EXPORT extern "C" __attribute__((visibility("default")))

// Hides a value from the compiler, so that no step of a loop is taken for a repetition of the last.
#if defined(__x86_64__)
#include <immintrin.h>
#define EP_HIDE(x) __asm__ volatile("" : "+v"(x))
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#define EP_HIDE(x) __asm__ volatile("" : "+w"(x))
#endif

constexpr int kChains = 8;  // sums that do not wait for each other

typedef uint64_t Words __attribute__((vector_size(16)));

// Sums the bytes of a buffer, eight words of 16 bytes at a time; size is a multiple of 128.
EP_EXPORT uint64_t ep_limit_read(const Words* data, size_t size_bytes) {
  Words sum[kChains] = {};
  for (size_t i = 0; i < size_bytes / sizeof(Words); i += kChains)
    for (int c = 0; c < kChains; ++c) sum[c] += data[i + c];
  for (int c = 1; c < kChains; ++c) sum[0] += sum[c];
  return sum[0][0] + sum[0][1];
}

struct Peak {
  const char* name;
  int operations;  // of a step: a product and a sum are two
  int (*run)(long steps);
};

#if defined(__x86_64__)
__attribute__((target("avx2"))) static int avx2(long steps) {
  __m256i x = _mm256_set1_epi8(1), w = x, ones = _mm256_set1_epi16(1), sum[kChains] = {};
  for (long i = 0; i < steps; ++i)
    for (int c = 0; c < kChains; ++c) {
      EP_HIDE(x);
      sum[c] = _mm256_add_epi32(sum[c], _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), ones));
    }
  for (int c = 1; c < kChains; ++c) sum[0] = _mm256_add_epi32(sum[0], sum[c]);
  return _mm256_extract_epi32(sum[0], 0);
}

__attribute__((target("avx512f,avx512bw,avx512vnni"))) static int avx512vnni(long steps) {
  __m512i x = _mm512_set1_epi8(1), w = x, sum[kChains] = {};
  for (long i = 0; i < steps; ++i)
    for (int c = 0; c < kChains; ++c) {
      EP_HIDE(x);
      sum[c] = _mm512_dpbusd_epi32(sum[c], x, w);
    }
  for (int c = 1; c < kChains; ++c) sum[0] = _mm512_add_epi32(sum[0], sum[c]);
  return _mm512_reduce_add_epi32(sum[0]);
}

static const Peak* best() {
  static const Peak kAvx2 = {"avx2", 2 * 32 * kChains, avx2}, kVnni = {"avx512vnni", 2 * 64 * kChains, avx512vnni};
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) return &kVnni;
  return __builtin_cpu_supports("avx2") ? &kAvx2 : nullptr;
}
#elif defined(__aarch64__)
__attribute__((target("arch=armv8.2-a+dotprod"))) static int dotprod(long steps) {
  int8x16_t x = vdupq_n_s8(1), w = x;
  int32x4_t sum[kChains] = {};
  for (long i = 0; i < steps; ++i)
    for (int c = 0; c < kChains; ++c) {
      EP_HIDE(x);
      sum[c] = vdotq_s32(sum[c], x, w);
    }
  for (int c = 1; c < kChains; ++c) sum[0] = vaddq_s32(sum[0], sum[c]);
  return vaddvq_s32(sum[0]);
}

static int neon(long steps) {
  int8x16_t x = vdupq_n_s8(1), w = x;
  int32x4_t sum[kChains] = {};
  for (long i = 0; i < steps; ++i)
    for (int c = 0; c < kChains; ++c) {
      EP_HIDE(x);
      const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(w));
      sum[c] = vpadalq_s16(sum[c], vmlal_high_s8(low, x, w));
    }
  for (int c = 1; c < kChains; ++c) sum[0] = vaddq_s32(sum[0], sum[c]);
  return vaddvq_s32(sum[0]);
}

static const Peak* best() {
  static const Peak kNeon = {"neon", 2 * 16 * kChains, neon}, kDot = {"dotprod", 2 * 16 * kChains, dotprod};
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
