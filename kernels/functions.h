// The small functions of a model: what a kernel row of functions.inc computes, and how a call is cut into tasks.
//
//   rms_norm          y = s . weight / sqrt(mean(s^2) + epsilon) by rows,  s = x + skip, or x where there is no skip
//   layer_norm        y = (s - mean(s)) . weight / sqrt(mean((s - mean(s))^2) + epsilon) + bias by rows,  s = x + skip
//   gelu              y = x P(x),  P(v) = erfc(-v / sqrt(2)) / 2
//   gated_silu        y = act(gate) . up,  act(v) = v / (1 + e^-v)
//   gated_gelu_tanh   y = act(gate) . up,  act(v) = v / (1 + e^-2u) = v (1 + tanh u) / 2,  u = sqrt(2/pi) (v + 0.044715 v^3)
//   packed_embedding  y_i = row id_i of a weight in tiles, one exact product per element, or that rounded to bfloat16
//   row_embedding     y_i = row id_i of a table in rows of 4 or 8 bits with a scale per 32, likewise
//   attention         y_i = sum_j v_j e^(t_ij) / sum_j e^(t_ij),  t_ij = q_i.k_j / sqrt(columns) - 10000 where key j is
//                     padding, for the rows i of each head of each text
//
// Limits are those of the equations: act(Inf) = Inf, and act(-Inf) = -Inf * 0 = NaN, so that a value which broke is never
// silently finite. Squares are summed in double: an Inf makes its own element NaN and the others of its row 0, a NaN all;
// in layer_norm either makes its row NaN.
#pragma once
#include "adapter_matmul.h"

// X(function): every function that functions.inc may name.
#define EP_FUNCTION_NAMES(X) \
  X(rms_norm) X(layer_norm) X(gelu) X(gated_silu) X(gated_gelu_tanh) X(packed_embedding) X(row_embedding) X(attention)

enum class Function : int {
#define EP_NAME(function) function,
  EP_FUNCTION_NAMES(EP_NAME)
#undef EP_NAME
  count
};

struct FunctionJob {
  int64_t rows, columns;  // of y
  float* y;
  const float* x;         // the norms, gelu; the gated ones: gate
  const float* other;     // the norms: skip, in rms_norm or null; the gated ones: up
  const float* weight;    // the norms: [columns], with
  const float* bias;      //   [columns], layer_norm
  float epsilon;
  float* sum;             //   x + skip, rms_norm with a skip
  const int64_t* ids;     // the embeddings: [rows], each a row of the weight, with
  Format format;          //   packed_embedding
  bool rounded;           //   packed_embedding: y is bfloat16, two in the place of a float
  int bits;               //   row_embedding
  const uint8_t* w;       //   [T,columns/32,unit]; row_embedding: [V,columns*bits/8], the even column of a pair low
  const void* w_scale;    //   [T,B,16]; row_embedding: float16 [V,columns/32]
  int64_t heads;          // attention; its rows are the heads of text 0, of text 1, .. and job.first is its first, with
  int64_t first, queries, keys;
  const float *q, *k, *v; //   [texts,queries or keys,heads*columns], as y
  const int64_t* mask;    //   [texts,keys], 0 where there is padding
};
constexpr float kHidden = -10000.0f;  // what padding adds to a score
constexpr int64_t kHeadColumns = 256; // attention: most columns
constexpr int kEmbeddingBlock = 32;   // row_embedding: columns that share a scale

struct FunctionOps {
  void (*run)(const FunctionJob& job);
};

#define EP_FUNCTION_SYMBOL(function, isa) ep_##function##_##isa

// Used in an ISA file as EP_DEFINE_ROW is, on functions named as in EP_FUNCTION_NAMES.
#define EP_DEFINE_FUNCTION(function, isa)                  \
  extern const FunctionOps EP_FUNCTION_SYMBOL(function, isa); \
  const FunctionOps EP_FUNCTION_SYMBOL(function, isa) = {function};

struct FunctionRow {
  const char* name;  // "<function>_<isa>", as edgepeft_kernels() lists it
  Isa isa;
  Function function;
  const FunctionOps* ops;
};

extern const FunctionRow kFunctionRows[];  // in the order of functions.inc: best first
extern const int kFunctionRowCount;
const FunctionRow* select_function(Function f);  // as select_row

constexpr int64_t kFunctionTaskBytes = 64 * 1024;  // of y: less is done before another thread has woken up

static inline int64_t rows_per_task(const FunctionJob& job) {
  const int64_t products = job.queries * job.keys * job.columns;  // attention's, six of which take as long as a float
  const int64_t rows = kFunctionTaskBytes / 4 / (1 + (job.heads ? products / 6 : job.columns));
  return rows < 1 ? 1 : rows;
}
static inline int64_t function_tasks(const FunctionJob& job) {
  return (job.rows + rows_per_task(job) - 1) / rows_per_task(job);
}
// Task 0..function_tasks-1, alone.
static inline FunctionJob function_task(const FunctionJob& whole, int64_t task) {
  const int64_t first = task * rows_per_task(whole), at = first * whole.columns, left = whole.rows - first;
  FunctionJob job = whole;
  job.rows = left < rows_per_task(whole) ? left : rows_per_task(whole);
  if (job.heads) return job.first = first, job;
  job.y += job.rounded ? at / 2 : at;
  if (job.x) job.x += at;
  if (job.other) job.other += at;
  if (job.sum) job.sum += at;
  if (job.ids) job.ids += first;
  return job;
}
