// The plain-loop row for every format and both activations: what every SIMD row is proved against, and what runs
// where no other row can. It reads weights only through the accessors of formats.h and shares no code with tile.h.
#include "adapter_matmul.h"

namespace {

void quantize(const float* x, int64_t k, int block, int32_t zero, int8_t* q, float* scale, int32_t* fix) {
  for (int64_t b = 0; b < k / block; b++, x += block, q += block) {
    uint32_t peak = 0;  // of |x| as bits: orders like the floats do, and puts Inf and NaN on top
    for (int i = 0; i < block; i++) {
      const uint32_t bits = float_bits(x[i]) & 0x7fffffffu;
      if (bits > peak) peak = bits;
    }
    const bool finite = peak < 0x7f800000u;
    const float top = bits_float(peak);
    const bool empty = !finite || top < 1e-30f;
    const float step = empty ? 0.0f : 127.0f / top;
    int32_t sum = 0;
    for (int i = 0; i < block; i++) {
      // adding and taking away 1.5 * 2^23 rounds half to even in float32
      const float r = empty ? 0.0f : (x[i] * step + 12582912.0f) - 12582912.0f;
      q[i] = static_cast<int8_t>(r);
      sum += q[i];
    }
    scale[b] = !finite ? bits_float(0x7fc00000u) : empty ? 0.0f : top / 127.0f;
    fix[b] = -zero * sum;
  }
}

float element(const void* p, bool half, int64_t i) {
  return half ? half_float(static_cast<const uint16_t*>(p)[i]) : static_cast<const float*>(p)[i];
}

void project(const void* a, bool half, int64_t rank, int64_t k, const float* x, int64_t m, float* t, int64_t t_stride) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t r = 0; r < rank; r++) {
      float sum = 0;
      for (int64_t c = 0; c < k; c++) sum += element(a, half, r * k + c) * x[i * k + c];
      t[i * t_stride + r] = sum;
    }
}

float dot_int8(const TileJob& job, const FormatInfo& f, int64_t m, int n) {
  float sum = 0;
  for (int64_t b = 0; b < job.k / f.act_block; b++) {
    const int64_t row = b * f.act_block / kChunk * job.q_rows + m, c0 = b * f.act_block;
    int32_t dot = 0;
    for (int64_t c = c0; c < c0 + f.act_block; c++) dot += int_at(f, job.w, n, c) * job.q[row * kChunk + c % kChunk];
    const float w_scale = scale_at(f, job.w_scale, n, f.block ? b : 0) * int_scale(f);
    sum += static_cast<float>(dot) * job.q_scale[(row * kChunk + c0 % kChunk) / f.act_block] * w_scale;
  }
  return sum;
}

float dot_float(const TileJob& job, const FormatInfo& f, int64_t m, int n) {
  float sum = 0;
  for (int64_t c = 0; c < job.k; c++) sum += value_at(f, job.w, job.w_scale, n, c) * job.x[m * job.k + c];
  return sum;
}

constexpr int tiles = 1;
template <Act>
constexpr int tiles_alone = 1;

// The zero of a format is taken off the codes before they are multiplied, so no correction is needed.
template <Format, Act>
constexpr int32_t zero() {
  return 0;
}

template <Format F, Act A, int>
void tile(const TileJob& job) {
  const FormatInfo& f = info(F);
  const Run* run = job.run;
  for (int64_t m = 0; m < job.m; m++) {
    if (job.row + m == run->end) run++;
    for (int n = 0; n < job.columns; n++) {
      float v = A == Act::int8 ? dot_int8(job, f, m, n) : dot_float(job, f, m, n);
      const float* t = job.t + m * job.rank;
      for (int64_t s = 0; s < run->spans; s++)
        for (int64_t r = run->span[s].from; r < run->span[s].to; r++) v += element(job.b, job.b_half, r * job.b_step + n) * *t++;
      for (int64_t b = 0; b < job.blocks; b++)
        v += element(job.offset, job.offset_half, b * job.offset_step + n) * job.sums[m * job.blocks + b];
      if (job.s_out) v *= job.s_out[n * job.s_out_step];
      job.y[m * job.y_stride + n] = job.bias ? v + job.bias[n * job.bias_step] : v;
    }
  }
}

}  // namespace

#define EP_MINE_scalar EP_YES
#define EP_ROW(op, format, act, tile_m, isa) EP_WHEN(EP_MINE_##isa, EP_DEFINE_ROW(op, format, act, tile_m, isa))
#include "kernels.inc"
