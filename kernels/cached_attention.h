// Attention on a cache for every SIMD shape. Included by functions_simd.h, whose logistic it takes, after
// attention.h and its squares.
//
// A block is some tokens of a text, each with all heads that share the same keys: its rows, which are rotated once. They
// pass over the keys that any of them sees, square by square. Where they are few, as those of a single token, the keys are
// read as they lie and each score is a sum along the columns; turning them first would take as long. A single token's
// keys are shared out in parts, and whoever is done last joins what these have come to.
#pragma once

template <class V>
EP_INLINE typename V::F logistic(typename V::F v, typename V::F t, typename V::F rest);

constexpr int kFew = 12;  // rows

// One head of a token, by the angles of its place.
template <class V>
EP_INLINE void rotate(const CachedCall& call, const float* x, int64_t place, float* y) {
  const int64_t half = call.half;
  const float *cosine = call.cosine + place * half, *sine = call.sine + place * half;
  int64_t c = 0;
  for (; c + V::lanes <= half; c += V::lanes) {
    const typename V::F a = V::load(x + c), b = V::load(x + c + half), cos = V::load(cosine + c), sin = V::load(sine + c);
    V::store(y + c, V::sub(V::mul(a, cos), V::mul(b, sin)));
    V::store(y + c + half, V::fma(a, sin, V::mul(b, cos)));
  }
  for (; c < half; c++) y[c] = x[c] * cosine[c] - x[c + half] * sine[c], y[c + half] = x[c + half] * cosine[c] + x[c] * sine[c];
  for (c = 2 * half; c < call.columns; c++) y[c] = x[c];
}

// Brings a head's past to where it now is, unless that is the same memory, and zeros behind its new tokens.
EP_INLINE void carry(const CachedCall& call, const float* past, float* now, int64_t before) {
  if (past == now) return;
  __builtin_memcpy(now, past, static_cast<size_t>(before * call.columns) * 4);
  const int64_t end = before + call.tokens;
  __builtin_memset(now + end * call.columns, 0, static_cast<size_t>((call.capacity - end) * call.columns) * 4);
}

template <class V>
void extend_cache_of(const FunctionJob& job) {
  const CachedCall& call = *job.call;
  const int64_t d = call.columns;
  for (int64_t row = job.first; row < job.first + job.rows; row++) {
    const int64_t text = row / call.kv_heads, head = row % call.kv_heads, before = call.before(text);
    float *key = call.key + row * call.capacity * d, *value = call.value + row * call.capacity * d;
    carry(call, call.past_key + row * call.past_capacity * d, key, before);
    carry(call, call.past_value + row * call.past_capacity * d, value, before);
    for (int64_t t = 0; t < call.tokens; t++) {
      const int64_t from = (text * call.tokens + t) * call.kv_stride + head * d, to = (before + t) * d;
      rotate<V>(call, call.k + from, before + t, key + to);
      __builtin_memcpy(value + to, call.v + from, static_cast<size_t>(d) * 4);
    }
  }
}

template <class V>
struct CachedAttention : Square<V> {
  using typename Square<V>::F;
  using Square<V>::columns, Square<V>::weights, Square<V>::scale;
  const CachedCall& call;
  const int group;
  float* y;                                         // of the block's first token and the group's first head, or the part's
  int64_t places[kSquare];                          // of each row's token
  float* outs[kSquare];                             // of each row
  alignas(64) float q[kSquare * kHeadColumns];      // [rows,columns], rotated

  explicit CachedAttention(const CachedCall& c) : Square<V>(c.columns, c.scale), call(c), group(static_cast<int>(c.group())) {
    for (float& none : this->hidden) none = 0.0f;
  }

  void block(int64_t text, int64_t kv_head, int64_t first) {
    const int tokens = this->at_most(call.tokens - first, call.together());
    y = y_of(text, kv_head, first);
    attend(text, kv_head, first, tokens, 0, call.capacity);
    for (int r = 0; r < tokens * group; r++) this->finish(r, outs[r]);
  }
  void part(int64_t text, int64_t kv_head, int64_t number) {
    const int64_t head = text * call.kv_heads + kv_head, floats = group * (columns + 2);
    float* all = call.shares + head * call.parts() * floats;  // a part: y of each row, their top, their total
    y = all + number * floats;
    attend(text, kv_head, 0, 1, number * call.part_keys(), (number + 1) * call.part_keys());
    for (int r = 0; r < group; r++) y[group * columns + r] = this->top[r], y[group * (columns + 1) + r] = this->total[r];
    if (__atomic_sub_fetch(call.left + head, 1, __ATOMIC_ACQ_REL)) return;
    y = y_of(text, kv_head, 0);
    for (int r = 0; r < group; r++) join(all + r * columns, all + group * columns + r, floats, y + r * columns);
  }

 private:
  float* y_of(int64_t text, int64_t kv_head, int64_t token) const {
    return call.y + ((text * call.tokens + token) * call.heads + kv_head * group) * columns;
  }
  // Rows of some tokens over those of the keys from .. to that they see.
  void attend(int64_t text, int64_t kv_head, int64_t first, int tokens, int64_t from, int64_t to) {
    const int rows = tokens * group;
    const int64_t place = call.before(text) + first;
    for (int r = 0; r < rows; r++) {
      const int64_t token = r / group, head = r % group;
      const float* from_q = call.q + (text * call.tokens + first + token) * call.q_stride + (kv_head * group + head) * columns;
      places[r] = place + token;
      outs[r] = y + (token * call.heads + head) * columns;
      rotate<V>(call, from_q, places[r], q + r * columns);
      this->start(r, outs[r]);
    }
    const int64_t seen = place + tokens, hidden = place < call.window ? 0 : place + 1 - call.window;
    const int64_t end = seen < to ? seen : to, cache = (text * call.kv_heads + kv_head) * call.capacity * columns;
    for (int64_t j = hidden > from ? hidden : from; j < end; j += kSquare)
      square(j, this->at_most(end - j, kSquare), call.key + cache + j * columns, call.value + cache + j * columns, rows);
  }
  // One row of the parts, whose y, top and (behind all tops) total stand there and every `floats` on.
  void join(const float* shares, const float* tops, int64_t floats, float* out) const {
    float high = tops[0], total = 0, factors[V::lanes];
    for (int64_t p = 1; p < call.parts(); p++) high = tops[p * floats] > high ? tops[p * floats] : high;
    for (int64_t c = 0; c < columns; c++) out[c] = 0.0f;
    for (int64_t p = 0; p < call.parts(); p++) {
      V::store(factors, this->exponential(V::set1(tops[p * floats] - high)));
      total += factors[0] * tops[p * floats + group];
      for (int64_t c = 0; c < columns; c += V::lanes)
        V::store(out + c, V::fma(V::load(shares + p * floats + c), V::set1(factors[0]), V::load(out + c)));
    }
    for (int64_t c = 0; c < columns; c++) out[c] /= total;
  }
  void square(int64_t j, int keys, const float* k, const float* v, int rows) {
    const bool few = rows <= kFew;
    if (!few) this->turn(k, columns, keys);
    for (int r = 0; r < rows; r += kTogether) {
      const int seen = this->at_most(places[r + 3 < rows ? r + 3 : rows - 1] + 1 - j, keys);  // by any of them
      if (seen <= 0) continue;
      switch (rows - r) {
        case 1: one<1>(r, j, seen, k, v, few); break;
        case 2: one<2>(r, j, seen, k, v, few); break;
        case 3: one<3>(r, j, seen, k, v, few); break;
        default: one<4>(r, j, seen, k, v, few);
      }
    }
  }
  template <int R>
  void one(int first, int64_t j, int seen, const float* k, const float* v, bool few) {
    const float* q_rows[R];
    float *y_rows[R], before[R];
    for (int r = 0; r < R; r++) q_rows[r] = q + (first + r) * columns, y_rows[r] = outs[first + r];
    if (few) dots<R>(q_rows, k, seen);
    else this->template scores<R>(q_rows, seen);
    for (int r = 0; r < R; r++) {
      const int64_t own = places[first + r] - j;  // key of this square
      const int from = own < call.window ? 0 : static_cast<int>(own + 1 - call.window);
      before[r] = visible(weights + r * kSquare, from, this->at_most(own + 1, seen), seen, first + r);
    }
    this->template mix_whole<R>(v, columns, seen, before, y_rows);
  }
  // Turns the scores of keys from .. to into weights, and those of others up to `seen` into 0.
  EP_INLINE float visible(float* row, int from, int to, int seen, int r) {
    if (from >= to) {
      for (int j = 0; j < seen; j++) row[j] = 0.0f;
      return 1.0f;
    }
    if (call.softcap != 0) cap(row, to);
    for (int j = 0; j < from; j++) row[j] = -__builtin_inff();
    for (int j = to; j < seen || j % V::lanes; j++) row[j] = -__builtin_inff();
    return this->weigh(row, seen, r);
  }
  void cap(float* row, int keys) const {
    for (int j = 0; j < keys; j += V::lanes) {
      const F twice = V::mul(V::load(row + j), V::set1(2 / call.softcap));
      const F below = logistic<V>(V::set1(2 * call.softcap), twice, V::set1(0.0f));  // softcap (1 - tanh)
      const F broken = V::mul(twice, V::set1(0.0f));  // NaN where the score is none
      V::store(row + j, V::add(V::sub(V::set1(call.softcap), below), broken));
    }
  }
  // ---- scores of keys as they lie
  template <int R>
  EP_INLINE void dots(const float* const (&q_rows)[R], const float* k, int keys) {
    constexpr int A = V::lanes == 4 ? R : 1;  // rows at once, as sums fit registers
    for (int r = 0; r < R; r += A) {
      int j = 0;
      for (; j + V::lanes <= keys; j += V::lanes) dots_of<A>(q_rows + r, k + j * columns, weights + r * kSquare + j);
      if (j == keys) continue;
      if (keys > V::lanes) dots_of<A>(q_rows + r, k + (keys - V::lanes) * columns, weights + r * kSquare + keys - V::lanes);
      for (; keys < V::lanes && j < keys; j++)
        for (int a = 0; a < A; a++) weights[(r + a) * kSquare + j] = dot(q_rows[r + a], k + j * columns);
    }
  }
  template <int A>
  EP_INLINE void dots_of(const float* const* q_rows, const float* k, float* out) {
    F sums[A][V::lanes];
    for (int a = 0; a < A; a++)
      for (int i = 0; i < V::lanes; i++) sums[a][i] = V::set1(0.0f);
    for (int64_t c = 0; c < columns; c += V::lanes) {
      F q_c[A];
      for (int a = 0; a < A; a++) q_c[a] = V::load(q_rows[a] + c);
      for (int i = 0; i < V::lanes; i++) {
        const F k_ic = V::load(k + i * columns + c);
        for (int a = 0; a < A; a++) sums[a][i] = V::fma(k_ic, q_c[a], sums[a][i]);
      }
    }
    for (int a = 0; a < A; a++) V::store(out + a * kSquare, V::mul(V::sum_each(sums[a]), V::set1(scale)));
  }
  EP_INLINE float dot(const float* a, const float* b) const {
    F sum = V::set1(0.0f);
    for (int64_t c = 0; c < columns; c += V::lanes) sum = V::fma(V::load(a + c), V::load(b + c), sum);
    return V::sum(sum) * scale;
  }
};

template <class V>
void cached_attention_of(const FunctionJob& job) {
  const CachedCall& call = *job.call;
  CachedAttention<V> one(call);
  const int64_t blocks = call.blocks(), parts = call.parts();
  for (int64_t row = job.first; row < job.first + job.rows; row++) {
    const int64_t head = row / (blocks * parts), text = head / call.kv_heads, kv_head = head % call.kv_heads;
    if (parts > 1) one.part(text, kv_head, row % parts);
    else one.block(text, kv_head, (blocks - 1 - row % blocks) * call.together());
  }
}
