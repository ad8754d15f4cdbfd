// Attention over padded keys for every SIMD shape, and the squares of scores that cached_attention.h takes too. Included
// by functions_simd.h, whose Power and vocabulary V they take.
//
// Queries and keys go by in squares of kSquare. The keys of a square are turned once, so that a vector holds the scores of
// one query and several keys; kTogether queries share each load. A row keeps its largest score and the sum of its
// e^(score - largest); y is weighted anew whenever a later square has a larger score, and divided by the sum at the end.
// No scratch grows with the text.
#pragma once

template <class V>
struct Power;

constexpr int kSquare = 64;           // a multiple of all lanes
constexpr int kTogether = 4;
template <class V>
constexpr int kWide = V::lanes == 8 ? 2 : 4;  // vectors of a row whose sums stay in registers

template <class V>
struct Square {
  using F = typename V::F;
  const int64_t columns;
  const float scale;
  alignas(64) float turned[kHeadColumns * kSquare];  // [columns,kSquare]: keys
  alignas(64) float hidden[kSquare];                 // what is added to each key's scores
  alignas(64) float weights[kTogether * kSquare];    // [queries,kSquare]
  float top[kSquare], total[kSquare];                // of each query

  Square(int64_t all_columns, float factor) : columns(all_columns), scale(factor) {}

  static int at_most(int64_t left, int64_t most) { return static_cast<int>(left < most ? left : most); }
  int64_t whole() const { return columns / V::lanes * V::lanes; }

  void start(int r, float* y) {
    top[r] = -__builtin_inff();
    total[r] = 0.0f;
    for (int64_t c = 0; c < columns; c++) y[c] = 0.0f;
  }
  void finish(int r, float* y) const {
    for (int64_t c = 0; c < columns; c++) y[c] /= total[r];
  }
  void turn(const float* k, int64_t stride, int keys) {
    for (int j0 = 0; j0 < keys; j0 += V::lanes) {
      for (int64_t c = 0; c < whole() && j0 + V::lanes <= keys; c += V::lanes) {
        F turn[V::lanes];
        for (int i = 0; i < V::lanes; i++) turn[i] = V::load(k + (j0 + i) * stride + c);
        V::transpose(turn);
        for (int i = 0; i < V::lanes; i++) V::store(turned + (c + i) * kSquare + j0, turn[i]);
      }
      for (int64_t c = j0 + V::lanes <= keys ? whole() : 0; c < columns; c++)
        for (int j = j0; j < j0 + V::lanes; j++) turned[c * kSquare + j] = j < keys ? k[j * stride + c] : 0.0f;
    }
  }
  // Of the turned keys up to `keys`, and what is left of two vectors.
  template <int R>
  EP_INLINE void scores(const float* const (&q)[R], int keys) {
    int j = 0;
    for (; j + (kWide<V> - 1) * V::lanes < keys; j += kWide<V> * V::lanes) scores_of<R, kWide<V>>(q, j);
    for (; j < keys; j += 2 * V::lanes) scores_of<R, 2>(q, j);
  }
  template <int R, int C>
  EP_INLINE void scores_of(const float* const (&q)[R], int j) {
    F sums[R][C];
    for (int r = 0; r < R; r++)
      for (int i = 0; i < C; i++) sums[r][i] = V::set1(0.0f);
    for (int64_t c = 0; c < columns; c++) {
      F keys[C];
      for (int i = 0; i < C; i++) keys[i] = V::load(turned + c * kSquare + j + i * V::lanes);
      for (int r = 0; r < R; r++) {
        const F q_rc = V::set1(q[r][c]);
        for (int i = 0; i < C; i++) sums[r][i] = V::fma(keys[i], q_rc, sums[r][i]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int i = 0; i < C; i++)
        V::store(weights + r * kSquare + j + i * V::lanes, V::fma(sums[r][i], V::set1(scale), V::load(hidden + j + i * V::lanes)));
  }
  // Turns the scores of a row into weights, -Inf behind the last key in whole vectors; returns what y, as it is so far, is
  // to be multiplied by. One of them is not hidden.
  float weigh(float* row, int keys, int r) {
    F most = V::load(row);
    for (int j = V::lanes; j < keys; j += V::lanes) most = V::max(most, V::load(row + j));
    const float before = top[r], now = V::top(most), high = now > before ? now : before;
    F sum = V::set1(0.0f);
    for (int j = 0; j < keys; j += V::lanes) {
      const F weight = exponential(V::sub(V::load(row + j), V::set1(high)));
      V::store(row + j, weight);
      sum = V::add(sum, weight);
    }
    top[r] = high;
    if (high == before) return total[r] += V::sum(sum), 1.0f;
    float factor[V::lanes];
    V::store(factor, exponential(V::set1(before - high)));
    total[r] = total[r] * factor[0] + V::sum(sum);
    return factor[0];
  }
  // e^t for t <= 0; 0 below -88, so that what is hidden weighs nothing. max returns its second where that is NaN.
  static EP_INLINE F exponential(F t) {
    const Power<V> e(V::max(V::set1(-88.1f), t), V::set1(0.0f));
    return V::mul(e.p, V::power(e.n));
  }
  // y = y . before + weights . v, in C vectors.
  template <int R, int C>
  EP_INLINE void mix(const float* v, int64_t stride, int keys, const float (&before)[R], float* const (&y)[R], int64_t at) {
    F sums[R][C];
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) sums[r][c] = V::mul(V::load(y[r] + at + c * V::lanes), V::set1(before[r]));
    for (int j = 0; j < keys; j++)
      for (int c = 0; c < C; c++) {
        const F v_jc = V::load(v + j * stride + c * V::lanes);
        for (int r = 0; r < R; r++) sums[r][c] = V::fma(v_jc, V::set1(weights[r * kSquare + j]), sums[r][c]);
      }
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) V::store(y[r] + at + c * V::lanes, sums[r][c]);
  }
  template <int R>
  EP_INLINE void mix_whole(const float* v, int64_t stride, int keys, const float (&before)[R], float* const (&y)[R]) {
    int64_t c = 0;
    for (; c + kWide<V> * V::lanes <= columns; c += kWide<V> * V::lanes) mix<R, kWide<V>>(v + c, stride, keys, before, y, c);
    for (; c < whole(); c += V::lanes) mix<R, 1>(v + c, stride, keys, before, y, c);
  }
};

template <class V>
struct Attention : Square<V> {
  using Square<V>::columns, Square<V>::hidden, Square<V>::weights, Square<V>::at_most, Square<V>::whole;
  const FunctionJob& job;
  const int64_t stride;                              // from a token to the next
  alignas(64) float rest[kSquare * V::lanes];        // [keys,lanes]: the columns of v that whole vectors leave over

  explicit Attention(const FunctionJob& j)
      : Square<V>(j.columns, 1.0f / __builtin_sqrtf(static_cast<float>(j.columns))), job(j), stride(j.heads * j.columns) {}

  void head(const float* q, const float* k, const float* v, const int64_t* mask, float* y) {
    for (int64_t i = 0; i < job.queries; i += kSquare) {
      const int queries = at_most(job.queries - i, kSquare);
      for (int r = 0; r < queries; r++) this->start(r, y + (i + r) * stride);
      for (int64_t j = 0; j < job.keys; j += kSquare) {
        const int keys = at_most(job.keys - j, kSquare);
        take(k + j * stride, v + j * stride, mask + j, keys);
        square(q + i * stride, v + j * stride, y + i * stride, queries, keys);
      }
      for (int r = 0; r < queries; r++) this->finish(r, y + (i + r) * stride);
    }
  }

 private:
  void take(const float* k, const float* v, const int64_t* mask, int keys) {
    for (int j = 0; j < kSquare; j++) hidden[j] = j >= keys ? -__builtin_inff() : mask[j] ? 0.0f : kHidden;
    this->turn(k, stride, keys);
    for (int j = 0; whole() < columns && j < keys; j++)
      for (int64_t c = 0; c < V::lanes; c++) rest[j * V::lanes + c] = whole() + c < columns ? v[j * stride + whole() + c] : 0.0f;
  }
  void square(const float* q, const float* v, float* y, int queries, int keys) {
    int r = 0;
    for (; r + kTogether <= queries; r += kTogether) rows<kTogether>(q + r * stride, v, y + r * stride, keys, r);
    for (; r < queries; r++) rows<1>(q + r * stride, v, y + r * stride, keys, r);
  }
  template <int R>
  void rows(const float* q, const float* v, float* y, int keys, int first) {
    const float* q_rows[R];
    float *y_rows[R], before[R];
    for (int r = 0; r < R; r++) q_rows[r] = q + r * stride, y_rows[r] = y + r * stride;
    this->template scores<R>(q_rows, keys);  // past the last key they are -Inf
    for (int r = 0; r < R; r++) before[r] = this->weigh(weights + r * kSquare, keys, first + r);
    this->template mix_whole<R>(v, stride, keys, before, y_rows);
    if (whole() == columns) return;
    float line[R * V::lanes] = {}, *lines[R];
    for (int r = 0; r < R; r++) {
      lines[r] = line + r * V::lanes;
      for (int64_t c = whole(); c < columns; c++) lines[r][c - whole()] = y_rows[r][c];
    }
    this->template mix<R, 1>(rest, V::lanes, keys, before, lines, 0);
    for (int r = 0; r < R; r++)
      for (int64_t c = whole(); c < columns; c++) y_rows[r][c] = lines[r][c - whole()];
  }
};

template <class V>
void attention_of(const FunctionJob& job) {
  Attention<V> one(job);
  for (int64_t row = job.first; row < job.first + job.rows; row++) {
    const int64_t text = row / job.heads, column = row % job.heads * job.columns;
    const int64_t queries = text * job.queries * one.stride + column, keys = text * job.keys * one.stride + column;
    one.head(job.q + queries, job.k + keys, job.v + keys, job.mask + text * job.keys, job.y + queries);
  }
}
