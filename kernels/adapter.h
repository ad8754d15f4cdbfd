// B.t, the adapter's part of a tile, for every SIMD row. Included by tile.h, whose vocabulary V it speaks. The offset of
// the weights, C.sums, is the same product over other matrices.
//
// It goes one of two ways (TileJob::alone):
//   alone     each output of a row of x is a dot product over R, read straight from B; only what R leaves over whole
//             vectors is copied out first. B is read once per row, so this is for few rows, or rows that need little of R.
//   together  up to kRankPanel ranks of B are turned to float [R][outputs], once for all rows.
// Both pass over blocks of ranks that are not live: those of a row are not computed, those of all rows not read.
#pragma once

template <class V>
EP_INLINE bool is_live(const uint8_t* live, int64_t r) {  // V::lanes ranks from r on
  if constexpr (V::lanes > kRankBlock) return !live || live[r / kRankBlock] || live[r / kRankBlock + 1];
  return !live || live[r / kRankBlock];
}

template <class V>
struct Adapter {
  const TileJob& job;
  const int64_t row_bytes;
  int64_t whole = 0;          // alone: ranks in whole vectors
  int64_t r0 = 0, ranks = 0;  // together: the panel,
  int64_t until = 0;          //   the first row after those that were looked at last, which are alike,
  int spans = 0;              //   and what is live of the panel in these
  struct { int64_t from, to; } span[kRankPanel / kRankBlock / 2];
  alignas(64) float panel[kRankPanel * kOutputs<V>];  // together: B^T; alone: what `whole` leaves over, [outputs][lanes]

  explicit Adapter(const TileJob& j) : job(j), row_bytes(j.rank * (j.b_half ? 2 : 4)) {}

  const uint8_t* live_of(int64_t m) const { return job.live ? job.live + m * job.live_stride : nullptr; }
  float element(int64_t n, int64_t r) const {
    if (n >= job.columns || r >= job.rank) return 0;
    const int64_t i = n * job.rank + r;
    return job.b_half ? half_float(static_cast<const uint16_t*>(job.b)[i]) : static_cast<const float*>(job.b)[i];
  }
  EP_SHARED void fill(int64_t first) {
    if (job.alone) fill_rest();
    else if (job.b_half) turn<true>(first);
    else turn<false>(first);
  }
  template <int R>
  EP_INLINE void add(int64_t m, Sums<V, R>& sums) {
    if (job.alone) {
      for (int i = 0; i < R; i++) alone(m + i, reinterpret_cast<Sums<V, 1>&>(sums[i]));
      return;
    }
    if (m >= until) look(m);
    if (m + R <= until) together<R>(m, sums);
    else apart<R>(m, sums);
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

  // ---- alone
  void fill_rest() {
    const char* next = static_cast<const char*>(job.b) + kOutputs<V> * row_bytes;  // wanted by the job after this one
    bool all = true;  // of B is read, by one row or another
    for (int64_t r = 0; job.live && r < job.rank; r += kRankBlock) all &= job.live_any[r / kRankBlock];
    for (int64_t i = 0; all && i < kOutputs<V> * row_bytes && i < kAhead; i += 64) __builtin_prefetch(next + i);
    whole = job.rank / V::lanes * V::lanes;
    for (int n = 0; whole < job.rank && n < kOutputs<V>; n++)
      for (int r = 0; r < V::lanes; r++) panel[n * V::lanes + r] = element(n, whole + r);
  }
  EP_INLINE void alone(int64_t m, Sums<V, 1>& sums) const {
    const bool full = job.columns == kOutputs<V> && whole == job.rank;
    if (job.b_half) full ? dots<true, true>(m, sums) : dots<true, false>(m, sums);
    else full ? dots<false, true>(m, sums) : dots<false, false>(m, sums);
  }
  // full: all columns are there, and whole vectors of ranks. Otherwise columns past the last repeat it: they are computed,
  // and not stored.
  template <bool half, bool full>
  EP_SHARED void dots(int64_t m, Sums<V, 1>& sums) const {
    const float* t = job.t + m * job.t_stride;
    const uint8_t* live = live_of(m);
    const bool rest = !full && whole < job.rank;
    int64_t first = 0;
    while (live && first < whole && !is_live<V>(live, first)) first += V::lanes;
    if (!rest && first >= whole) return;
    const char* at = static_cast<const char*>(job.b);
    for (int v = 0; v < kVectors<V>; v++) {
      const char* row[V::lanes];
      for (int n = 0; n < V::lanes; n++) {
        row[n] = at;
        if (full || v * V::lanes + n + 1 < job.columns) at += row_bytes;
      }
      typename V::F products[V::lanes];
      if (rest) for (int n = 0; n < V::lanes; n++) products[n] = V::mul(V::load(panel + (v * V::lanes + n) * V::lanes), V::load(t + whole));
      else for (int n = 0; n < V::lanes; n++) products[n] = V::mul(load_any<V>(row[n], half, first), V::load(t + first));
      for (int64_t r = rest ? first : first + V::lanes; r < whole; r += V::lanes) {
        if (!is_live<V>(live, r)) continue;
        const typename V::F t_r = V::load(t + r);
        for (int n = 0; n < V::lanes; n++) products[n] = V::fma(load_any<V>(row[n], half, r), t_r, products[n]);
      }
      sums[0][v] = V::add(sums[0][v], V::sum_each(products));
    }
  }

  // ---- together
  // Finds the rows from m on that have the same live blocks in this panel, and what these are.
  EP_SHARED void look(int64_t m) {
    spans = 0;
    until = job.m;
    if (!job.live) {
      span[spans++] = {0, ranks};
      return;
    }
    constexpr int blocks = kRankPanel / kRankBlock;
    const uint8_t* live = live_of(m) + r0 / kRankBlock;
    for (int b = 0; b < blocks; b++) {
      const int64_t from = b * kRankBlock, to = from + kRankBlock < ranks ? from + kRankBlock : ranks;
      if (!live[b]) continue;
      if (b && live[b - 1]) span[spans - 1].to = to;
      else span[spans++] = {from, to};
    }
    until = m + 1;
    while (until < job.m && alike(live, live + (until - m) * job.live_stride, blocks)) until++;
  }
  // Rows past the last column repeat it: they are computed, and not stored.
  template <bool half>
  void turn(int64_t first) {
    r0 = first;
    until = 0;
    ranks = job.rank - first < kRankPanel ? job.rank - first : kRankPanel;
    const int64_t in_vectors = ranks / V::lanes * V::lanes;
    for (int64_t r = 0; r < in_vectors; r += V::lanes) {
      if (!is_live<V>(job.live_any, r0 + r)) continue;
      for (int n0 = 0; n0 < kOutputs<V>; n0 += V::lanes) {
        typename V::F v[V::lanes];
        for (int n = 0; n < V::lanes; n++)
          v[n] = load_any<V>(job.b, half, (n0 + n < job.columns ? n0 + n : job.columns - 1) * job.rank + r0 + r);
        V::transpose(v);
        for (int i = 0; i < V::lanes; i++) V::store(panel + (r + i) * kOutputs<V> + n0, v[i]);
      }
    }
    for (int n = 0; n < kOutputs<V>; n++)
      for (int64_t r = in_vectors; r < ranks; r++) panel[r * kOutputs<V> + n] = element(n, r0 + r);
  }
  template <int R>
  EP_SHARED void together(int64_t m, Sums<V, R>& sums_out) const {
    Sums<V, R> sums;
    copy<V, R>(sums_out, sums);
    for (int s = 0; s < spans; s++) {
      const float *t = job.t + m * job.t_stride + r0 + span[s].from, *end = t + span[s].to - span[s].from;
      for (const float* b = panel + span[s].from * kOutputs<V>; t < end; t++, b += kOutputs<V>)
        for (int i = 0; i < R; i++) {
          const typename V::F t_r = V::set1(t[i * job.t_stride]);
          for (int v = 0; v < kVectors<V>; v++) sums[i][v] = V::fma(V::load(b + v * V::lanes), t_r, sums[i][v]);
        }
    }
    copy<V, R>(sums, sums_out);
  }
};
