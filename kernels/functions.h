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
//   extend_cache      a text's new keys, rotated to their places, and values behind those that it has
//   cached_attention  as attention, t_ij = cap(scale q_i.k_j) with q rotated, of the keys j up to i's own place and within
//                     the window before it;  cap(t) = softcap tanh(t / softcap), or t where that is 0
//
// Limits are those of the equations: act(Inf) = Inf, and act(-Inf) = -Inf * 0 = NaN, so that a value which broke is never
// silently finite. Squares are summed in double: an Inf makes its own element NaN and the others of its row 0, a NaN all;
// in layer_norm either makes its row NaN.
#pragma once
#include "adapter_matmul.h"

// X(function): every function that functions.inc may name.
#define EP_FUNCTION_NAMES(X) \
  X(rms_norm) X(layer_norm) X(gelu) X(gated_silu) X(gated_gelu_tanh) X(packed_embedding) X(row_embedding) X(attention) \
  X(extend_cache) X(cached_attention)

enum class Function : int {
#define EP_NAME(function) function,
  EP_FUNCTION_NAMES(EP_NAME)
#undef EP_NAME
  count
};

// Attention on a cache, whose heads of queries share keys and values by groups. Heads and what is rotated of them are of
// multiples of 16 columns.
struct CachedCall {
  int64_t texts, tokens, heads, kv_heads, columns;
  const float *q, *k, *v;                     // [texts,tokens,heads or kv_heads,columns], with these strides
  int64_t q_stride, kv_stride;                //   from a token to the next
  const float *cosine, *sine;                 // [places,half]
  int64_t half;                               // columns that are rotated, over two
  bool fresh;                                 // no text has tokens before these
  const int32_t* last;                        // [texts]: the place of the last of them, where not fresh
  const float *past_key, *past_value;         // [texts,kv_heads,past_capacity,columns], what is before them; it may be
  float *key, *value;                         // [texts,kv_heads,capacity,columns]: where it already is
  int64_t past_capacity, capacity, total;     // total: tokens of the longest text
  int64_t window;                             // keys that a token sees, its own the last of them
  float scale, softcap;
  float* y;                                   // [texts,tokens,heads,columns]
  float* shares;                              // where keys are shared out: [texts * kv_heads,parts,heads / kv_heads,columns + 2]
  int32_t* left;                              //   [texts * kv_heads]: parts that are not done

  int64_t before(int64_t text) const { return fresh ? 0 : last[text] + 1 - tokens; }
  int64_t group() const { return heads / kv_heads; }
  int64_t together() const { return group() < kGroup ? kGroup / group() : 1; }  // tokens of a block
  int64_t blocks() const { return (tokens + together() - 1) / together(); }

  // Keys of a part, which other threads may attend to: a single token has no blocks to share out. Where a text's parts
  // begin is the same whatever runs beside it.
  int64_t part_keys() const { return (kPartProducts / (group() * columns) + kPartStep - 1) / kPartStep * kPartStep; }
  int64_t parts() const { return tokens > 1 ? 1 : (total + part_keys() - 1) / part_keys(); }

  static constexpr int64_t kGroup = 64;       // most heads of queries in a group; rows of a block
  static constexpr int64_t kPartProducts = 48 * 1024, kPartStep = 64;
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
  int64_t heads;          // attention: its rows are the heads of text 0, of text 1, .. and job.first is its first, with
  int64_t first, queries, keys;
  const float *q, *k, *v; //   [texts,queries or keys,heads*columns], as y
  const int64_t* mask;    //   [texts,keys], 0 where there is padding
  const CachedCall* call; // extend_cache: its rows are the kv_heads of text 0, of text 1, ..; cached_attention: likewise,
                          //   the blocks of each, the last first, or the parts
  int64_t cost;           // these three: what a row takes, in floats
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

constexpr int64_t kProducts = 6;                  // attention's that take as long as a float
static inline int64_t attention_cost(int64_t queries, int64_t keys, int64_t columns) { return 1 + queries * keys * columns / kProducts; }

static inline int64_t rows_per_task(const FunctionJob& job) {
  const int64_t rows = kFunctionTaskBytes / 4 / (1 + (job.cost ? job.cost : job.columns));
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
  if (job.cost) return job.first = first, job;
  job.y += job.rounded ? at / 2 : at;
  if (job.x) job.x += at;
  if (job.other) job.other += at;
  if (job.sum) job.sum += at;
  if (job.ids) job.ids += first;
  return job;
}
