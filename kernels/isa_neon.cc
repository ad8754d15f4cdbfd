// ARMv8-A without dot products: Cortex-A53, A72 (Raspberry Pi Zero 2 W, 3, 4).
//
// smull and smlal multiply 8 bytes to 16 bits. 4-bit codes: a lane sums 8 steps, at most 8*15*127, and a pair of lanes
// at most 30480, so addp may join pairs in 16 bits before one sadalp per unit widens. 8-bit integers (i8c, the NF4
// table): two products fit, at most 2*128*127, and are widened every second step.
#include "functions.h"

#if defined(__aarch64__)
#include <arm_neon.h>
namespace {
#include "neon.h"

struct Neon : NeonBase {
  template <Format F>
  static constexpr int stage_bytes() { return kTileRows * kUnit; }
  template <Format F>
  static EP_INLINE void unpack_unit(const uint8_t* w, uint8_t* out) {
    for (int j = 0; j < 8; j++)
      for (int v = 0; v < 4; v++) vst1q_s8(reinterpret_cast<int8_t*>(out) + j * 64 + v * 16, codes<F>(w, j, v));
  }
  static EP_INLINE int8x16_t columns(const int8_t* q) {  // 4 columns, once for each output
    int32_t four;
    __builtin_memcpy(&four, q, 4);
    int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
    asm("" : "+w"(x));  // or clang sees equal halves, and trades each smlal2 for an ext and an smlal
    return x;
  }

  // V of the 4 vectors, so that R x V x 2 sums of 16 bits stay in registers.
  template <Format F, int R, bool packed, int V>
  static EP_INLINE void dot_vectors(const uint8_t* w, const int8_t* q, I (&d)[R][4], int v0) {
    int16x8_t low[R][V], high[R][V];
    I wide[R][V][2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const int j = i % 2 * 4 + i / 2;
      const bool fresh = nibbles<F>() ? i == 0 : i % 2 == 0;
      int8x16_t c[V];
      for (int v = 0; v < V; v++)
        c[v] = packed ? codes<F>(w, j, v0 + v) : vld1q_s8(reinterpret_cast<const int8_t*>(w) + j * 64 + (v0 + v) * 16);
      for (int r = 0; r < R; r++) {
        const int8x16_t x = columns(q + r * kChunk + 4 * j);
        for (int v = 0; v < V; v++) {
          low[r][v] = fresh ? vmull_s8(vget_low_s8(c[v]), vget_low_s8(x)) : vmlal_s8(low[r][v], vget_low_s8(c[v]), vget_low_s8(x));
          high[r][v] = fresh ? vmull_high_s8(c[v], x) : vmlal_high_s8(high[r][v], c[v], x);
          if (nibbles<F>() || fresh) continue;
          wide[r][v][0] = i == 1 ? vpaddlq_s16(low[r][v]) : vpadalq_s16(wide[r][v][0], low[r][v]);
          wide[r][v][1] = i == 1 ? vpaddlq_s16(high[r][v]) : vpadalq_s16(wide[r][v][1], high[r][v]);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) {
        I& sum = d[r][v0 + v];
        sum = nibbles<F>() ? vpadalq_s16(sum, vpaddq_s16(low[r][v], high[r][v])) : vaddq_s32(sum, vpaddq_s32(wide[r][v][0], wide[r][v][1]));
      }
  }
  template <Format F, int R, bool packed>
  static EP_INLINE void dot_unit(const uint8_t* w, const int64_t*, const int8_t* q, I (&d)[R][4]) {
    constexpr int V = nibbles<F>() ? (R == 1 ? 4 : 2) : (R == 1 ? 4 : R == 2 ? 2 : 1);
    for (int v = 0; v < 4; v += V) dot_vectors<F, R, packed, V>(w, q, d, v);
  }
};

#include "tile.h"
EP_ROWS_FROM(Neon, Neon)
#include "functions_simd.h"
EP_FUNCTIONS_FROM(Neon)

}  // namespace

#define EP_MINE_neon EP_YES
#define EP_ROW(op, format, act, tile_m, isa) EP_WHEN(EP_MINE_##isa, EP_DEFINE_ROW(op, format, act, tile_m, isa))
#define EP_FUNCTION(function, isa) EP_WHEN(EP_MINE_##isa, EP_DEFINE_FUNCTION(function, isa))
#include "kernels.inc"
#include "functions.inc"
#endif
