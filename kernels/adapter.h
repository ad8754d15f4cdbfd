// B.t, the adapter's part of a tile, for every SIMD row. Included by tile.h, whose vocabulary V it speaks. The offset of
// the weights, C.sums, is the same product over other matrices.
//
// Rows that have the same live ranks in turn (see Run) share what is read of B. It passes by rank by rank, a vector of outputs
// at a time, up to kRankPanel live ranks in a pass:
//   in place   as it lies, where the rows are few
//   a panel    as float [ranks][outputs], made when the first of the rows comes; also where columns end within a tile, lest
//              what lies behind B is read
// Ranks that are not live are neither computed nor read. The sums go through ranks in order, whichever way they come, so a
// row of a batch has the bits that it has alone.
#pragma once

template <class V>
struct Adapter {
  static constexpr int few = 12;  // rows that do not make a panel worth its while

  const TileJob& job;
  const Run* run;
  int64_t c0 = 0;     // columns of t before those of the pass
  int64_t until = 0;  // the first row after those of the run,
  int spans = 0;      //   and what is live of the pass in these
  Span span[kRankPanel / kRankBlock + 1];
  bool in_place = false;
  alignas(64) float panel[kRankPanel * kOutputs<V>];

  explicit Adapter(const TileJob& j) : job(j), run(j.run) {}

  // Begins the pass over columns of t from `first` on.
  void begin(int64_t first) {
    c0 = first;
    until = 0;
    run = job.run;
  }
  // Readies the rows from m on that are of one run.
  EP_SHARED void look(int64_t m) {
    while (run->end <= job.row + m) run++;
    until = run->end - job.row < job.m ? run->end - job.row : job.m;
    cut();
    in_place = until - m <= few && job.columns == kOutputs<V>;
    if (in_place) return;
    if (job.b_half) fill<true>();
    else fill<false>();
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
  // Finds what is live of the pass in the run.
  void cut() {
    spans = 0;
    int64_t c = -c0;  // column of the pass
    for (int64_t s = 0; s < run->spans && c < kRankPanel; c += run->span[s].to - run->span[s].from, s++) {
      const int64_t from = run->span[s].from - (c < 0 ? c : 0), to = run->span[s].from + kRankPanel - c;
      if (from < run->span[s].to) span[spans++] = {from, to < run->span[s].to ? to : run->span[s].to};
    }
  }
  // What the job after this one wants of a rank.
  template <bool half>
  static EP_INLINE void fetch_next(const void* b, int64_t at) {
    constexpr int size = half ? 2 : 4;
    for (int i = 0; i < kOutputs<V> * size; i += 64) __builtin_prefetch(static_cast<const char*>(b) + (at + kOutputs<V>) * size + i);
  }
  template <bool half>
  void fill() {
    float* to = panel;
    for (int s = 0; s < spans; s++) to = fill_span<half>(span[s].from * job.b_step, span[s].to * job.b_step, to);
  }
  template <bool half>
  float* fill_span(int64_t at, int64_t end, float* to) const {
    const int columns = job.columns, whole = columns / V::lanes * V::lanes;
    const int64_t step = job.b_step;
    const void* b = job.b;
    for (; at < end; at += step, to += kOutputs<V>) {
      fetch_next<half>(b, at);
      for (int n = 0; n < whole; n += V::lanes) V::store(to + n, load_any<V>(b, half, at + n));
      for (int n = whole; n < kOutputs<V>; n++)
        to[n] = n >= columns ? 0.0f : half ? half_float(static_cast<const uint16_t*>(b)[at + n]) : static_cast<const float*>(b)[at + n];
    }
    return to;
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
  template <int R, bool direct, bool half>
  EP_SHARED void product(int64_t m, Sums<V, R>& sums_out) const {
    const void* b = direct ? job.b : panel;
    const int64_t step = direct ? job.b_step : kOutputs<V>;
    Sums<V, R> sums;
    copy<V, R>(sums_out, sums);
    const float* t = job.t + m * job.rank + c0;
    for (int64_t s = 0, at = 0; s < spans; s++) {
      if (direct) at = span[s].from * step;
#pragma GCC unroll 2
      for (const float* end = t + span[s].to - span[s].from; t < end; t++, at += step) {
        if (direct) fetch_next<half>(b, at);
        typename V::F b_r[kVectors<V>];
        for (int v = 0; v < kVectors<V>; v++) b_r[v] = load_any<V>(b, half, at + v * V::lanes);
        for (int i = 0; i < R; i++) {
          const typename V::F t_r = V::set1(t[i * job.rank]);
          for (int v = 0; v < kVectors<V>; v++) sums[i][v] = V::fma(b_r[v], t_r, sums[i][v]);
        }
      }
    }
    copy<V, R>(sums, sums_out);
  }
};
