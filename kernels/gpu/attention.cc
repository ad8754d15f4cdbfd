// Attention on a cache (GroupQueryAttention: rotation, a causal mask, a window) and without one (PaddedAttention).
//
// The cache's past and present may be one memory that both sides see; else the past is copied into the present first.
#include <math.h>

#include "operators.h"

namespace {

enum Whole { kHeads, kKvHeads, kWindow };
enum Number { kScale, kSoftcap };
constexpr int64_t kMostDim = 256;
enum Mask : uint32_t { kCausal, kPadding };

struct Strides {
  uint64_t batch, head, row;
};

uint32_t bits(float v) {
  uint32_t u;
  __builtin_memcpy(&u, &v, 4);
  return u;
}

// What both kinds ask of the shader; lengths: of the cache, or of each key whether it is real.
Failure attend(Run& run, const Step& s, const Value& q, uint64_t q_at, const Value& key, const Value& value, const Strides& strides,
               int64_t batch, int64_t queries, int64_t keys, int64_t kv_heads, int64_t dim, Mask mask, const Value& lengths) {
  const Value& y = run.out(s, 0);
  const float scale = s.number[kScale] != 0 ? s.number[kScale] : 1 / sqrtf(static_cast<float>(dim));
  Dispatch d;
  d.shader = Shader::attend;
  d.constant(mask);
  d.constant(key.type == kHalf);
  d.buffers[0] = q.buffer;
  d.buffers[1] = key.buffer;
  d.buffers[2] = value.buffer;
  d.buffers[3] = y.buffer;
  d.buffers[4] = lengths.buffer;
  const int64_t sizes[] = {queries, keys, s.whole[kHeads], kv_heads, dim};
  for (int64_t size : sizes) d.word(static_cast<uint64_t>(size));
  for (uint64_t word : {q_at, key.element(), value.element(), y.element(), strides.batch, strides.head, strides.row, lengths.element()})
    d.word(word);
  d.word(static_cast<uint64_t>(s.whole[kWindow]));
  d.word(bits(scale));
  d.word(bits(s.number[kSoftcap]));
  d.groups[0] = static_cast<uint32_t>(s.whole[kHeads]);
  d.groups[1] = static_cast<uint32_t>(queries);
  d.groups[2] = static_cast<uint32_t>(batch);
  return queries && batch ? run.record(d) : nullptr;
}

}  // namespace

// ---- on a cache -----------------------------------------------------------------------------------------------------
Failure set_cached_attention(const Node& node, Step* step) {
  step->whole[kHeads] = node.whole("num_heads", 0);
  step->whole[kKvHeads] = node.whole("kv_num_heads", 0);
  const int64_t window = node.whole("local_window_size", -1);
  step->whole[kWindow] = window > 0 ? window : 0;
  step->number[kScale] = node.number("scale", 0);
  step->number[kSoftcap] = node.number("softcap", 0);
  if (!node.whole("do_rotary", 0) || node.whole("rotary_interleaved", 0)) return "only rotation of halves has a shader";
  if (node.whole("smooth_softmax", 0) > 0) return "a smooth softmax has no shader";
  return node.inputs >= 9 ? nullptr : "expected rotation tables";
}

namespace {

enum Input { kQ, kK, kV, kPastKey, kPastValue, kLengths, kTotal, kCos, kSin };

// How many tokens each row has before these: none in a first run, which may be padded on the right.
Failure lengths_before(Run& run, const Step& s, int64_t batch, int64_t tokens, Value* before) {
  Array<int32_t> counts;
  const int64_t total = run.in(s, kTotal).whole(0);
  for (int64_t b = 0; b < batch; b++)
    counts.push(tokens == total ? 0 : static_cast<int32_t>(run.in(s, kLengths).whole(b) + 1 - tokens));
  *before = {kInt32, {}, nullptr, nullptr, 0};
  Failure failure = nullptr;
  for (int32_t n : counts)
    if (n < 0 || n + tokens > total) failure = run.refuse(s, "seqlens_k and total_sequence_length do not go together");
  if (!failure) failure = run.upload(counts.data, counts.count * 4, &before->buffer, &before->offset);
  counts.free();
  return failure;
}

// Brings the past to where the present goes, unless it is there.
Failure carry_past(Run& run, Value& past, const Value& present, int64_t used) {
  if (past.buffer && past.buffer == present.buffer && past.offset == present.offset) return nullptr;
  if (!used) return nullptr;
  GPU_TRY(run.to_gpu(past));
  if (run.short_of_room) return nullptr;
  const int64_t rows = past.dims.d[0] * past.dims.d[1], dim = past.dims.d[3];
  for (int64_t row = 0; row < rows; row++)
    run.device.copy(*past.buffer, past.offset + bytes_of(past.type, row * past.dims.d[2] * dim), *present.buffer,
                    present.offset + bytes_of(present.type, row * present.dims.d[2] * dim), bytes_of(past.type, used * dim));
  return nullptr;
}

struct Sizes {
  int64_t batch, tokens, heads, kv_heads, dim, total, capacity;
};

Failure rotate(Run& run, const Step& s, const Sizes& n, const Value& before, const Buffer* turned, uint64_t turned_at) {
  Value &q = run.in(s, kQ), &cosine = run.in(s, kCos), &sine = run.in(s, kSin);
  const bool apart = run.has(s, kK);
  Value &k = apart ? run.in(s, kK) : q, &v = apart ? run.in(s, kV) : q;
  Value* all[] = {&q, &k, &v};
  Dispatch d;
  d.shader = Shader::rotate;
  GPU_TRY(run.together(all, 3, &d.buffers[0]));
  GPU_TRY(run.to_gpu(cosine));
  GPU_TRY(run.to_gpu(sine));
  const Value &key = run.out(s, 1), &value = run.out(s, 2);
  const bool half = key.type == kHalf;
  d.constant(half);
  d.buffers[1] = turned;
  d.buffers[2] = key.buffer;
  d.buffers[3] = value.buffer;
  d.buffers[4] = cosine.buffer;
  d.buffers[5] = sine.buffer;
  d.buffers[6] = before.buffer;
  const int64_t k_from = apart ? 0 : n.heads * n.dim, v_from = apart ? 0 : (n.heads + n.kv_heads) * n.dim;
  const int64_t sizes[] = {n.batch, n.tokens, n.heads, n.kv_heads, n.dim, 2 * cosine.dims.last()};
  for (int64_t size : sizes) d.word(static_cast<uint64_t>(size));
  const int64_t from[] = {0, k_from, v_from};
  for (int i = 0; i < 3; i++) {
    d.word(all[i]->element() + static_cast<uint64_t>(from[i]));
    d.word(static_cast<uint64_t>(all[i]->dims.last()));
  }
  for (uint64_t word : {turned_at / 4, key.element(), value.element(), static_cast<uint64_t>(n.capacity), before.element(),
                        cosine.element(), sine.element()})
    d.word(word);
  const int64_t threads = n.batch * n.tokens * (n.heads + 2 * n.kv_heads) * (n.dim / (half ? 4 : 2));
  d.groups[0] = static_cast<uint32_t>((threads + 63) / 64);
  return threads ? run.record(d) : nullptr;
}

}  // namespace

Failure run_cached_attention(Run& run, const Step& s) {
  const Dims& x = run.in(s, kQ).dims;
  const Dims& past = run.in(s, kPastKey).dims;
  Sizes n = {x.d[0], x.d[1], s.whole[kHeads], s.whole[kKvHeads], past.d[3], run.in(s, kTotal).whole(0), 0};
  n.capacity = past.d[2] > n.total ? past.d[2] : n.total;
  if (n.dim > kMostDim || n.dim % 2) return run.refuse(s, "heads of more than 256 numbers have no shader");
  const int kept = run.in(s, kPastKey).type;
  if (kept != run.in(s, kPastValue).type || (kept != kFloat && (kept != kHalf || n.dim % 4 || run.in(s, kCos).dims.last() % 2)))
    return run.refuse(s, "expected keys and values in float32, or in float16 where 4 divides a head and its rotated part");
  if (run.has(s, kCos) && run.in(s, kCos).dims.d[0] < n.total) return run.refuse(s, "more tokens than the rotation tables have");
  Value before;
  GPU_TRY(lengths_before(run, s, n.batch, n.tokens, &before));
  Dims present;
  for (int64_t size : {n.batch, n.kv_heads, n.capacity, n.dim}) present.push(size);
  for (int i = 1; i < 3; i++) {
    GPU_TRY(run.make_mapped(s, i, present, kept));
    GPU_TRY(carry_past(run, run.in(s, kPastKey + i - 1), run.out(s, i), n.total - n.tokens));
  }
  Dims mixed;
  for (int64_t size : {n.batch, n.tokens, n.heads * n.dim}) mixed.push(size);
  GPU_TRY(run.make(s, 0, mixed));
  Value turned = {kFloat, mixed, nullptr, nullptr, 0};
  GPU_TRY(run.temporary(static_cast<uint64_t>(mixed.count()) * 4, &turned.buffer, &turned.offset));
  GPU_TRY(rotate(run, s, n, before, turned.buffer, turned.offset));
  const uint64_t row = static_cast<uint64_t>(n.dim), head = row * static_cast<uint64_t>(n.capacity);
  const Strides strides = {head * static_cast<uint64_t>(n.kv_heads), head, row};
  return attend(run, s, turned, turned.element(), run.out(s, 1), run.out(s, 2), strides, n.batch, n.tokens, n.total, n.kv_heads,
                n.dim, kCausal, before);
}

// ---- without one ----------------------------------------------------------------------------------------------------
Failure set_padded_attention(const Node& node, Step* step) {
  step->whole[kHeads] = node.whole("num_heads", 0);
  return nullptr;
}

Failure run_padded_attention(Run& run, const Step& s) {
  Value &q = run.in(s, 0), &k = run.in(s, 1), &v = run.in(s, 2);
  const Value& mask = run.in(s, 3);
  const int64_t batch = q.dims.d[0], queries = q.dims.d[1], width = q.dims.last(), keys = k.dims.d[1], heads = s.whole[kHeads];
  const int64_t dim = heads ? width / heads : 0;
  if (q.dims.rank != 3 || k.dims.rank != 3 || v.dims.last() != width || !dim || dim > kMostDim)
    return run.refuse(s, "expected query, key and value [batch, tokens, heads * at most 256]");
  if (!mask.host || mask.type != kInt64 || mask.dims.count() != batch * keys) return run.refuse(s, "expected an int64 mask [batch, keys]");
  Array<int32_t> words;
  for (int64_t i = 0; i < batch * keys; i++) words.push(mask.whole(i) != 0);
  Value real = {kInt32, {}, nullptr, nullptr, 0};
  Failure failure = run.upload(words.data, words.count * 4, &real.buffer, &real.offset);
  words.free();
  GPU_TRY(failure);
  for (Value* value : {&q, &k, &v}) GPU_TRY(run.to_gpu(*value));
  GPU_TRY(run.make(s, 0, q.dims));
  const uint64_t row = static_cast<uint64_t>(width);
  const Strides strides = {row * static_cast<uint64_t>(keys), static_cast<uint64_t>(dim), row};
  return attend(run, s, q, q.element(), k, v, strides, batch, queries, keys, heads, dim, kPadding, real);
}
