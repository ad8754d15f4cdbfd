// The functions of functions.h, once for every SIMD shape. Include it after tile.h, whose vocabulary V it takes, with
//   sub div min max round(F): to even   F;   top(F) -> float: the largest, any where one is NaN
//   power(F n) -> 2^n for whole n in -126..127, and 0 for -127
//
// Both activations are v / (1 + e^t). e^t = 2^n p(r), with n = round(t / ln 2), |r| <= ln(2)/2 and p a polynomial that
// is off by 3e-9; above t = 0 both sides of the quotient are scaled by 2^(-n/2), so nothing overflows, results underflow
// where they must, and at n = 254 the scale is 0: finite / 1 becomes 0, and -Inf NaN. In gelu t is known to two floats,
// since an error of t in its last place is one of |t| places of e^t. Errors: 4 units of 2^-24 of y.
//
// gelu: of a = |x| the tail 1 - P(a) is e^(-a^2/2) h(u) / (a + 2.5), u = 1 - 5 / (a + 2.5), h a polynomial that is off by
// 2e-8. It is a factor of its own where x < 0, so that small values are as exact as large ones: 7 units of 2^-24 of y.
#pragma once
#include "attention.h"
#include "cached_attention.h"

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.6931472f, kLn2Rest = -1.9046542e-09f;              // ln 2 in two floats
constexpr float kGeluA = 1.5957692f, kGeluARest = -4.534068e-08f;           // 2 sqrt(2/pi)
constexpr float kGeluB = 0.071354814f, kGeluBRest = 2.3988325e-09f;         // 2 sqrt(2/pi) * 0.044715
constexpr float kGeluEnd = 13.5f;                                           // beyond it e^t is past float's range
constexpr float kExp[] = {0.0013814467f, 0.008368781f, 0.041668393f, 0.1666652f, 0.49999994f, 1.0f, 1.0f};

// e^(t + rest) = p 2^n, |rest| far below 1.
template <class V>
struct Power {
  typename V::F p, n;
  EP_INLINE Power(typename V::F t, typename V::F rest) {
    using F = typename V::F;
    n = V::round(V::mul(t, V::set1(kLog2E)));
    const F r = V::add(V::fma(n, V::set1(-kLn2Rest), V::fma(n, V::set1(-kLn2), t)), rest);
    p = V::set1(kExp[0]);
    for (int i = 1; i < 7; i++) p = V::fma(p, r, V::set1(kExp[i]));
  }
};

// v / (1 + e^(t + rest)).
template <class V>
EP_INLINE typename V::F logistic(typename V::F v, typename V::F t, typename V::F rest) {
  using F = typename V::F;
  const Power<V> e(V::max(V::min(t, V::set1(176.1f)), V::set1(-87.0f)), rest);
  const F half = V::round(V::mul(V::max(e.n, V::set1(0.0f)), V::set1(0.5f)));
  const F scale = V::power(V::sub(V::set1(0.0f), half));
  return V::div(V::mul(v, scale), V::fma(e.p, V::power(V::sub(e.n, half)), scale));
}

template <class V>
struct Silu {
  static EP_INLINE typename V::F act(typename V::F v) {
    const typename V::F zero = V::set1(0.0f);
    return logistic<V>(v, V::sub(zero, v), zero);
  }
};

// t = -v (A + B v^2): each product and sum beside what its rounding lost.
template <class V>
struct GeluTanh {
  static EP_INLINE typename V::F act(typename V::F v) {
    using F = typename V::F;
    const F zero = V::set1(0.0f), a = V::set1(kGeluA), b = V::set1(kGeluB);
    const F x = V::max(V::min(v, V::set1(kGeluEnd)), V::set1(-kGeluEnd));
    const F square = V::mul(x, x), square_rest = V::fma(x, x, V::sub(zero, square));
    const F cubic = V::mul(b, square), cubic_rest = V::fma(b, square, V::sub(zero, cubic));
    const F sum = V::add(a, cubic), added = V::sub(sum, a);
    const F sum_rest = V::add(V::sub(a, V::sub(sum, added)), V::sub(cubic, added));
    const F small = V::fma(b, square_rest, V::fma(V::set1(kGeluBRest), square, V::set1(kGeluARest)));
    const F rest = V::add(V::add(sum_rest, cubic_rest), small), t = V::mul(V::sub(zero, x), sum);
    return logistic<V>(v, t, V::sub(V::fma(V::sub(zero, x), sum, V::sub(zero, t)), V::mul(x, rest)));
  }
};

constexpr float kTailShift = 2.5f, kTailEnd = 18.78f;  // beyond it e^(-a^2/2) is 0
constexpr float kTail[] = {-0.00015910016f, -0.00031399206f, 0.0006847604f, 0.0025260118f, -0.0016004707f,
                           -0.016386744f,   0.0092357565f,   0.13198702f,   -0.433692f,    0.70665663f};

// max and min have the constant first: it is the second that they return where one is NaN.
template <class V>
EP_INLINE typename V::F gelu_of(typename V::F x) {
  using F = typename V::F;
  const F zero = V::set1(0.0f), a = V::min(V::max(x, V::sub(zero, x)), V::set1(kTailEnd)), minus_half = V::set1(-0.5f);
  const F over = V::div(V::set1(1.0f), V::add(a, V::set1(kTailShift))), u = V::fma(over, V::set1(-2 * kTailShift), V::set1(1.0f));
  F tail = V::set1(kTail[0]);
  for (int i = 1; i < 10; i++) tail = V::fma(tail, u, V::set1(kTail[i]));
  const F square = V::mul(a, a), rest = V::fma(a, a, V::sub(zero, square));
  const Power<V> e(V::mul(square, minus_half), V::mul(rest, minus_half));
  const F half = V::round(V::mul(e.n, V::set1(0.5f))), other_half = V::power(V::sub(e.n, half));
  tail = V::mul(V::mul(V::mul(tail, over), e.p), V::power(half));
  const F below = V::mul(V::mul(V::min(zero, x), tail), other_half);
  return V::add(below, V::mul(V::max(zero, x), V::sub(V::set1(1.0f), V::mul(tail, other_half))));
}

template <class V>
void gelu_all(const FunctionJob& job) {
  const int64_t n = job.rows * job.columns, whole = n / V::lanes * V::lanes;
  for (int64_t i = 0; i < whole; i += V::lanes) V::store(job.y + i, gelu_of<V>(V::load(job.x + i)));
  float rest[V::lanes] = {};
  for (int64_t i = whole; i < n; i++) rest[i - whole] = job.x[i];
  if (whole < n) V::store(rest, gelu_of<V>(V::load(rest)));
  for (int64_t i = whole; i < n; i++) job.y[i] = rest[i - whole];
}

template <class V, class Activation>
void gated_of(const FunctionJob& job) {
  const int64_t n = job.rows * job.columns, whole = n / V::lanes * V::lanes;
  for (int64_t i = 0; i < whole; i += V::lanes)
    V::store(job.y + i, V::mul(Activation::act(V::load(job.x + i)), V::load(job.other + i)));
  float gate[V::lanes] = {}, up[V::lanes] = {};
  for (int64_t i = whole; i < n; i++) gate[i - whole] = job.x[i], up[i - whole] = job.other[i];
  if (whole < n) V::store(gate, V::mul(Activation::act(V::load(gate)), V::load(up)));
  for (int64_t i = whole; i < n; i++) job.y[i] = gate[i - whole];
}

// In double, where no square of a float rounds or overflows. Compilers turn the inner loop into vectors.
template <class V, class Term>
EP_INLINE double sum_of(const float* x, int64_t n, Term term) {
  double sums[2 * V::lanes] = {}, sum = 0;
  int64_t i = 0;
  for (; i + 2 * V::lanes <= n; i += 2 * V::lanes)
    for (int c = 0; c < 2 * V::lanes; c++) sums[c] += term(static_cast<double>(x[i + c]));
  for (; i < n; i++) sum += term(static_cast<double>(x[i]));
  for (const double s : sums) sum += s;
  return sum;
}

template <class V>
EP_INLINE void add_rows(const float* x, const float* skip, int64_t n, float* sum) {
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) V::store(sum + i, V::add(V::load(x + i), V::load(skip + i)));
  for (; i < n; i++) sum[i] = x[i] + skip[i];
}

template <class V>
void rms_norm_of(const FunctionJob& job) {
  for (int64_t row = 0; row < job.rows; row++) {
    const int64_t n = job.columns, at = row * n;
    const float* x = job.x + at;
    float* y = job.y + at;
    if (job.other) {
      add_rows<V>(x, job.other + at, n, job.sum + at);
      x = job.sum + at;
    }
    const double mean = sum_of<V>(x, n, [](double v) { return v * v; }) / static_cast<double>(n);
    const float scale = static_cast<float>(1.0 / __builtin_sqrt(mean + static_cast<double>(job.epsilon)));
    int64_t i = 0;
    for (; i + V::lanes <= n; i += V::lanes)
      V::store(y + i, V::mul(V::mul(V::load(x + i), V::set1(scale)), V::load(job.weight + i)));
    for (; i < n; i++) y[i] = x[i] * scale * job.weight[i];
  }
}

// x + skip lies in y until it is replaced. The mean is taken off as two floats: what is left is as exact as x + skip.
template <class V>
void layer_norm_of(const FunctionJob& job) {
  const int64_t n = job.columns;
  for (int64_t at = 0; at < job.rows * n; at += n) {
    float* y = job.y + at;
    add_rows<V>(job.x + at, job.other + at, n, y);
    const double mean = sum_of<V>(y, n, [](double v) { return v; }) / static_cast<double>(n);
    const double spread = sum_of<V>(y, n, [=](double v) { return (v - mean) * (v - mean); }) / static_cast<double>(n);
    const float scale = static_cast<float>(1.0 / __builtin_sqrt(spread + static_cast<double>(job.epsilon)));
    const float high = static_cast<float>(mean), low = static_cast<float>(mean - static_cast<double>(high));
    int64_t i = 0;
    for (; i + V::lanes <= n; i += V::lanes) {
      const typename V::F off = V::sub(V::sub(V::load(y + i), V::set1(high)), V::set1(low));
      V::store(y + i, V::fma(V::mul(off, V::set1(scale)), V::load(job.weight + i), V::load(job.bias + i)));
    }
    for (; i < n; i++) y[i] = (y[i] - high - low) * scale * job.weight[i] + job.bias[i];
  }
}

// One row of a tile. Its lanes are 4 bytes wide and 64 apart.
template <class V, Format F>
void tile_row(const uint8_t* w, const void* w_scale, int n, int64_t k, float* y) {
  constexpr FormatInfo f = info(F);
  const typename V::F minus_zero = V::set1(static_cast<float>(-f.zero));
  for (int64_t u = 0; u < k / kUnit; u++, w += unit_bytes(f), y += kUnit) {
    uint8_t bytes[4 * f.bits];
    for (int j = 0; j < f.bits; j++) __builtin_memcpy(bytes + 4 * j, w + (j * kTileRows + n) * 4, 4);
    int32_t codes[kUnit];
    for (int c = 0; c < 4 * f.bits; c++) {
      codes[c] = f.bits == 8 ? bytes[c] : bytes[c] & 15;
      if (f.bits == 4) codes[c + 16] = bytes[c] >> 4;
    }
    const typename V::F scale = V::set1(scale_at(f, w_scale, n, f.block ? u * kUnit / f.block : 0));
    for (int c = 0; c < kUnit; c += V::lanes) {
      const typename V::I code = V::load_int(codes + c);
      V::store(y + c, V::mul(f.nf4 ? V::nf4(code) : V::add(V::to_float(code), minus_zero), scale));
    }
  }
}

// The same in bfloat16, two in the place of a float.
template <class V, Format F>
void rounded_row(const uint8_t* w, const void* w_scale, int n, int64_t k, float* y) {
  constexpr FormatInfo f = info(F);
  float unit[kUnit];
  for (int64_t u = 0; u < k / kUnit; u++, w += unit_bytes(f)) {
    const int64_t block = f.block ? u * kUnit / f.block : 0;
    tile_row<V, F>(w, static_cast<const char*>(w_scale) + block * kTileRows * (f.half_scale ? 2 : 4), n, kUnit, unit);
    for (int c = 0; c < kUnit; c += 2) *y++ = bits_float(bfloat16_bits(unit[c]) | bfloat16_bits(unit[c + 1]) << 16);
  }
}

// All rows of a tile: units come as [32][16] and are turned, in bfloat16 two columns at a time.
template <class V, Format F, bool rounded>
void whole_tile(const uint8_t* w, const void* w_scale, int, int64_t k, float* y) {
  constexpr FormatInfo f = info(F);
  constexpr int each = rounded ? 2 : 1;  // columns in the place of a float
  alignas(64) float unit[kUnit * kTileRows];
  for (int64_t u = 0; u < k / kUnit; u++, w += unit_bytes(f), y += kUnit / each) {
    dequantize_unit<V, F>(w, w_scale, f.block ? u * kUnit / f.block : 0, unit);
    for (int n0 = 0; n0 < kTileRows; n0 += V::lanes)
      for (int c0 = 0; c0 < kUnit; c0 += each * V::lanes) {
        typename V::F v[V::lanes];
        for (int c = 0; c < V::lanes; c++) {
          const float* at = unit + (c0 + each * c) * kTileRows + n0;
          v[c] = rounded ? V::bfloat16_pair(V::load(at), V::load(at + kTileRows)) : V::load(at);
        }
        V::transpose(v);
        for (int n = 0; n < V::lanes; n++) V::store(y + ((n0 + n) * k + c0) / each, v[n]);
      }
  }
}

EP_INLINE bool are_a_tile(const int64_t* ids, int64_t count) {
  if (count < kTileRows || ids[0] % kTileRows) return false;
  for (int n = 1; n < kTileRows; n++) if (ids[n] != ids[0] + n) return false;
  return true;
}

template <class V>
void packed_embedding_of(const FunctionJob& job) {
  using Decode = decltype(&tile_row<V, Format::i8c>);
#define EP_DECODERS(tag, ...) \
  {{tile_row<V, Format::tag>, whole_tile<V, Format::tag, false>}, {rounded_row<V, Format::tag>, whole_tile<V, Format::tag, true>}},
  static constexpr Decode kDecoders[][2][2] = {EP_FORMATS(EP_DECODERS)};
#undef EP_DECODERS
  const FormatInfo& f = info(job.format);
  const int64_t k = job.columns, stride = job.rounded ? k / 2 : k;
  for (int64_t i = 0, done = 1; i < job.rows; i += done) {
    const bool whole = are_a_tile(job.ids + i, job.rows - i);
    const int64_t tile = job.ids[i] / kTileRows;
    const void* scale = static_cast<const char*>(job.w_scale) + tile * tile_scale_bytes(f, k);
    const Decode decode = kDecoders[static_cast<int>(job.format)][job.rounded][whole];
    decode(job.w + tile * tile_bytes(f, k), scale, static_cast<int>(job.ids[i] % kTileRows), k, job.y + i * stride);
    done = whole ? kTileRows : 1;
  }
}

template <class V, int bits>
void row_embedding_of(const FunctionJob& job) {
  constexpr int block = kEmbeddingBlock, bytes = block * bits / 8;
  const int64_t blocks = job.columns / block;
  const typename V::F minus_zero = V::set1(-static_cast<float>(1 << (bits - 1)));
  float* y = job.y;
  for (int64_t i = 0; i < job.rows; i++) {
    const uint8_t* w = job.w + job.ids[i] * blocks * bytes;
    const uint16_t* scales = static_cast<const uint16_t*>(job.w_scale) + job.ids[i] * blocks;
    for (int64_t b = 0; b < blocks; b++, w += bytes, y += block) {
      int32_t codes[block];
      for (int c = 0; c < block; c++) codes[c] = bits == 8 ? w[c] : w[c / 2] >> c % 2 * 4 & 15;
      const typename V::F scale = V::set1(half_float(scales[b]));
      for (int c = 0; c < block; c += V::lanes)
        V::store(y + c, V::mul(V::add(V::to_float(V::load_int(codes + c)), minus_zero), scale));
    }
  }
}

// What EP_DEFINE_FUNCTION names, for vocabulary V.
#define EP_FUNCTIONS_FROM(V)                                                          \
  void rms_norm(const FunctionJob& job) { rms_norm_of<V>(job); }                      \
  void layer_norm(const FunctionJob& job) { layer_norm_of<V>(job); }                  \
  void gelu(const FunctionJob& job) { gelu_all<V>(job); }                             \
  void gated_silu(const FunctionJob& job) { gated_of<V, Silu<V>>(job); }              \
  void gated_gelu_tanh(const FunctionJob& job) { gated_of<V, GeluTanh<V>>(job); }     \
  void packed_embedding(const FunctionJob& job) { packed_embedding_of<V>(job); }      \
  void row_embedding(const FunctionJob& job) {                                        \
    job.bits == 4 ? row_embedding_of<V, 4>(job) : row_embedding_of<V, 8>(job);        \
  }                                                                                   \
  void attention(const FunctionJob& job) { attention_of<V>(job); }                    \
  void extend_cache(const FunctionJob& job) { extend_cache_of<V>(job); }              \
  void cached_attention(const FunctionJob& job) { cached_attention_of<V>(job); }
