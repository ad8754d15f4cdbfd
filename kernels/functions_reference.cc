// The plain-loop row of every small function: what the SIMD rows are proved against, and what runs where no other can.
// In double throughout, but for what the functions themselves hold in float: x + skip, act(gate), y.
#include "functions.h"

namespace {

constexpr double kInfinity = __builtin_huge_val();

double two_to(int64_t n) {
  const uint64_t bits = static_cast<uint64_t>(n + 1023) << 52;
  double v;
  __builtin_memcpy(&v, &bits, 8);
  return v;
}

// e^v by its series, once powers of two are taken out.
double exponential(double v) {
  if (!(v < 709)) return v >= 709 ? kInfinity : v;
  if (v < -709) return 0;
  const int64_t n = static_cast<int64_t>(v * 1.4426950408889634 + (v < 0 ? -0.5 : 0.5));
  const double r = (v - static_cast<double>(n) * 0x1.62e42fefa38p-1) - static_cast<double>(n) * 0x1.ef35793c7673p-45;
  double term = 1, sum = 1;
  for (int i = 1; i < 16; i++) sum += term *= r / i;
  return sum * two_to(n);
}

double silu(double v) { return v / (1 + exponential(-v)); }
double gelu_tanh(double v) { return v / (1 + exponential(-1.5957691216057308 * (v + 0.044715 * v * v * v))); }

// By its series, and by its continued fraction where that has converged.
double erfc(double z) {
  if (z < 0) return 2 - erfc(-z);
  double term = z, sum = z, fraction = z;
  for (int i = 1; z < 2 && i < 60; i++) term *= -z * z / i, sum += term / (2 * i + 1);
  for (int i = 80; !(z < 2) && i > 0; i--) fraction = z + i / 2.0 / fraction;
  const double root_pi = 1.7724538509055160;
  return z < 2 ? 1 - 2 / root_pi * sum : exponential(-z * z) / (root_pi * fraction);
}

void gelu(const FunctionJob& job) {
  for (int64_t i = 0; i < job.rows * job.columns; i++) {
    const double v = static_cast<double>(job.x[i]);
    job.y[i] = static_cast<float>(v * erfc(-v / 1.4142135623730951) / 2);
  }
}

template <double (*act)(double)>
void gated(const FunctionJob& job) {
  for (int64_t i = 0; i < job.rows * job.columns; i++)
    job.y[i] = static_cast<float>(act(static_cast<double>(job.x[i]))) * job.other[i];
}
void gated_silu(const FunctionJob& job) { gated<silu>(job); }
void gated_gelu_tanh(const FunctionJob& job) { gated<gelu_tanh>(job); }

void rms_norm(const FunctionJob& job) {
  for (int64_t row = 0; row < job.rows; row++) {
    const int64_t at = row * job.columns;
    const float* s = job.x + at;
    if (job.other) {
      for (int64_t i = at; i < at + job.columns; i++) job.sum[i] = job.x[i] + job.other[i];
      s = job.sum + at;
    }
    double sum = 0;
    for (int64_t i = 0; i < job.columns; i++) sum += static_cast<double>(s[i]) * static_cast<double>(s[i]);
    const double root = __builtin_sqrt(sum / static_cast<double>(job.columns) + static_cast<double>(job.epsilon));
    for (int64_t i = 0; i < job.columns; i++)
      job.y[at + i] = static_cast<float>(static_cast<double>(s[i]) / root * static_cast<double>(job.weight[i]));
  }
}

void layer_norm(const FunctionJob& job) {
  for (int64_t at = 0; at < job.rows * job.columns; at += job.columns) {
    float* y = job.y + at;
    double mean = 0, sum = 0;
    for (int64_t i = 0; i < job.columns; i++) mean += static_cast<double>(y[i] = job.x[at + i] + job.other[at + i]);
    mean /= static_cast<double>(job.columns);
    for (int64_t i = 0; i < job.columns; i++) sum += (static_cast<double>(y[i]) - mean) * (static_cast<double>(y[i]) - mean);
    const double root = __builtin_sqrt(sum / static_cast<double>(job.columns) + static_cast<double>(job.epsilon));
    for (int64_t i = 0; i < job.columns; i++)
      y[i] = static_cast<float>((static_cast<double>(y[i]) - mean) / root * static_cast<double>(job.weight[i]) +
                                static_cast<double>(job.bias[i]));
  }
}

void packed_embedding(const FunctionJob& job) {
  const FormatInfo& f = info(job.format);
  const int64_t k = job.columns;
  for (int64_t i = 0; i < job.rows; i++) {
    const int64_t tile = job.ids[i] / kTileRows;
    const uint8_t* w = job.w + tile * tile_bytes(f, k);
    const void* scale = static_cast<const char*>(job.w_scale) + tile * tile_scale_bytes(f, k);
    const int n = static_cast<int>(job.ids[i] % kTileRows);
    for (int64_t c = 0; c < k && !job.rounded; c++) job.y[i * k + c] = value_at(f, w, scale, n, c);
    for (int64_t c = 0; c < k && job.rounded; c += 2) {
      const float even = value_at(f, w, scale, n, c), odd = value_at(f, w, scale, n, c + 1);
      job.y[(i * k + c) / 2] = bits_float(bfloat16_bits(even) | bfloat16_bits(odd) << 16);
    }
  }
}

void row_embedding(const FunctionJob& job) {
  const int64_t k = job.columns;
  const uint16_t* scales = static_cast<const uint16_t*>(job.w_scale);
  for (int64_t i = 0; i < job.rows; i++)
    for (int64_t c = 0, at = job.ids[i] * k; c < k; c++) {
      const int code = job.bits == 8 ? job.w[at + c] : job.w[(at + c) / 2] >> c % 2 * 4 & 15;
      job.y[i * k + c] = static_cast<float>(code - (1 << (job.bits - 1))) * half_float(scales[(at + c) / kEmbeddingBlock]);
    }
}

// A row of y; its scores are computed twice, the first time for the largest.
void attend(const FunctionJob& job, const float* q, const float* k, const float* v, const int64_t* mask, float* y) {
  const int64_t stride = job.heads * job.columns;
  const auto score = [&](int64_t j) {
    double dot = 0;
    for (int64_t c = 0; c < job.columns; c++) dot += static_cast<double>(q[c]) * static_cast<double>(k[j * stride + c]);
    return dot / __builtin_sqrt(static_cast<double>(job.columns)) + (mask[j] ? 0.0 : static_cast<double>(kHidden));
  };
  double top = -kInfinity, total = 0, sums[kHeadColumns] = {};
  for (int64_t j = 0; j < job.keys; j++) top = score(j) > top ? score(j) : top;
  for (int64_t j = 0; j < job.keys; j++) {
    const double weight = exponential(score(j) - top);
    total += weight;
    for (int64_t c = 0; c < job.columns; c++) sums[c] += weight * static_cast<double>(v[j * stride + c]);
  }
  for (int64_t c = 0; c < job.columns; c++) y[c] = static_cast<float>(sums[c] / total);
}

void attention(const FunctionJob& job) {
  const int64_t stride = job.heads * job.columns;
  for (int64_t row = job.first; row < job.first + job.rows; row++) {
    const int64_t text = row / job.heads, column = row % job.heads * job.columns;
    const int64_t keys = text * job.keys * stride + column;
    for (int64_t i = 0; i < job.queries; i++) {
      const int64_t at = (text * job.queries + i) * stride + column;
      attend(job, job.q + at, job.k + keys, job.v + keys, job.mask + text * job.keys, job.y + at);
    }
  }
}

void rotate(const CachedCall& call, const float* x, int64_t place, float* y) {
  const int64_t half = call.half;
  const float *cosine = call.cosine + place * half, *sine = call.sine + place * half;
  for (int64_t c = 0; c < call.columns; c++) {
    if (c >= 2 * half) {
      y[c] = x[c];
      continue;
    }
    const double cos = static_cast<double>(cosine[c % half]), sin = static_cast<double>(sine[c % half]);
    const double other = static_cast<double>(c < half ? -x[c + half] : x[c - half]);
    y[c] = static_cast<float>(static_cast<double>(x[c]) * cos + other * sin);
  }
}

void extend_cache(const FunctionJob& job) {
  const CachedCall& call = *job.call;
  const int64_t d = call.columns;
  for (int64_t row = job.first; row < job.first + job.rows; row++) {
    const int64_t text = row / call.kv_heads, before = call.before(text), end = before + call.tokens;
    float *key = call.key + row * call.capacity * d, *value = call.value + row * call.capacity * d;
    const float *past_key = call.past_key + row * call.past_capacity * d, *past_value = call.past_value + row * call.past_capacity * d;
    for (int64_t i = 0; i < before * d; i++) key[i] = past_key[i], value[i] = past_value[i];
    for (int64_t t = 0; t < call.tokens; t++) {
      const int64_t from = (text * call.tokens + t) * call.kv_stride + row % call.kv_heads * d, to = (before + t) * d;
      rotate(call, call.k + from, before + t, key + to);
      for (int64_t c = 0; c < d; c++) value[to + c] = call.v[from + c];
    }
    for (int64_t i = end * d; past_key != key && i < call.capacity * d; i++) key[i] = value[i] = 0.0f;
  }
}

// A row of y, as attend's, of keys first .. last.
void attend_cached(const CachedCall& call, const float* q, int64_t first, int64_t last, const float* k, const float* v, float* y) {
  const int64_t d = call.columns;
  const auto score = [&](int64_t j) {
    double dot = 0;
    for (int64_t c = 0; c < d; c++) dot += static_cast<double>(q[c]) * static_cast<double>(k[j * d + c]);
    const double t = dot * static_cast<double>(call.scale), cap = static_cast<double>(call.softcap);
    return cap == 0 ? t : cap * (1 - 2 / (1 + exponential(2 * t / cap)));
  };
  double top = -kInfinity, total = 0, sums[kHeadColumns] = {};
  for (int64_t j = first; j <= last; j++) top = score(j) > top ? score(j) : top;
  for (int64_t j = first; j <= last; j++) {
    const double weight = exponential(score(j) - top);
    total += weight;
    for (int64_t c = 0; c < d; c++) sums[c] += weight * static_cast<double>(v[j * d + c]);
  }
  for (int64_t c = 0; c < d; c++) y[c] = static_cast<float>(sums[c] / total);
}

void cached_attention(const FunctionJob& job) {
  const CachedCall& call = *job.call;
  const int64_t d = call.columns;
  for (int64_t row = job.first; row < job.first + job.rows; row++) {
    if (row % call.parts()) continue;  // the first of a head's parts is all of it here
    const int64_t head = row / call.parts(), block = call.blocks() - 1 - head % call.blocks();
    const int64_t kv_head = head / call.blocks(), text = kv_head / call.kv_heads;
    const int64_t cache = kv_head * call.capacity * d, first = block * call.together();
    for (int64_t t = first; t < call.tokens && t < first + call.together(); t++)
      for (int64_t g = 0; g < call.group(); g++) {
        const int64_t token = text * call.tokens + t, head = kv_head % call.kv_heads * call.group() + g, place = call.before(text) + t;
        float q[kHeadColumns];
        rotate(call, call.q + token * call.q_stride + head * d, place, q);
        const int64_t seen = place < call.window ? 0 : place + 1 - call.window;
        attend_cached(call, q, seen, place, call.key + cache, call.value + cache, call.y + (token * call.heads + head) * d);
      }
  }
}

}  // namespace

#define EP_MINE_scalar EP_YES
#define EP_FUNCTION(function, isa) EP_WHEN(EP_MINE_##isa, EP_DEFINE_FUNCTION(function, isa))
#include "functions.inc"
