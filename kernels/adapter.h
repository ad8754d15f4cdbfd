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
  int64_t r0 = 0, ranks = 0;  // together: the panel
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
  EP_INLINE void add(int64_t m, Sums<V, R>& sums) const {
    if (!job.alone && alike(m, R)) return together<R>(m, sums);
    for (int i = 0; i < R; i++) {
      auto& one = reinterpret_cast<Sums<V, 1>&>(sums[i]);
      if (job.alone) alone(m + i, one);
      else together<1>(m + i, one);
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
  // Whether some rows of x have the same live blocks in this panel.
  bool alike(int64_t m, int rows) const {
    constexpr int words = kRankPanel / kRankBlock / 8;
    uint64_t first[words], other[words], differ = 0;
    if (job.live) __builtin_memcpy(first, live_of(m) + r0 / kRankBlock, sizeof(first));
    for (int i = 1; job.live && i < rows; i++) {
      __builtin_memcpy(other, live_of(m + i) + r0 / kRankBlock, sizeof(other));
      for (int w = 0; w < words; w++) differ |= first[w] ^ other[w];
    }
    return !differ;
  }
  // Rows past the last column repeat it: they are computed, and not stored.
  template <bool half>
  void turn(int64_t first) {
    r0 = first;
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
  EP_INLINE void block(const float* t, int64_t from, Sums<V, R>& sums) const {
    const int64_t to = ranks - from < kRankBlock ? ranks : from + kRankBlock;
    for (int64_t r = from; r < to; r++)
      for (int i = 0; i < R; i++) {
        const typename V::F t_r = V::set1(t[i * job.t_stride + r]);
        for (int v = 0; v < kVectors<V>; v++)
          sums[i][v] = V::fma(V::load(panel + r * kOutputs<V> + v * V::lanes), t_r, sums[i][v]);
      }
  }
  template <int R>
  EP_SHARED void together(int64_t m, Sums<V, R>& sums_out) const {
    const float* t = job.t + m * job.t_stride + r0;
    const uint8_t* live = live_of(m);
    Sums<V, R> sums;
    __builtin_memcpy(&sums, &sums_out, sizeof(sums));
    for (int64_t from = 0; !live && from < ranks; from += kRankBlock) block<R>(t, from, sums);
    for (int64_t from = 0; live && from < ranks; from += 8 * kRankBlock) {
      uint64_t marks;  // a byte for each block, 0 or 1: no time is lost on those that are not live
      __builtin_memcpy(&marks, live + (r0 + from) / kRankBlock, sizeof(marks));
      for (; marks; marks &= marks - 1) block<R>(t, from + __builtin_ctzll(marks) / 8 * kRankBlock, sums);
    }
    __builtin_memcpy(&sums_out, &sums, sizeof(sums));
  }
};
