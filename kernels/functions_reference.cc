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

void packed_embedding(const FunctionJob& job) {
  const FormatInfo& f = info(job.format);
  const int64_t k = job.columns;
  for (int64_t i = 0; i < job.rows; i++) {
    const int64_t tile = job.ids[i] / kTileRows;
    const uint8_t* w = job.w + tile * tile_bytes(f, k);
    const void* scale = static_cast<const char*>(job.w_scale) + tile * tile_scale_bytes(f, k);
    for (int64_t c = 0; c < k; c++) job.y[i * k + c] = value_at(f, w, scale, static_cast<int>(job.ids[i] % kTileRows), c);
  }
}

}  // namespace

#define EP_MINE_scalar EP_YES
#define EP_FUNCTION(function, isa) EP_WHEN(EP_MINE_##isa, EP_DEFINE_FUNCTION(function, isa))
#include "functions.inc"
