// ARMv8.2-A with dot products: Cortex-A76 (Raspberry Pi 5) and most cores since A55. sdot by element multiplies
// 4 outputs x 4 columns with 4 columns of x that stay where they were loaded.
#include "adapter_matmul.h"

#if defined(__aarch64__)
#include <arm_neon.h>
EP_TARGET_PUSH("arch=armv8.2-a+dotprod")
namespace {
#include "neon.h"

struct Dotprod : NeonBase {
  template <Format F>
  static constexpr int stage_bytes() { return kTileRows * kUnit; }
  template <Format F>
  static EP_INLINE void unpack_unit(const uint8_t* w, uint8_t* out) {
    for (int j = 0; j < 8; j++)
      for (int v = 0; v < 4; v++) vst1q_s8(reinterpret_cast<int8_t*>(out) + j * 64 + v * 16, codes<F>(w, j, v));
  }
  template <Format F, int R, bool packed, int i = 0>
  static EP_INLINE void steps(const uint8_t* w, const int8x16_t (&x)[R][2], I (&d)[R][4]) {
    constexpr int j = i % 2 * 4 + i / 2;
    for (int v = 0; v < 4; v++) {
      const int8x16_t c = packed ? codes<F>(w, j, v) : vld1q_s8(reinterpret_cast<const int8_t*>(w) + j * 64 + v * 16);
      for (int r = 0; r < R; r++) d[r][v] = vdotq_laneq_s32(d[r][v], c, x[r][j / 4], j % 4);
    }
    if constexpr (i < 7) steps<F, R, packed, i + 1>(w, x, d);
  }
  template <Format F, int R, bool packed>
  static EP_INLINE void dot_unit(const uint8_t* w, const int64_t*, const int8_t* q, I (&d)[R][4]) {
    int8x16_t x[R][2];
    for (int r = 0; r < R; r++)
      for (int h = 0; h < 2; h++) x[r][h] = vld1q_s8(q + r * kChunk + 16 * h);
    steps<F, R, packed>(w, x, d);
  }
};

#include "tile.h"
EP_ROWS_FROM(Dotprod, Dotprod)

}  // namespace
EP_TARGET_POP

#define EP_MINE_dotprod EP_YES
#define EP_ROW(op, format, act, tile_m, isa) EP_WHEN(EP_MINE_##isa, EP_DEFINE_ROW(op, format, act, tile_m, isa))
#include "kernels.inc"
#endif
