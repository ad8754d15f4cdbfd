// What both halves of the check program share: seeded numbers, buffers, and the guards around what a kernel writes.
#pragma once
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "formats.h"

constexpr uint32_t kGuard = 0x7fa5a5a5u;  // a NaN no kernel makes, before, after and between rows of y
constexpr int64_t kGuardFloats = 32;

inline uint32_t random_bits() {
  static uint64_t state = 0x9e3779b97f4a7c15ull;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return static_cast<uint32_t>(state >> 32);
}
inline float random_float() { return static_cast<float>(static_cast<int32_t>(random_bits())) * (1.0f / 2147483648.0f); }
inline uint16_t half_of(float v) {  // truncating; for |v| in half's normal range, or 0
  const uint32_t u = float_bits(v), e = u >> 23 & 255;
  return static_cast<uint16_t>((u >> 16 & 0x8000u) | (e < 113 ? 0 : (e - 112) << 10 | (u >> 13 & 0x3ffu)));
}

// n numbers that end where a page without access begins: whoever reads or writes behind them dies of it.
template <class T>
struct Buffer {
  size_t page, mapped;
  char* pages;
  T* p;
  explicit Buffer(int64_t n) {
    const size_t bytes = static_cast<size_t>(n) * sizeof(T);
    page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped = (bytes + page - 1) / page * page + page;
    void* got = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED || mprotect(static_cast<char*>(got) + mapped - page, page, PROT_NONE)) perror("check"), exit(1);
    pages = static_cast<char*>(got);
    p = reinterpret_cast<T*>(pages + mapped - page - bytes);
  }
  ~Buffer() { munmap(pages, mapped); }
  Buffer(const Buffer&) = delete;
  T& operator[](int64_t i) { return p[i]; }
};

// Random weights in tiles, every code allowed; scale_at_37: what every 37th scale is.
inline void fill_tiles(const FormatInfo& f, int64_t tiles, int64_t k, uint8_t* w, void* w_scale, float scale_at_37) {
  for (int64_t i = 0; i < tiles * tile_bytes(f, k); i++) {
    w[i] = static_cast<uint8_t>(random_bits());
    if (f.bits == 8 && !w[i]) w[i] = 1;  // codes stand for -127..127
  }
  for (int64_t i = 0; i < tiles * scale_blocks(f, k) * kTileRows; i++) {
    const float v = i % 37 == 5 ? scale_at_37 : 0.01f + 0.02f * fabsf(random_float());
    if (f.half_scale) static_cast<uint16_t*>(w_scale)[i] = half_of(v);
    else static_cast<float*>(w_scale)[i] = v;
  }
}

inline double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Proves the rows of functions.inc whose names hold `only`, as check.cc does those of kernels.inc.
void check_functions(const char* only, const char* fault, bool timing, int* proved, int* failed);
