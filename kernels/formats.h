// The packed weight formats: one table, and the only code that knows where a code or a scale lies.
//
// A tile is 16 output rows; a unit is 16 rows x 32 columns of it. Four consecutive columns of one row are the four
// bytes (or nibbles) of one 32-bit lane, so any SIMD width that is a multiple of 32 bits reads whole rows' lanes:
//   8 bit  w[t, K/32, 512]: byte[(j*16 + n)*4 + i]  = code[16t+n, 32u + 4j+i],                     j in 0..7
//   4 bit  w[t, K/32, 256]: byte[(j*16 + n)*4 + i]  = code[16t+n, 32u + 4j+i]
//                                                   | code[16t+n, 32u + 16+4j+i] << 4,             j in 0..3
//   scales [t, B, 16] row-major, B = K/block, or 1 where the block is the whole row.
// Value of a code: (code - zero) * scale, or NF4[code] * scale for the table format.
#pragma once
#include <stddef.h>
#include <stdint.h>

// X(tag, bits, block (0: whole row), act_block, zero, scale is float16, codes index the NF4 table)
#define EP_FORMATS(X)                  \
  X(i8c, 8, 0, 64, 128, false, false)  \
  X(i4b32, 4, 32, 32, 8, true, false)  \
  X(i4b64, 4, 64, 64, 8, true, false)  \
  X(i4b128, 4, 128, 128, 8, true, false) \
  X(nf4b64, 4, 64, 64, 0, false, true)

enum class Format : int {
#define EP_TAG(tag, ...) tag,
  EP_FORMATS(EP_TAG)
#undef EP_TAG
  count
};

struct FormatInfo {
  const char* tag;
  int bits, block, act_block, zero;
  bool half_scale, nf4;
};

constexpr FormatInfo kFormats[] = {
#define EP_INFO(tag, bits, block, act_block, zero, half_scale, nf4) {#tag, bits, block, act_block, zero, half_scale, nf4},
    EP_FORMATS(EP_INFO)
#undef EP_INFO
};

constexpr const FormatInfo& info(Format f) { return kFormats[static_cast<int>(f)]; }

constexpr int kTileRows = 16;   // output rows of a tile
constexpr int kUnit = 32;       // columns of a unit

// The 16 quantiles of a normal distribution that 4-bit NormalFloat codes stand for, and their int8 image rint(127 * v).
alignas(64) constexpr float kNf4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
alignas(16) constexpr int8_t kNf4I8[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};

static inline int64_t scale_blocks(const FormatInfo& f, int64_t k) { return f.block ? k / f.block : 1; }
static inline int64_t unit_bytes(const FormatInfo& f) { return kTileRows * kUnit * f.bits / 8; }
static inline int64_t tile_bytes(const FormatInfo& f, int64_t k) { return k / kUnit * unit_bytes(f); }
static inline int64_t tile_scale_bytes(const FormatInfo& f, int64_t k) {
  return scale_blocks(f, k) * kTileRows * (f.half_scale ? 2 : 4);
}
// K is acceptable when whole activation blocks and whole units fill it.
static inline bool columns_fit(const FormatInfo& f, int64_t k) { return k > 0 && k % f.act_block == 0 && k % kUnit == 0; }

static inline float bits_float(uint32_t u) {
  float v;
  __builtin_memcpy(&v, &u, 4);
  return v;
}
static inline uint32_t float_bits(float v) {
  uint32_t u;
  __builtin_memcpy(&u, &v, 4);
  return u;
}
// The nearest bfloat16 of a finite float, ties to even.
static inline uint32_t bfloat16_bits(float v) {
  const uint32_t u = float_bits(v);
  return (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
// Exact, subnormals, infinities and NaN included; integer and float operations only, so it runs on any CPU.
static inline float half_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  const float v = bits_float(magnitude << 13) * bits_float(0x77800000u);  // moves the exponent bias by 2^112
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bits_float(float_bits(v) | special | (h & 0x8000u) << 16);
}

// Code of row n (of 16), column k, in one tile.
static inline int code_at(const FormatInfo& f, const uint8_t* w_tile, int n, int64_t k) {
  const uint8_t* unit = w_tile + k / kUnit * unit_bytes(f);
  const int c = static_cast<int>(k % kUnit);
  if (f.bits == 8) return unit[((c / 4) * 16 + n) * 4 + c % 4];
  const uint8_t pair = unit[((c % 16) / 4 * 16 + n) * 4 + c % 4];
  return c < 16 ? pair & 15 : pair >> 4;
}
static inline float scale_at(const FormatInfo& f, const void* scale_tile, int n, int64_t block) {
  const int64_t i = block * kTileRows + n;
  return f.half_scale ? half_float(static_cast<const uint16_t*>(scale_tile)[i]) : static_cast<const float*>(scale_tile)[i];
}
static inline float value_at(const FormatInfo& f, const uint8_t* w_tile, const void* scale_tile, int n, int64_t k) {
  const int code = code_at(f, w_tile, n, k);
  const float scale = scale_at(f, scale_tile, n, f.block ? k / f.block : 0);
  return f.nf4 ? kNf4[code] * scale : static_cast<float>(code - f.zero) * scale;
}
// How int8 activations see a code: an integer, beside the factor its scale takes.
static inline int int_at(const FormatInfo& f, const uint8_t* w_tile, int n, int64_t k) {
  const int code = code_at(f, w_tile, n, k);
  return f.nf4 ? kNf4I8[code] : code - f.zero;
}
constexpr float int_scale(const FormatInfo& f) { return f.nf4 ? 1.0f / 127.0f : 1.0f; }
