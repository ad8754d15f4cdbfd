// The small functions of a decoder: what a kernel row of functions.inc computes, and how a call is cut into tasks.
//
//   rms_norm          y = s . weight / sqrt(mean(s^2) + epsilon) by rows,  s = x + skip, or x where there is no skip
//   gated_silu        y = act(gate) . up,  act(v) = v / (1 + e^-v)
//   gated_gelu_tanh   y = act(gate) . up,  act(v) = v / (1 + e^-2u) = v (1 + tanh u) / 2,  u = sqrt(2/pi) (v + 0.044715 v^3)
//   packed_embedding  y_i = row id_i of a weight in tiles, one exact product per element
//
// Limits are those of the equations: act(Inf) = Inf, and act(-Inf) = -Inf * 0 = NaN, so that a value which broke is never
// silently finite. Squares are summed in double: an Inf makes its own element NaN and the others of its row 0, a NaN all.
#pragma once
#include "adapter_matmul.h"

// X(function): every function that functions.inc may name.
#define EP_FUNCTION_NAMES(X) X(rms_norm) X(gated_silu) X(gated_gelu_tanh) X(packed_embedding)

enum class Function : int {
#define EP_NAME(function) function,
  EP_FUNCTION_NAMES(EP_NAME)
#undef EP_NAME
  count
};

struct FunctionJob {
  int64_t rows, columns;  // of y
  float* y;
  const float* x;         // rms_norm; the gated ones: gate
  const float* other;     // rms_norm: skip, or null; the gated ones: up
  const float* weight;    // rms_norm: [columns], with
  float epsilon;
  float* sum;             //   x + skip, where there is a skip
  const int64_t* ids;     // packed_embedding: [rows], each a row of the weight, with
  Format format;
  const uint8_t* w;       //   [T,columns/32,unit]
  const void* w_scale;    //   [T,B,16]
};

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
  const int64_t rows = kFunctionTaskBytes / 4 / (job.columns ? job.columns : 1);
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
  job.y += at;
  if (job.x) job.x += at;
  if (job.other) job.other += at;
  if (job.sum) job.sum += at;
  if (job.ids) job.ids += first;
  return job;
}
