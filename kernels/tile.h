// The shape of every SIMD row, once: an ISA file brings a small vocabulary V and gets quantize, project and tile.
// Include it inside the file's anonymous namespace and target region, after V's intrinsics header.
//
// tile: V::tiles x 16 outputs x m rows of x. K goes by in chunks whose weights are unpacked (int8) or dequantized (float)
// once into a stage that fits L1; each group of R rows of x then runs over the stage with its sums in registers. Sums wait
// in `acc` between chunks. When few rows share the weights they are read packed, straight from memory. The sums start
// from B.t, whose additions along R thus wait for nothing, and y is written once, and never read.
//
// V supplies, all static (nv = 16 * tiles / lanes vectors hold one row of a job):
//   tiles: of 16 outputs in a job, which share each load of x
//   lanes, F (lanes floats), I (lanes int32)
//   load(float*) load_half(uint16*) store(float*, F) set1(float) add mul fma(a,b,c) = a*b+c   F
//   sum(F) -> float;  sum_each(F v[lanes]) -> F whose lane i is sum(v[i])
//   set_int(int32) load_int(void*) field(I, shift, mask) to_float(I) nf4(I index) -> F
//   transpose(F v[lanes]): rows to columns
//   bfloat16_pair(F even, F odd) -> F whose lanes hold two bfloat16, to the nearest, ties to even
//   peak(x, n) -> largest |x| as bits;  quantize_unit(x, step, q): 32 floats to q = round_even(x * step)
//   correction(q, zero, n) -> what d starts from in a block of n columns: -zero * sum(q), in the form dot_unit takes
//   zero<Format>() what dot_unit's integers still carry beyond code - zero (see RowOps::zero)
//   stage_bytes<Format>(), unpack_unit<Format>(w, out): one unit in the form dot_unit<.., packed = false> reads
//   dot_unit<Format, R, packed>(w, at, q, I d[R][nv]): adds dot products over 32 columns of R rows of q, kChunk apart, and
//     of the tiles at w + at[tile] to d, which starts from the correction
//   scaled<Format>(d, w_scale): after a block's last unit, its sums times the scale of the weights
#pragma once

#define EP_SHARED __attribute__((noinline))  // one copy for all that call it: what a library takes to compile, and its size

constexpr int kWeightsAhead = 2048;  // bytes of packed W fetched ahead, when they stream from memory,
constexpr int kScalesAhead = 512;    //   and of their scales

template <class V>
constexpr int kOutputs = V::tiles * kTileRows;  // of a job
template <class V>
constexpr int kVectors = kOutputs<V> / V::lanes;
template <class V>
constexpr int kFloatChunk = 256 / V::tiles;  // float columns in a stage
template <class V, int R>
using Sums = typename V::F[R][kVectors<V>];

// One by one: what is copied as a whole lies in memory, and is written there after the loop between two copies as well.
template <class V, int R>
EP_INLINE void copy(const Sums<V, R>& from, Sums<V, R>& to) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors<V>; v++) to[r][v] = from[r][v];
}

template <class V>
EP_INLINE typename V::F load_any(const void* p, bool half, int64_t i) {
  return half ? V::load_half(static_cast<const uint16_t*>(p) + i) : V::load(static_cast<const float*>(p) + i);
}

// ---- weights ------------------------------------------------------------------------------------------------------
// Tile t of a job, or its last one: what is past it is computed, and not stored.
template <class V>
EP_INLINE int64_t tile_at(const TileJob& job, int t) {
  const int last = (job.columns - 1) / kTileRows;
  return V::tiles > 1 && t > last ? last : t;
}

// Of lanes lane0.. of one tile.
template <class V, Format F>
EP_INLINE typename V::F scale_vector(const void* w_scale, int64_t block, int lane0) {
  return load_any<V>(w_scale, info(F).half_scale, (info(F).block ? block : 0) * kTileRows + lane0);
}

// One unit as float [32][16], rows `stride` apart.
template <class V, Format F>
EP_INLINE void dequantize_unit(const uint8_t* w, const void* w_scale, int64_t block, float* out, int stride = kTileRows) {
  constexpr FormatInfo f = info(F);
  const typename V::F minus_zero = V::set1(static_cast<float>(-f.zero));
  for (int n = 0; n < kTileRows; n += V::lanes) {
    const typename V::F scale = scale_vector<V, F>(w_scale, block, n);
    for (int j = 0; j < f.bits; j++) {  // 4 columns at a time, in 4 bit the 4 of the other half unit beside them
      const typename V::I lanes = V::load_int(w + (j * kTileRows + n) * 4);
      for (int c = 0; c < 32 / f.bits; c++) {
        const int byte = f.bits == 8 ? c : c / 2, high = f.bits == 8 ? 0 : c % 2;
        const typename V::I code = V::field(lanes, byte * 8 + high * 4, f.bits == 8 ? 255 : 15);
        const typename V::F value = f.nf4 ? V::nf4(code) : V::add(V::to_float(code), minus_zero);
        V::store(out + (4 * j + byte + 16 * high) * stride + n, V::mul(value, scale));
      }
    }
  }
}

// ---- one chunk of K, R rows of x ----------------------------------------------------------------------------------
// int8: integer dot products per block, then both scales. The stage holds unit by unit, and each of all tiles.
template <class V, Format F, bool packed>
struct Int8Chunk {
  static constexpr int columns = packed ? 1 << 30 : kChunk;
  static constexpr int block = info(F).act_block, blocks = kChunk / block;
  static constexpr int unit_stage = V::template stage_bytes<F>();
  alignas(64) uint8_t stage[packed ? 1 : kChunk / kUnit * V::tiles * unit_stage];
  alignas(64) float scales[packed ? 1 : blocks * kOutputs<V>];

  void fill(const TileJob& job, int64_t k0, int64_t k1) {
    if constexpr (!packed) {
      uint8_t* to = stage;
      for (int64_t u = k0 / kUnit; u < k1 / kUnit; u++)
        for (int t = 0; t < V::tiles; t++, to += unit_stage)
          V::template unpack_unit<F>(job.w + tile_at<V>(job, t) * job.w_step + u * unit_bytes(info(F)), to);
      for (int64_t b = k0 / block, i = 0; b < k1 / block; b++)
        for (int v = 0; v < kVectors<V>; v++, i += V::lanes) V::store(scales + i, weight_scale(scales_of(job, v), b, v));
    }
  }
  static EP_INLINE const uint8_t* scales_of(const TileJob& job, int v) {
    return static_cast<const uint8_t*>(job.w_scale) + tile_at<V>(job, v * V::lanes / kTileRows) * job.w_scale_step;
  }
  static EP_INLINE typename V::F weight_scale(const uint8_t* w_scale, int64_t b, int v) {
    const typename V::F scale = scale_vector<V, F>(w_scale, b, v * V::lanes % kTileRows);
    return info(F).nf4 ? V::mul(scale, V::set1(int_scale(info(F)))) : scale;
  }
  // Bytes of each tile, `ahead` further on, also past pages' ends: from `turn` on what the next job begins with.
  static EP_INLINE void fetch_ahead(const uint8_t* at, int64_t step, const uint8_t* turn, int ahead, int bytes) {
    at += ahead + (V::tiles > 1 && at >= turn ? (V::tiles - 1) * step : 0);
    for (int t = 0; t < V::tiles; t++)
      for (int i = 0; i < bytes; i += 64) __builtin_prefetch(at + t * step + i);
  }
  template <int R>
  EP_SHARED void add(const TileJob& job, int64_t m, int64_t k0, int64_t k1, Sums<V, R>& sums_out) const {
    const uint8_t *w = packed ? job.w : stage, *w_scales[kVectors<V>];
    int64_t at[V::tiles];
    for (int t = 0; t < V::tiles; t++) at[t] = packed ? tile_at<V>(job, t) * job.w_step : t * unit_stage;
    for (int v = 0; v < kVectors<V>; v++) w_scales[v] = scales_of(job, v);
    constexpr int unit_step = packed ? kTileRows * kUnit * info(F).bits / 8 : V::tiles * unit_stage;
    Sums<V, R> sums;  // of its own: stores through sums_out could change anything, as far as a compiler knows
    copy<V, R>(sums_out, sums);
    for (int64_t k = k0; k < k1; k += kChunk) {
      const int64_t row = k / kChunk * job.q_rows + m;
      const int8_t* q = job.q + row * kChunk;
      const float *q_scale = job.q_scale + row * blocks, *scale = scales;
      const int32_t* q_fix = job.q_fix + row * blocks;
      const int64_t left = (k1 - k) / block;
      for (int64_t b = 0; b < (left < blocks ? left : blocks); b++, scale += kOutputs<V>) {
        if constexpr (packed && V::tiles > 1 && info(F).block) {
          constexpr int bytes = kTileRows * (info(F).half_scale ? 2 : 4);
          const auto* from = static_cast<const uint8_t*>(job.w_scale);
          fetch_ahead(from + (k / block + b) * bytes, job.w_scale_step, from + job.w_scale_step - kScalesAhead, kScalesAhead, bytes);
        }
        typename V::I d[R][kVectors<V>];
        for (int r = 0; r < R; r++)
          for (int v = 0; v < kVectors<V>; v++) d[r][v] = V::set_int(q_fix[r * blocks + b]);
        for (int u = 0; u < block / kUnit; u++, w += unit_step, q += kUnit) {
          if constexpr (packed) fetch_ahead(w, job.w_step, job.w + job.w_step - kWeightsAhead, kWeightsAhead, unit_step);
          V::template dot_unit<F, R, packed>(w, at, q, d);
        }
        for (int r = 0; r < R; r++) {
          const typename V::F x_scale = V::set1(q_scale[r * blocks + b]);
          for (int v = 0; v < kVectors<V>; v++) {
            const typename V::F w_scale = packed ? weight_scale(w_scales[v], k / block + b, v) : V::load(scale + v * V::lanes);
            sums[r][v] = V::fma(V::template scaled<F>(d[r][v], w_scale), x_scale, sums[r][v]);
          }
        }
      }
    }
    copy<V, R>(sums, sums_out);
  }
};

// float: only what fills the stage depends on the format.
template <class V>
struct FloatStage {
  static constexpr int columns = kFloatChunk<V>;
  alignas(64) float stage[kFloatChunk<V> * kOutputs<V>];

  template <int R>
  EP_SHARED void add(const TileJob& job, int64_t m, int64_t k0, int64_t k1, Sums<V, R>& sums_out) const {
    const float* x = job.x + m * job.k;
    Sums<V, R> sums;
    copy<V, R>(sums_out, sums);
    for (int64_t k = k0; k < k1; k++) {
      typename V::F w[kVectors<V>];
      for (int v = 0; v < kVectors<V>; v++) w[v] = V::load(stage + (k - k0) * kOutputs<V> + v * V::lanes);
      for (int r = 0; r < R; r++) {
        const typename V::F x_rk = V::set1(x[r * job.k + k]);
        for (int v = 0; v < kVectors<V>; v++) sums[r][v] = V::fma(w[v], x_rk, sums[r][v]);
      }
    }
    copy<V, R>(sums, sums_out);
  }
};
template <class V, Format F>
struct FloatChunk : FloatStage<V> {
  void fill(const TileJob& job, int64_t k0, int64_t k1) {
    constexpr FormatInfo f = info(F);
    for (int64_t k = k0; k < k1; k += kUnit)
      for (int t = 0; t < V::tiles; t++)
        dequantize_unit<V, F>(job.w + tile_at<V>(job, t) * job.w_step + k / kUnit * unit_bytes(f),
                              static_cast<const char*>(job.w_scale) + tile_at<V>(job, t) * job.w_scale_step, f.block ? k / f.block : 0,
                              this->stage + (k - k0) * kOutputs<V> + t * kTileRows, kOutputs<V>);
  }
};

// The greatest power of two below R.
constexpr int fewer(int R) {
  int rows = 1;
  while (rows * 2 < R) rows *= 2;
  return rows;
}

#include "adapter.h"

// One number for each column, as far as there are columns; null: zero.
template <int outputs>
inline void spread(const float* from, int64_t step, int columns, float* to) {
  if (!from) __builtin_memset(to, 0, outputs * sizeof(float));
  else if (step == 1 && columns == outputs) __builtin_memcpy(to, from, outputs * sizeof(float));
  else for (int n = 0; n < outputs; n++) to[n] = n < columns ? from[n * step] : 0.0f;
}

// ---- y ------------------------------------------------------------------------------------------------------------
template <class V, int R>
EP_SHARED void write_y(const TileJob& job, int64_t m, const Sums<V, R>& sums, const float* s_out, const float* bias) {
  for (int r = 0; r < R; r++) {
    alignas(64) float line[kOutputs<V>];
    float* y = job.y + (m + r) * job.y_stride;
    float* to = job.columns == kOutputs<V> ? y : line;
    for (int v = 0; v < kVectors<V>; v++) {
      const typename V::F bias_v = V::load(bias + v * V::lanes);
      V::store(to + v * V::lanes, job.s_out ? V::fma(sums[r][v], V::load(s_out + v * V::lanes), bias_v) : V::add(sums[r][v], bias_v));
    }
    if (to == line) for (int n = 0; n < job.columns; n++) y[n] = line[n];
  }
}

// ---- a job --------------------------------------------------------------------------------------------------------
template <class V, class Chunk, int rows>
struct Tile {
  const TileJob& job;
  Chunk chunk;
  Adapter<V> adapter;
  bool first = true;  // acc holds nothing yet
  alignas(64) typename V::F acc[rows][kVectors<V>];
  alignas(64) float s_out[kOutputs<V>], bias[kOutputs<V>];

  explicit Tile(const TileJob& j) : job(j), adapter(j) {}

  // The sums of R rows, zero at first.
  template <int R>
  EP_INLINE Sums<V, R>& sums_of(int64_t m) {
    for (int r = 0; first && r < R; r++)
      for (int v = 0; v < kVectors<V>; v++) acc[m + r][v] = V::set1(0.0f);
    return reinterpret_cast<Sums<V, R>&>(acc[m]);
  }
  // All rows; of those of a run R at a time, what remains by fewer(R), ... 1.
  template <int R>
  void adapter_rows(Adapter<V>& from) {
    for (int64_t m = 0; m < job.m; m = from.until) {
      from.look(m);
      run_rows<R>(from, m);
    }
  }
  template <int R>
  void run_rows(Adapter<V>& from, int64_t m) {
    for (; m + R <= from.until; m += R) from.template add<R>(m, sums_of<R>(m));
    if constexpr (R > 1) run_rows<fewer(R)>(from, m);
  }
  // C.sums, of a tile that has an offset.
  template <int R>
  EP_SHARED void offset_rows() {
    const Span all = {0, job.blocks};
    const Run run = {job.row + job.m, &all, 1};
    TileJob part = job;
    part.rank = job.blocks;
    part.run = &run;
    part.t = job.sums;
    part.b = job.offset;
    part.b_step = job.offset_step;
    part.b_half = job.offset_half;
    Adapter<V> offset(part);
    for (int64_t r0 = 0; r0 < part.rank; r0 += kRankPanel, first = false) {
      offset.begin(r0);
      adapter_rows<R>(offset);
    }
  }
  template <int R>
  void chunk_rows(int64_t m, int64_t k0, int64_t k1) {
    for (; m + R <= job.m; m += R) {
      Sums<V, R>& sums = sums_of<R>(m);
      if (!k0 && job.rank) adapter.template add<R>(m, sums);
      chunk.template add<R>(job, m, k0, k1, sums);
      if (k1 == job.k) write_y<V, R>(job, m, sums, s_out, bias);
    }
    if constexpr (R > 1) chunk_rows<fewer(R)>(m, k0, k1);
  }
  // What has no part in the weights' chunks.
  template <int R>
  void begin() {
    if (job.s_out) spread<kOutputs<V>>(job.s_out, job.s_out_step, job.columns, s_out);
    spread<kOutputs<V>>(job.bias, job.bias_step, job.columns, bias);
    if (job.blocks) offset_rows<R>();
    int64_t r0 = 0;
    for (; r0 + kRankPanel < job.rank; r0 += kRankPanel, first = false) {  // rare, so a pass each
      adapter.begin(r0);
      adapter_rows<R>(adapter);
    }
    if (job.rank) adapter.begin(r0);
  }
  template <int R>
  void all() {
    begin<R>();
    for (int64_t k0 = 0; k0 < job.k; k0 += Chunk::columns, first = false) {
      const int64_t k1 = job.k - k0 < Chunk::columns ? job.k : k0 + Chunk::columns;
      chunk.fill(job, k0, k1);
      chunk_rows<R>(0, k0, k1);
    }
  }
};

template <class V, class Alone, Format F, Act A, int R>
void tile_of(const TileJob& job) {
  if constexpr (A == Act::float32) {
    Tile<V, FloatChunk<V, F>, kJobRows>(job).template all<R>();
  } else if (job.m == 1) {
    Tile<Alone, Int8Chunk<Alone, F, true>, 1>(job).template all<1>();
  } else if (job.m <= R) {
    Tile<V, Int8Chunk<V, F, true>, R>(job).template all<R>();
  } else {
    Tile<V, Int8Chunk<V, F, false>, kJobRows>(job).template all<R>();
  }
}

// ---- before the tiles ---------------------------------------------------------------------------------------------
template <class V>
void quantize_of(const float* x, int64_t k, int block, int32_t zero, int8_t* q, float* scale, int32_t* fix) {
  for (int64_t b = 0; b < k / block; b++, x += block, q += block) {
    const uint32_t peak = V::peak(x, block);
    const float top = bits_float(peak);
    const bool finite = peak < 0x7f800000u, empty = !finite || top < 1e-30f;
    for (int i = 0; i < block; i += kUnit) {
      if (empty) for (int c = 0; c < kUnit; c++) q[i + c] = 0;
      else V::quantize_unit(x + i, 127.0f / top, q + i);
    }
    scale[b] = !finite ? bits_float(0x7fc00000u) : empty ? 0.0f : top / 127.0f;
    fix[b] = V::correction(q, zero, block);
  }
}

// t of M rows of x and R ranks. A number's sum is taken in the same order whatever M and R are.
template <class V, bool half, int M, int R>
EP_INLINE void project_block(const void* a, int64_t k, const float* x, float* t, int64_t t_stride) {
  constexpr int vectors = (M * R + V::lanes - 1) / V::lanes;
  typename V::F sums[vectors][V::lanes];
  for (int v = 0; v < vectors; v++)
    for (int i = 0; i < V::lanes; i++) sums[v][i] = V::set1(0.0f);
  for (int64_t c = 0; c < k; c += V::lanes) {
    typename V::F a_rc[R];
    for (int r = 0; r < R; r++) a_rc[r] = load_any<V>(a, half, r * k + c);
    for (int i = 0; i < M; i++) {
      const typename V::F x_ic = V::load(x + i * k + c);
      for (int r = 0, at = i * R; r < R; r++, at++)
        sums[at / V::lanes][at % V::lanes] = V::fma(a_rc[r], x_ic, sums[at / V::lanes][at % V::lanes]);
    }
  }
  alignas(64) float all[vectors * V::lanes];
  for (int v = 0; v < vectors; v++) V::store(all + v * V::lanes, V::sum_each(sums[v]));
  for (int i = 0; i < M; i++)
    for (int r = 0; r < R; r++) t[i * t_stride + r] = all[i * R + r];
}

template <class V, bool half, int M, int R>
void project_rows(const void* a, int64_t rank, int64_t k, const float* x, int64_t m, float* t, int64_t t_stride) {
  const int64_t row_bytes = k * (half ? 2 : 4);
  int64_t i = 0;
  for (; i + M <= m; i += M) {
    int64_t r = 0;
    for (; r + R <= rank; r += R)
      project_block<V, half, M, R>(static_cast<const char*>(a) + r * row_bytes, k, x + i * k, t + i * t_stride + r, t_stride);
    for (; r < rank; r++)
      project_block<V, half, M, 1>(static_cast<const char*>(a) + r * row_bytes, k, x + i * k, t + i * t_stride + r, t_stride);
  }
  if constexpr (M > 1) project_rows<V, half, 1, 8>(a, rank, k, x + i * k, m - i, t + i * t_stride, t_stride);
}

template <class V>
void project_of(const void* a, bool half, int64_t rank, int64_t k, const float* x, int64_t m, float* t, int64_t t_stride) {
  constexpr int ranks = V::lanes > 8 ? 4 : 2;  // as many sums as registers hold
  if (half) project_rows<V, true, 4, ranks>(a, rank, k, x, m, t, t_stride);
  else project_rows<V, false, 4, ranks>(a, rank, k, x, m, t, t_stride);
}

// What EP_DEFINE_ROW names, for vocabulary V, and Alone for one row of int8 x.
#define EP_ROWS_FROM(V, Alone)                                                                                          \
  constexpr int tiles = V::tiles;                                                                                   \
  template <Act A>                                                                                                  \
  constexpr int tiles_alone = A == Act::int8 ? Alone::tiles : V::tiles;                                             \
  void quantize(const float* x, int64_t k, int block, int32_t zero, int8_t* q, float* scale, int32_t* fix) {        \
    quantize_of<V>(x, k, block, zero, q, scale, fix);                                                               \
  }                                                                                                                 \
  void project(const void* a, bool half, int64_t rank, int64_t k, const float* x, int64_t m, float* t, int64_t s) { \
    project_of<V>(a, half, rank, k, x, m, t, s);                                                                    \
  }                                                                                                                 \
  template <Format F, Act A, int R>                                                                                 \
  void tile(const TileJob& job) {                                                                                   \
    tile_of<V, Alone, F, A, R>(job);                                                                                      \
  }                                                                                                                 \
  template <Format F, Act>                                                                                          \
  constexpr int32_t zero() {                                                                                        \
    return V::template zero<F>();                                                                                   \
  }
