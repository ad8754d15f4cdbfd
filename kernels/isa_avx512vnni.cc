// AVX-512 with VNNI. Tests also build this file with EP_SIMDE, which runs the same code on any CPU.
#include "functions.h"

#if defined(__x86_64__)
#if defined(EP_SIMDE)
#include "simde_avx512.h"
#undef EP_TARGET_PUSH
#undef EP_TARGET_POP
#define EP_TARGET_PUSH(features)
#define EP_TARGET_POP
#else
#if defined(EP_FREESTANDING)
#define __MM_MALLOC_H  // clang's immintrin.h would ask for stdlib.h through it
#endif
#include <immintrin.h>
#endif

EP_TARGET_PUSH("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
namespace {

#include "avx512.h"
#include "tile.h"
EP_ROWS_FROM(Avx512, Avx512Alone)
#include "functions_simd.h"
EP_FUNCTIONS_FROM(Avx512)

}  // namespace
EP_TARGET_POP

#define EP_MINE_avx512vnni EP_YES
#define EP_ROW(op, format, act, tile_m, isa) EP_WHEN(EP_MINE_##isa, EP_DEFINE_ROW(op, format, act, tile_m, isa))
#define EP_FUNCTION(function, isa) EP_WHEN(EP_MINE_##isa, EP_DEFINE_FUNCTION(function, isa))
#include "kernels.inc"
#include "functions.inc"
#endif
