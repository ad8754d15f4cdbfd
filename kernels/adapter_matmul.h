// What a kernel row is, and how one call of the op is cut into work for it.
//
//   y = s_out . ( W.(s_in . x) + C.sums + B.( gate . (A.x) ) ) + bias        W: N x K packed, A: R x K, B: R x N, turned
//
// C: J x N, an offset of the weights for each block of K/J columns, where a call has one; sums: of s_in . x over the blocks.
//
// A row of kernels.inc gives three functions for one (format, activation, ISA):
//   quantize  one row of x -> int8, scale and correction per activation block (int8 activations only)
//   project   t = A.x for some rows of x
//   tile      `tiles` x 16 outputs x up to kJobRows rows of x, complete: weights, adapter, s_out, bias, stored once
// A new ISA is one isa_<name>.cc that emits its rows with EP_EMIT_ROWS, one line each in kernels.inc, and a line in
// EP_ISAS. Everything else (checks, dispatch, the ONNX op) reads those tables.
#pragma once
#include "formats.h"

enum class Act : int { int8, float32 };

// ---- what a row computes ------------------------------------------------------------------------------------------
constexpr int kJobRows = 256;  // most rows of x in one tile job: bounds what a tile keeps on its stack
constexpr int kChunk = 512;    // columns of int8 x that lie together, row by row: x passes by as one stream
constexpr int kRankBlock = 8;  // ranks that are live, or not, together
constexpr int kRankPanel = 128; // ranks of B that a tile goes through in a pass: eight adapters of rank 16

struct Span {
  int64_t from, to;
};

// Rows of x in turn, up to `end`, through whose gates the same ranks pass.
struct Run {
  int64_t end;
  const Span* span;  // whole blocks of ranks, as many as there are
  int64_t spans;
};

struct TileJob {
  int64_t k;               // columns
  int64_t m;               // rows of x, 1..kJobRows
  const uint8_t* w;        // this tile: K/32 units
  const void* w_scale;     // this tile: [B,16]
  int64_t w_step;          // bytes from a tile to the next
  int64_t w_scale_step;    // the same of w_scale
  const float* x;          // [m,K], float activations only
  const int8_t* q;         // [K/kChunk,q_rows,kChunk] of which m rows are this job's, int8 activations only, with
  const float* q_scale;    //   the same by act_block: value of one step; NaN where the block holds NaN or Inf
  const int32_t* q_fix;    //   the same: -zero * sum(q), zero being the row's, in the row's own form
  int64_t q_rows;
  int64_t rank;            // most ranks that are live in a row; 0: no adapter, and t, b are not read
  const float* t;          // [m,rank] gate . (A.x), of each row what is live, one after the other
  const Run* run;          // the first of this job's rows, and those that follow
  int64_t row;             // where this job's begin among all rows of x
  const void* b;           // [R,columns] float16 or float32, b_step apart
  int64_t b_step;
  bool b_half;
  int64_t blocks;          // J; 0: no offset, and sums, offset are not read
  const float* sums;       // [m,J]
  const void* offset;      // [J,columns] float16 or float32, offset_step apart
  int64_t offset_step;
  bool offset_half;
  const float* s_out;      // s_out[n * s_out_step] for n in columns, or null: neutral
  int64_t s_out_step;
  const float* bias;       // bias[n * bias_step] for n in columns, or null: none
  int64_t bias_step;
  float* y;                // [m,y_stride]: exactly `columns` of each row are written
  int64_t y_stride;
  int columns;             // 1..16 * the row's tiles
};

struct RowOps {
  int tile_m;     // rows of x in one register tile
  int tiles;      // of 16 outputs in a tile job,
  int tiles_alone;  //   and in one for a single row of x
  int32_t zero;   // what the row subtracts from the integers it multiplies; quantize's corrections are made with it
  void (*quantize)(const float* x, int64_t k, int block, int32_t zero, int8_t* q, float* scale, int32_t* fix);
  void (*project)(const void* a, bool a_half, int64_t rank, int64_t k, const float* x, int64_t m, float* t,
                  int64_t t_stride);  // t[m, 0..rank) = A.x
  void (*tile)(const TileJob& job);
};

// ---- the rows, from kernels.inc -----------------------------------------------------------------------------------
// X(isa): every instruction set that kernels.inc may name.
#define EP_ISAS(X) X(scalar) X(avx2) X(avx512vnni) X(amx) X(neon) X(dotprod) X(i8mm)

enum class Isa : int {
#define EP_ISA(isa) isa,
  EP_ISAS(EP_ISA)
#undef EP_ISA
  count
};

// EP_WHEN(probe, code) is `code` where the macro `probe` is defined as EP_YES, else nothing: this is how a file takes
// its own lines out of kernels.inc, and how rows of another architecture vanish, with no #if beside any row.
#define EP_YES ~, EP_KEEP
#define EP_KEEP(...) __VA_ARGS__
#define EP_DROP(...)
#define EP_SECOND(a, b, ...) b
#define EP_CHOOSE(...) EP_SECOND(__VA_ARGS__)
#define EP_WHEN(probe, ...) EP_CHOOSE(probe, EP_DROP, ~)(__VA_ARGS__)

#define EP_HAVE_scalar EP_YES
#if defined(__x86_64__)
#define EP_HAVE_avx2 EP_YES
#define EP_HAVE_avx512vnni EP_YES
#if !defined(EP_SIMDE)
#define EP_HAVE_amx EP_YES
#endif
#elif defined(__aarch64__)
#define EP_HAVE_neon EP_YES
#define EP_HAVE_dotprod EP_YES
#define EP_HAVE_i8mm EP_YES
#endif

#define EP_ROW_SYMBOL(op, format, act, isa) ep_##op##_##format##_##act##_##isa

// In an ISA file, `#define EP_MINE_<isa> EP_YES` and then
//   #define EP_ROW(op, format, act, tile_m, isa) EP_WHEN(EP_MINE_##isa, EP_DEFINE_ROW(op, format, act, tile_m, isa))
//   #include "kernels.inc"
// defines its rows, given a number tiles, functions quantize, project and templates tiles_alone<Act>,
// tile<Format, Act, tile_m>, zero<Format, Act>.
#define EP_DEFINE_ROW(op, format, act, tile_m, isa)                                       \
  extern const RowOps EP_ROW_SYMBOL(op, format, act, isa);                                \
  const RowOps EP_ROW_SYMBOL(op, format, act, isa) = {tile_m, tiles, tiles_alone<Act::act>, zero<Format::format, Act::act>(), \
                                                      quantize, project, tile<Format::format, Act::act, tile_m>};

struct Row {
  const char* name;  // "<format>_<act>_<isa>", as edgepeft_kernels() lists it
  Isa isa;
  Format format;
  Act act;
  const RowOps* ops;
};

extern const Row kRows[];    // in the order of kernels.inc: best first
extern const int kRowCount;
bool cpu_runs(Isa isa);
const char* isa_name(Isa isa);
const Row* find_row(const char* name);      // by row name; null if unknown
const Row* select_row(Format f, Act act);   // best that runs here, or what edgepeft_force_kernel asked for
const FormatInfo* find_format(const char* tag, Format* f);
bool same(const char* a, const char* b);

// Whole pages from the system: the library links to no libc. Null when there are none.
void* map_pages(size_t bytes);
void unmap_pages(void* p, size_t bytes);
void yield_cpu();  // to another thread that is ready

// ---- one call -----------------------------------------------------------------------------------------------------
constexpr int kMaxGroups = 3;

struct Group {                // one of the outputs that share x
  int64_t n;                  // real rows
  int64_t rank;
  const void *a, *b;          // [R,K], [R,n]
  bool half;                  // a and b are float16
  const float* gate;          // gate[m / gate_each * rank + r * gate_step]; null: neutral
  int64_t gate_each;          // rows of x in turn that share gates: those of a text
  int64_t gate_step;
  const float* s_out;         // s_out[n * s_out_step]; null: neutral
  int64_t s_out_step;
  const float* bias;          // bias[n * bias_step]; null: none
  int64_t bias_step;
  float* y;                   // [M,n]
};

// How far the preparation of a call is, whose units threads claim.
struct Progress {
  alignas(64) int64_t claimed;
  alignas(64) int64_t done;
};

struct Call {
  Format format;
  const RowOps* ops;
  Act act;
  int64_t m, k;
  const float* x;             // [M,K]
  const float* s_in;          // s_in[k * s_in_step]; null: neutral
  int64_t s_in_step;
  const uint8_t* w;
  const void* w_scale;
  int64_t blocks;             // J, which cuts K into multiples of kUnit; 0: no offset
  const void* offset;         // [J,16T], columns as rows of w
  bool offset_half;           // it is float16
  int groups;
  Group group[kMaxGroups];
  // Filled in by plan() and place().
  int64_t rows_per_job, jobs_per_task, tile_tasks, row_tasks, tasks;
  int64_t prepare_units, rows_per_unit, ranks_per_unit;
  Progress* progress;
  const float* x_in;          // s_in . x
  int8_t* q;
  float* q_scale;
  int32_t* q_fix;
  float* sums;                // [M,J]
  float* t[kMaxGroups];
  Run* run[kMaxGroups];      // of all rows,
  Span* span[kMaxGroups];    //   and what they point to
  int64_t live[kMaxGroups];  // most ranks of a row
};

int64_t plan(Call& call);                       // returns the scratch it needs, in bytes
void place(Call& call, void* scratch);          // scratch: 64-byte aligned
void run(const Call& call, int64_t task);       // task in 0..tasks-1, each once, on any thread

// ---- code for a CPU that is found at run time ---------------------------------------------------------------------
// Everything between PUSH and POP is compiled for the named features, with no per-file compiler flags. Such code stays
// in an anonymous namespace: a shared inline function compiled for AVX would otherwise be linked into generic callers.
#define EP_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define EP_TARGET_PUSH(features) EP_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define EP_TARGET_POP EP_PRAGMA(clang attribute pop)
#else
#define EP_TARGET_PUSH(features) EP_PRAGMA(GCC push_options) EP_PRAGMA(GCC target(features))
#define EP_TARGET_POP EP_PRAGMA(GCC pop_options)
#endif
#define EP_INLINE inline __attribute__((always_inline))
