// ARMv8.6-A integer matrix products: smmla multiplies 2 rows of x with 2 outputs over 8 columns.
//
// Steps 2p and 2p + 1 of a unit, zipped by 32 bits, are 2 outputs x 8 columns per vector; the stage holds them so.
// Sums come out as [x0.w0 x0.w1 x1.w0 x1.w1] and are zipped back once per unit. A single row of x takes sdot.
#include "adapter_matmul.h"

#if defined(__aarch64__)
#include <arm_neon.h>
EP_TARGET_PUSH("arch=armv8.2-a+dotprod+i8mm")
namespace {
#include "neon.h"

struct I8mm : NeonBase {
  template <Format F>
  static constexpr int stage_bytes() { return kTileRows * kUnit; }

  struct Pair {
    int8x16_t low, high;  // outputs 4v, 4v+1 and 4v+2, 4v+3, 8 columns each
  };
  template <Format F>
  static EP_INLINE Pair zipped(const uint8_t* w, int p, int v) {
    const I a = vreinterpretq_s32_s8(codes<F>(w, 2 * p, v)), b = vreinterpretq_s32_s8(codes<F>(w, 2 * p + 1, v));
    return {vreinterpretq_s8_s32(vzip1q_s32(a, b)), vreinterpretq_s8_s32(vzip2q_s32(a, b))};
  }
  template <Format F, bool packed>
  static EP_INLINE Pair pair(const uint8_t* w, int p, int v) {
    if constexpr (packed) return zipped<F>(w, p, v);
    const int8_t* at = reinterpret_cast<const int8_t*>(w) + (p * 4 + v) * 32;
    return {vld1q_s8(at), vld1q_s8(at + 16)};
  }
  template <Format F>
  static EP_INLINE void unpack_unit(const uint8_t* w, uint8_t* out) {
    for (int p = 0; p < 4; p++)
      for (int v = 0; v < 4; v++, out += 32) {
        const Pair c = zipped<F>(w, p, v);
        vst1q_s8(reinterpret_cast<int8_t*>(out), c.low);
        vst1q_s8(reinterpret_cast<int8_t*>(out) + 16, c.high);
      }
  }

  template <Format F, bool packed, int i = 0>
  static EP_INLINE void one_row(const uint8_t* w, const int8_t* q, I (&d)[4]) {
    if constexpr (packed) {
      constexpr int j = i % 2 * 4 + i / 2;
      for (int v = 0; v < 4; v++) d[v] = vdotq_laneq_s32(d[v], codes<F>(w, j, v), vld1q_s8(q + j / 4 * 16), j % 4);
      if constexpr (i < 7) one_row<F, packed, i + 1>(w, q, d);
    } else {
      for (int v = 0; v < 4; v++) {
        I low = set_int(0), high = set_int(0);  // [w0 w0 w1 w1], [w2 w2 w3 w3]
        for (int p = 0; p < 4; p++) {
          const Pair c = pair<F, packed>(w, p, v);
          const int8x16_t x = vcombine_s8(vld1_s8(q + 8 * p), vld1_s8(q + 8 * p));
          low = vdotq_s32(low, c.low, x);
          high = vdotq_s32(high, c.high, x);
        }
        d[v] = vaddq_s32(d[v], vpaddq_s32(low, high));
      }
    }
  }
  template <Format F, int R, bool packed>
  static EP_INLINE void row_pairs(const uint8_t* w, const int8_t* q, I (&d)[R][4]) {
    I sums[R / 2][4][2];
    for (int r = 0; r < R / 2; r++)
      for (int v = 0; v < 4; v++) sums[r][v][0] = sums[r][v][1] = set_int(0);
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
      int8x16_t x[R / 2];
      for (int r = 0; r < R / 2; r++) x[r] = vcombine_s8(vld1_s8(q + 2 * r * kChunk + 8 * p), vld1_s8(q + (2 * r + 1) * kChunk + 8 * p));
      for (int v = 0; v < 4; v++) {
        const Pair c = pair<F, packed>(w, p, v);
        for (int r = 0; r < R / 2; r++) {
          sums[r][v][0] = vmmlaq_s32(sums[r][v][0], x[r], c.low);
          sums[r][v][1] = vmmlaq_s32(sums[r][v][1], x[r], c.high);
        }
      }
    }
    for (int r = 0; r < R / 2; r++)
      for (int v = 0; v < 4; v++) {
        const int64x2_t a = vreinterpretq_s64_s32(sums[r][v][0]), b = vreinterpretq_s64_s32(sums[r][v][1]);
        d[2 * r][v] = vaddq_s32(d[2 * r][v], vreinterpretq_s32_s64(vzip1q_s64(a, b)));
        d[2 * r + 1][v] = vaddq_s32(d[2 * r + 1][v], vreinterpretq_s32_s64(vzip2q_s64(a, b)));
      }
  }
  template <Format F, int R, bool packed>
  static EP_INLINE void dot_unit(const uint8_t* w, const int64_t*, const int8_t* q, I (&d)[R][4]) {
    static_assert(R == 1 || R % 2 == 0, "smmla takes rows of x by two");
    if constexpr (R == 1) one_row<F, packed>(w, q, d[0]);
    else row_pairs<F, R, packed>(w, q, d);
  }
};

#include "tile.h"
EP_ROWS_FROM(I8mm, I8mm)

}  // namespace
EP_TARGET_POP

#define EP_MINE_i8mm EP_YES
#define EP_ROW(op, format, act, tile_m, isa) EP_WHEN(EP_MINE_##isa, EP_DEFINE_ROW(op, format, act, tile_m, isa))
#include "kernels.inc"
#endif
