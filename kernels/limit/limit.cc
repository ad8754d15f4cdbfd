// What this machine can do at most: bytes read a second, and 8-bit products summed into 32 bits a second. For the bench,
// which calls it from as many threads as it likes (Python's ctypes lets go of its lock); nothing that ships uses it.
//
// Products are those of 4-bit weights, the cheapest there are: where no instruction sums four of them at once, a lane of 16
// bits holds the sum of 8 steps, and only then is it widened. Each instruction set that kernels are written for is measured.
#include <stddef.h>
#include <stdint.h>

#define EP_EXPORT extern "C" __attribute__((visibility("default")))

// Hides a value from the compiler: it neither takes a step for a repetition of the last nor sums in another order.
#if defined(__x86_64__)
#include <immintrin.h>
#define EP_HIDE(x) __asm__ volatile("" : "+v"(x))
#elif defined(__aarch64__)
#include <arm_neon.h>
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

// Four sums of 16 x 16, by two tiles of 16 rows of x and two of 16 outputs, 64 columns each.
#if defined(__clang__)  // its assembler looks at the function's features; GCC's takes every instruction
__attribute__((target("amx-tile,amx-int8")))
#endif
static int amx(long steps) {
  constexpr int kTiles = 8, kLines = 16, kLine = 64;
  struct Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t line_bytes[16] = {};
    uint8_t lines[16] = {};
  } config;
  for (int i = 0; i < kTiles; ++i) config.line_bytes[i] = kLine, config.lines[i] = kLines;
  uint8_t ones[kLines * kLine];
  for (uint8_t& one : ones) one = 1;
  int32_t sums[kLines * kLine / 4];
  const long line = kLine;
  __asm__ volatile(
      "ldtilecfg %0\n\ttilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3\n\t"
      "tileloadd (%1,%2,1), %%tmm4\n\ttileloadd (%1,%2,1), %%tmm5\n\t"
      "tileloadd (%1,%2,1), %%tmm6\n\ttileloadd (%1,%2,1), %%tmm7"
      :
      : "m"(config), "r"(ones), "r"(line)
      : "memory");
  for (long i = 0; i < steps; ++i)
    __asm__ volatile(
        "tdpbssd %tmm6, %tmm4, %tmm0\n\ttdpbssd %tmm7, %tmm4, %tmm1\n\t"
        "tdpbssd %tmm6, %tmm5, %tmm2\n\ttdpbssd %tmm7, %tmm5, %tmm3");
  __asm__ volatile("tilestored %%tmm3, (%0,%1,1)\n\ttilerelease" : : "r"(sums), "r"(line) : "memory");
  return sums[0];
}

static const Peak kPeaks[] = {
    {"amx", 2 * 16 * 16 * 64 * 4, amx},
    {"avx512vnni", 2 * 64 * kWide, avx512vnni},
    {"avx2", 2 * 32 * 8 * kNarrow, avx2},
};
#elif defined(__aarch64__)
#define EP_SUMS_BY(instruction, isa)                                               \
  __attribute__((target("arch=armv8.2-a+" #isa))) static int isa(long steps) {     \
    int8x16_t x = vdupq_n_s8(1), w = x;                                            \
    int32x4_t sum[kWide] = {};                                                     \
    for (long i = 0; i < steps; ++i)                                               \
      _Pragma("GCC unroll 16") for (int c = 0; c < kWide; ++c) {                   \
        sum[c] = instruction(sum[c], x, w);                                        \
        EP_HIDE(sum[c]);                                                           \
      }                                                                            \
    _Pragma("GCC unroll 16") for (int c = 1; c < kWide; ++c) sum[0] = vaddq_s32(sum[0], sum[c]); \
    return vaddvq_s32(sum[0]);                                                     \
  }
EP_SUMS_BY(vmmlaq_s32, i8mm)
EP_SUMS_BY(vdotq_s32, dotprod)

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

static const Peak kPeaks[] = {
    {"i8mm", 2 * 32 * kWide, i8mm},
    {"dotprod", 2 * 16 * kWide, dotprod},
    {"neon", 2 * 16 * 8 * kNarrow, neon},
};
#else
static const Peak kPeaks[] = {{"", 0, nullptr}};
#endif

static const Peak* named(const char* name) {
  for (const Peak& peak : kPeaks)
    if (!__builtin_strcmp(peak.name, name)) return &peak;
  return nullptr;
}

// Operations of one step of ep_limit_int8 by an instruction set; 0 where it has none here. Which of them this processor runs
// the op library says, which also asks the system for AMX's tiles.
EP_EXPORT int ep_limit_operations(const char* name) { return named(name) ? named(name)->operations : 0; }

EP_EXPORT int ep_limit_int8(const char* name, long steps) { return named(name) ? named(name)->run(steps) : 0; }
