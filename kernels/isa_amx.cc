// AMX: a tile instruction multiplies 16 rows of x by 16 outputs over 32 or 64 columns. Few rows, which cost it as much as 16,
// take the way of AVX-512 VNNI.
//
// A tile gives its sums away through memory alone, and what is loaded after such a store waits for it. So one pass multiplies
// some blocks, and the next one scales and adds their sums.
#include "adapter_matmul.h"

#if defined(__x86_64__) && !defined(EP_SIMDE)
#if defined(EP_FREESTANDING)
#define __MM_MALLOC_H  // clang's immintrin.h would ask for stdlib.h through it
#endif
#include <immintrin.h>

#define EP_ROW(op, format, act, tile_m, isa) EP_WHEN(EP_HAVE_##isa, extern const RowOps EP_ROW_SYMBOL(op, format, act, isa);)
#include "kernels.inc"
#undef EP_ROW

#if defined(__clang__)  // its assembler looks at the function's features; GCC's takes every instruction, and old ones lack these names
#define EP_AMX ",amx-tile,amx-int8"
#else
#define EP_AMX ""
#endif
EP_TARGET_PUSH("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c" EP_AMX)
namespace {
#include "avx512.h"
#include "tile.h"

constexpr int kRows = 16;  // of x in a tile
constexpr int kPass = 4;   // blocks of a pass
template <Format F>
constexpr int kLeast = info(F).act_block < 64 ? 12 : 8;  // rows that make a tile worth its while

// ---- the tile registers: 0, 1 sums, 2 x, 3, 4 weights ------------------------------------------------------------------
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "as ldtilecfg reads it");

EP_INLINE void configure(int x_rows, int columns) {
  TileConfig config;
  for (int i = 0; i < 5; i++) {
    config.row_bytes[i] = static_cast<uint16_t>(i == 2 ? columns : 64);
    config.rows[i] = static_cast<uint8_t>(i < 3 ? x_rows : columns / 4);
  }
  asm volatile("ldtilecfg %0" : : "m"(config));
}
EP_INLINE void release() { asm volatile("tilerelease" : : : "memory"); }
template <int to>
EP_INLINE void clear() {
  asm volatile("tilezero %%tmm%c0" : : "i"(to));
}
template <int to>
EP_INLINE void load_tile(const void* at, int64_t step) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(to), "r"(at), "r"(step) : "memory");
}
template <int from>
EP_INLINE void store_tile(void* at, int64_t step) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(from), "r"(at), "r"(step) : "memory");
}
template <int sum, int x, int w>  // signed bytes
EP_INLINE void multiply() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(w));
}

// ---- one chunk of K ---------------------------------------------------------------------------------------------------
// The stage holds codes less their zero, so no correction is needed, and a tile's units one after the other.
template <Format F>
struct AmxChunk {
  using Scales = Int8Chunk<Avx512, F, false>;
  static constexpr int columns = kChunk, block = info(F).act_block, blocks = kChunk / block;
  static constexpr int step = block < 64 ? block : 64;  // columns of an instruction
  alignas(64) uint8_t stage[Avx512::tiles][kChunk * kTileRows];
  alignas(64) float scales[blocks][kOutputs<Avx512>];
  alignas(64) int32_t products[kPass][Avx512::tiles][kRows * kTileRows];

  void fill(const TileJob& job, int64_t k0, int64_t k1) {
    const __m512i zero = _mm512_set1_epi8(static_cast<char>(Avx512::zero<F>()));
    for (int t = 0; t < Avx512::tiles; t++) {
      const uint8_t* w = job.w + tile_at<Avx512>(job, t) * job.w_step;
      uint8_t* to = stage[t];
      for (int64_t u = k0 / kUnit; u < k1 / kUnit; u++)
        for (int j = 0; j < 8; j++, to += 64)
          _mm512_store_si512(to, _mm512_sub_epi8(Avx512::codes<F>(w + u * unit_bytes(info(F)), j), zero));
      for (int64_t b = k0 / block; b < k1 / block; b++)
        _mm512_store_ps(scales[b - k0 / block] + t * kTileRows, Scales::weight_scale(Scales::scales_of(job, t), b, t));
    }
  }
  // Sums of products of 16 rows of x, or as many as are configured, over n blocks from b0 on.
  EP_INLINE void multiply_blocks(const int8_t* q, int64_t b0, int64_t n) {
    for (int64_t b = 0; b < n; b++) {
      clear<0>();
      clear<1>();
      for (int64_t c = (b0 + b) * block; c < (b0 + b + 1) * block; c += step) {
        load_tile<2>(q + c, kChunk);
        load_tile<3>(stage[0] + c * kTileRows, 64);
        load_tile<4>(stage[1] + c * kTileRows, 64);
        multiply<0, 2, 3>();
        multiply<1, 2, 4>();
      }
      store_tile<0>(products[b][0], 64);
      store_tile<1>(products[b][1], 64);
    }
  }
  // What the next rows of x hold of n blocks: 16 streams are too many to be foreseen.
  EP_INLINE void fetch_blocks(const int8_t* q, int64_t b0, int64_t n) {
    for (int64_t c = b0 * block; c < (b0 + n) * block; c += 64)
      for (int i = 0; i < kRows; i++) __builtin_prefetch(q + (kRows + i) * kChunk + c);
  }
  // And both scales.
  EP_INLINE void add_blocks(const float* q_scale, int64_t b0, int64_t n, __m512 (*acc)[Avx512::tiles]) const {
    for (int t = 0; t < Avx512::tiles; t++) {
      __m512 sums[kRows];
      for (int i = 0; i < kRows; i++) sums[i] = acc[i][t];
      for (int64_t b = 0; b < n; b++) {
        const __m512 w_scale = _mm512_load_ps(scales[b0 + b] + t * kTileRows);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) {
          const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(products[b][t] + i * kTileRows));
          sums[i] = _mm512_fmadd_ps(_mm512_mul_ps(dot, w_scale), _mm512_set1_ps(q_scale[i * blocks + b0 + b]), sums[i]);
        }
      }
      for (int i = 0; i < kRows; i++) acc[i][t] = sums[i];
    }
  }
  EP_SHARED void add(const TileJob& job, int64_t m, int64_t k0, int64_t k1, __m512 (*acc)[Avx512::tiles]) {
    const int64_t row = k0 / kChunk * job.q_rows + m, all = (k1 - k0) / block;
    for (int64_t b = 0; b < all; b += kPass) {
      const int64_t n = all - b < kPass ? all - b : kPass;
      multiply_blocks(job.q + row * kChunk, b, n);
      fetch_blocks(job.q + row * kChunk, b, n);
      add_blocks(job.q_scale + row * blocks, b, n, acc);
    }
  }
};

// ---- a job --------------------------------------------------------------------------------------------------------------
template <Format F>
struct AmxTile : Tile<Avx512, AmxChunk<F>, kJobRows> {
  using Base = Tile<Avx512, AmxChunk<F>, kJobRows>;
  using Base::Base, Base::job, Base::chunk, Base::acc;

  void all() {
    this->template begin<6>();
    if (job.rank) this->template adapter_rows<6>(this->adapter), this->first = false;
    for (int64_t m = this->first ? 0 : job.m; m < (job.m + kRows - 1) / kRows * kRows; m++)
      for (int t = 0; t < Avx512::tiles; t++) acc[m][t] = _mm512_setzero_ps();
    int64_t rows = 0;  // configured
    for (int64_t k0 = 0; k0 < job.k; k0 += kChunk) {
      const int64_t k1 = job.k - k0 < kChunk ? job.k : k0 + kChunk;
      chunk.fill(job, k0, k1);
      for (int64_t m = 0; m < job.m; m += kRows) {
        const int64_t left = job.m - m < kRows ? job.m - m : kRows;
        if (left != rows) configure(static_cast<int>(rows = left), AmxChunk<F>::step);
        if (k1 == job.k) fetch_y(m, left);
        chunk.add(job, m, k0, k1, acc + m);
      }
    }
    release();
    int64_t m = 0;
    for (; m + 4 <= job.m; m += 4) write<4>(m);
    for (; m < job.m; m++) write<1>(m);
  }
  // Stores that miss would be waited for by all that comes after them.
  void fetch_y(int64_t m, int64_t rows) {
    for (int64_t i = m; i < m + rows; i++)
      for (int n = 0; n < job.columns; n += 16) __builtin_prefetch(job.y + i * job.y_stride + n, 1);
  }
  template <int R>
  void write(int64_t m) {
    write_y<Avx512, R>(job, m, reinterpret_cast<Sums<Avx512, R>&>(acc[m]), this->s_out, this->bias);
  }
};

// ---- the rows -----------------------------------------------------------------------------------------------------------
template <Format F>
constexpr const RowOps* vnni = nullptr;
#define EP_MINE_amx EP_YES
#define EP_ROW(op, format, act, tile_m, isa) \
  EP_WHEN(EP_MINE_##isa, template <> constexpr const RowOps* vnni<Format::format> = &EP_ROW_SYMBOL(op, format, act, avx512vnni);)
#include "kernels.inc"
#undef EP_ROW

constexpr int tiles = Avx512::tiles;
template <Act>
constexpr int tiles_alone = Avx512Alone::tiles;
template <Format F, Act>
constexpr int32_t zero() {
  return Avx512::zero<F>();
}
void quantize(const float* x, int64_t k, int block, int32_t zero, int8_t* q, float* scale, int32_t* fix) {
  vnni<Format::i8c>->quantize(x, k, block, zero, q, scale, fix);
}
void project(const void* a, bool half, int64_t rank, int64_t k, const float* x, int64_t m, float* t, int64_t t_stride) {
  vnni<Format::i8c>->project(a, half, rank, k, x, m, t, t_stride);
}
// Some rows of a job, as a job of their own.
TileJob some_rows(const TileJob& job, int blocks, int64_t m0, int64_t m1) {
  TileJob some = job;
  some.m = m1 - m0;
  some.q += m0 * kChunk;
  some.q_scale += m0 * blocks;
  some.q_fix += m0 * blocks;
  some.t += m0 * job.rank;
  some.row += m0;
  some.sums += m0 * job.blocks;
  some.y += m0 * job.y_stride;
  return some;
}
template <Format F, Act, int>
void tile(const TileJob& job) {
  constexpr int blocks = AmxChunk<F>::blocks;
  const int64_t m = job.m % kRows < kLeast<F> ? job.m / kRows * kRows : job.m;
  if (m) AmxTile<F>(some_rows(job, blocks, 0, m)).all();
  if (m < job.m) vnni<F>->tile(some_rows(job, blocks, m, job.m));
}

}  // namespace
EP_TARGET_POP

#define EP_ROW(op, format, act, tile_m, isa) EP_WHEN(EP_MINE_##isa, EP_DEFINE_ROW(op, format, act, tile_m, isa))
#include "kernels.inc"
#endif
