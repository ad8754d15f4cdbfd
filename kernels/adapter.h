// B.t, the adapter's part of a tile, for every SIMD row. Included by tile.h, whose vocabulary V it speaks. The offset of
// the weights, C.sums, is the same product over other matrices.
//
// B passes by rank by rank, a vector of outputs at a time, up to kRankPanel ranks in a pass:
//   in place   as it lies, where few rows share it (TileJob::in_place)
//   a panel    as float [R][outputs], made once for all rows; also where columns end within a tile, lest what lies behind
//              B is read
// Blocks of ranks that are not live are passed over: those of a row are not computed, those of all rows not read. The sums
// go through ranks in order, whichever way they come, so a row of a batch has the bits that it has alone.
#pragma once

template <class V>
struct Adapter {
  static constexpr int blocks = kRankPanel / kRankBlock;

  const TileJob& job;
  const bool in_place;
  int64_t r0 = 0, ranks = 0;  // of the pass,
  int64_t until = 0;          //   the first row after those that were looked at last, which are alike,
  int spans = 0;              //   and what is live of the pass in these
  struct { int64_t from, to; } span[blocks / 2];
  alignas(64) float panel[kRankPanel * kOutputs<V>];

  explicit Adapter(const TileJob& j) : job(j), in_place(j.in_place && j.columns == kOutputs<V>) {}

  // Begins the pass over ranks from `first` on.
  EP_SHARED void fill(int64_t first) {
    r0 = first;
    until = 0;
    ranks = job.rank - first < kRankPanel ? job.rank - first : kRankPanel;
    if (in_place) return;
    if (job.b_half) fill_panel<true>();
    else fill_panel<false>();
  }
  template <int R>
  EP_INLINE void add(int64_t m, Sums<V, R>& sums) {
    if (m >= until) look(m);
    if (m + R > until) apart<R>(m, sums);
    else if (!in_place) product<R, false, false>(m, sums);
    else if (job.b_half) product<R, true, true>(m, sums);
    else product<R, true, false>(m, sums);
  }

 private:
  bool is_live(int64_t r) const { return !job.live || job.live_any[(r0 + r) / kRankBlock]; }
  // What the job after this one wants of a rank.
  template <bool half>
  static EP_INLINE void fetch_next(const void* b, int64_t at) {
    constexpr int size = half ? 2 : 4;
    for (int i = 0; i < kOutputs<V> * size; i += 64) __builtin_prefetch(static_cast<const char*>(b) + (at + kOutputs<V>) * size + i);
  }
  template <bool half>
  void fill_panel() {
    const int whole = job.columns / V::lanes * V::lanes;
    float* to = panel;
    for (int64_t r = 0; r < ranks; r++, to += kOutputs<V>) {
      if (!is_live(r)) continue;
      const int64_t at = (r0 + r) * job.b_step;
      fetch_next<half>(job.b, at);
      for (int n = 0; n < whole; n += V::lanes) V::store(to + n, load_any<V>(job.b, half, at + n));
      for (int n = whole; n < kOutputs<V>; n++)
        to[n] = n >= job.columns ? 0.0f : half ? half_float(static_cast<const uint16_t*>(job.b)[at + n]) : static_cast<const float*>(job.b)[at + n];
    }
  }
  // Rows that are not all alike, in parts: a text may end within a register tile.
  template <int R>
  EP_SHARED void apart(int64_t m, Sums<V, R>& sums) {
    if constexpr (R > 1) {
      constexpr int some = fewer(R);
      add<some>(m, reinterpret_cast<Sums<V, some>&>(sums[0]));
      add<R - some>(m + some, reinterpret_cast<Sums<V, R - some>&>(sums[some]));
    }
  }
  // Finds the rows from m on that have the same live blocks in this pass, and what these are.
  EP_SHARED void look(int64_t m) {
    spans = 0;
    until = job.m;
    if (!job.live) {
      span[spans++] = {0, ranks};
      return;
    }
    const int64_t row = (job.row + m) / job.live_each;
    const uint8_t* live = job.live + row * job.live_stride + r0 / kRankBlock;
    for (int b = 0; b < blocks; b++) {
      const int64_t from = b * kRankBlock, to = from + kRankBlock < ranks ? from + kRankBlock : ranks;
      if (!live[b]) continue;
      if (b && live[b - 1]) span[spans - 1].to = to;
      else span[spans++] = {from, to};
    }
    until = (row + 1) * job.live_each - job.row;
    for (const uint8_t* next = live; until < job.m && alike(live, next += job.live_stride, blocks);) until += job.live_each;
  }
  template <int R, bool direct, bool half>
  EP_SHARED void product(int64_t m, Sums<V, R>& sums_out) const {
    const void* b = direct ? job.b : panel;
    const int64_t step = direct ? job.b_step : kOutputs<V>;
    Sums<V, R> sums;
    copy<V, R>(sums_out, sums);
    for (int s = 0; s < spans; s++) {
      const float* t = job.t + m * job.rank + r0;
      int64_t at = (span[s].from + (direct ? r0 : 0)) * step;
#pragma GCC unroll 2
      for (int64_t r = span[s].from; r < span[s].to; r++, at += step) {
        if (direct) fetch_next<half>(b, at);
        typename V::F b_r[kVectors<V>];
        for (int v = 0; v < kVectors<V>; v++) b_r[v] = load_any<V>(b, half, at + v * V::lanes);
        for (int i = 0; i < R; i++) {
          const typename V::F t_r = V::set1(t[i * job.rank + r]);
          for (int v = 0; v < kVectors<V>; v++) sums[i][v] = V::fma(b_r[v], t_r, sums[i][v]);
        }
      }
    }
    copy<V, R>(sums, sums_out);
  }
};
