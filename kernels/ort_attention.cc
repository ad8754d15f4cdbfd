// The ONNX operator of extend_cache and cached_attention, domain "edgepeft", as com.microsoft's of the same name:
//
//   GroupQueryAttention   q float [B,S,H*D]   k, v float [B,S,KV*D], or q alone, [B,S,(H+2*KV)*D]
//                         past_key, past_value float [B,KV,P,D]   seqlens_k int32 [B]   total_sequence_length int32
//                         cos_cache, sin_cache float [places,rotated/2]
//                         -> y float [B,S,H*D]   present_key, present_value float [B,KV,max(P,total),D]
//
// with attributes num_heads, kv_num_heads, scale (0: 1/sqrt(D)), softcap, local_window_size (-1: all), do_rotary (1) and
// rotary_interleaved (0). Where S is the total there is no past, and a text may be padded on the right; else seqlens_k is
// the place of a text's last token. Bound to the memory of the past, the present is written in place. A window has the
// keys that it has in the ONNX Runtime at hand: before 1.24 one more than its size.
#include "ort_function.h"

int ort::release = 0;

namespace {

enum Input { kQ, kK, kV, kPastKey, kPastValue, kLast, kTotal, kCosine, kSine, kInputs };
constexpr int64_t kColumns = 16;     // what heads, and what is rotated of them, are multiples of
constexpr int kWindowsChanged = 24;  // 1.24
constexpr int64_t kNoWindow = int64_t{1} << 60;

struct Node : NodeBase {
  int64_t heads, kv_heads, window;
  float scale, softcap;
  Inputs<kInputs> inputs;
};

OrtStatus* read_attributes(const OrtKernelInfo* info, Node* node) {
  int64_t rotates = 0, interleaved = 0;
  EP_TRY(ort::KernelInfoGetAttribute_int64(info, "num_heads", &node->heads));
  EP_TRY(ort::KernelInfoGetAttribute_int64(info, "kv_num_heads", &node->kv_heads));
  EP_TRY(ort::KernelInfoGetAttribute_int64(info, "local_window_size", &node->window));
  EP_TRY(ort::KernelInfoGetAttribute_int64(info, "do_rotary", &rotates));
  EP_TRY(ort::KernelInfoGetAttribute_int64(info, "rotary_interleaved", &interleaved));
  EP_TRY(ort::KernelInfoGetAttribute_float(info, "scale", &node->scale));
  EP_TRY(ort::KernelInfoGetAttribute_float(info, "softcap", &node->softcap));
  if (node->kv_heads < 1) return node->fail("attribute kv_num_heads", "at least 1", node->kv_heads);
  if (node->heads < 1 || node->heads % node->kv_heads || node->heads / node->kv_heads > CachedCall::kGroup)
    return node->fail("attribute num_heads", (Text() << "1 to 64 times " << node->kv_heads).s, node->heads);
  if (rotates != 1) return node->fail("attribute do_rotary", "1", rotates);
  if (interleaved != 0) return node->fail("attribute rotary_interleaved", "0", interleaved);
  if (node->window <= 0) node->window = kNoWindow;
  else if (ort::release < kWindowsChanged) node->window++;
  return nullptr;
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
  Node* node;
  EP_TRY(make_node(*static_cast<const NamedOp*>(op), info, &node));
  OrtStatus* status = read_attributes(info, node);
  if (!status) status = node->inputs.read_constants(info, kInputs);
  if (status) destroy_node(node);
  else *kernel = node;
  return status;
}

// ---- one run ------------------------------------------------------------------------------------------------------
OrtStatus* read_cache(const Node& node, const Tensor* const* in, CachedCall* call) {
  const Tensor &key = *in[kPastKey], &value = *in[kPastValue];
  const int64_t d = key.rank == 4 ? key.dims[3] : 0;
  if (key.rank != 4 || key.dims[1] != node.kv_heads || d < kColumns || d % kColumns || d > kHeadColumns)
    return node.fail(kPastKey, "past_key", -1, (Text() << "float32 [B," << node.kv_heads << ",P,D], D of 16, 32, .. " << kHeadColumns).s, key);
  if (!value.is_like(key)) return node.fail(kPastValue, "past_value", -1, (Text() << key << ", as past_key is").s, value);
  call->texts = key.dims[0];
  call->kv_heads = node.kv_heads;
  call->past_capacity = key.dims[2];
  call->columns = d;
  call->past_key = key.floats();
  call->past_value = value.floats();
  return nullptr;
}

// q, k and v in three inputs or behind each other in one.
OrtStatus* read_tokens(const Node& node, const Tensor* const* in, CachedCall* call) {
  const Tensor &q = *in[kQ], &k = *in[kK], &v = *in[kV];
  const int64_t own = node.heads * call->columns, shared = node.kv_heads * call->columns, width = k.data ? own : own + 2 * shared;
  call->heads = node.heads;
  call->tokens = q.rank == 3 ? q.dims[1] : 0;
  if (!q.is(call->texts, call->tokens, width))
    return node.fail(kQ, "q", -1, (Text() << "float32 [" << call->texts << ",S," << width << "]").s, q);
  call->q = q.floats();
  call->q_stride = call->kv_stride = width;
  call->k = call->q + own;
  call->v = call->k + shared;
  if (!k.data) return nullptr;
  const Text expected = Text() << "float32 [" << call->texts << "," << call->tokens << "," << shared << "]";
  if (!k.is(call->texts, call->tokens, shared)) return node.fail(kK, "k", -1, expected.s, k);
  if (!v.data || !v.is_like(k)) return node.fail(kV, "v", -1, expected.s, v);
  call->kv_stride = shared;
  call->k = k.floats();
  call->v = v.floats();
  return nullptr;
}

OrtStatus* read_places(const Node& node, const Tensor* const* in, CachedCall* call) {
  const Tensor &last = *in[kLast], &total = *in[kTotal], &cosine = *in[kCosine], &sine = *in[kSine];
  if (last.count != call->texts) return node.fail(kLast, "seqlens_k", -1, (Text() << "int32 [" << call->texts << "]").s, last);
  if (total.count != 1) return node.fail(kTotal, "total_sequence_length", -1, "one int32", total);
  const int64_t all = *static_cast<const int32_t*>(total.data);
  call->last = static_cast<const int32_t*>(last.data);
  call->fresh = call->tokens == all;
  for (int64_t text = 0; text < call->texts; text++)
    if (call->before(text) < 0 || call->before(text) + call->tokens > all)
      return node.fail((Text() << "input 5 (seqlens_k), element " << text).s,
                       (Text() << call->tokens - 1 << ".." << all - 1 << " for " << call->tokens << " tokens").s, int64_t{call->last[text]});
  call->half = cosine.rank == 2 ? cosine.dims[1] : 0;
  if (cosine.rank != 2 || cosine.dims[0] < all || 2 * call->half % kColumns || 2 * call->half > call->columns)
    return node.fail(kCosine, "cos_cache", -1, (Text() << "float32 [at least " << all << ",8, 16, .. " << call->columns / 2 << "]").s, cosine);
  if (!sine.is_like(cosine)) return node.fail(kSine, "sin_cache", -1, (Text() << cosine << ", as cos_cache is").s, sine);
  call->cosine = cosine.floats();
  call->sine = sine.floats();
  call->total = all;
  call->capacity = all > call->past_capacity ? all : call->past_capacity;
  call->window = node.window;
  call->softcap = node.softcap;
  call->scale = node.scale != 0 ? node.scale : 1 / __builtin_sqrtf(static_cast<float>(call->columns));
  return nullptr;
}

OrtStatus* allocate_outputs(OrtKernelContext* context, CachedCall* call) {
  const int64_t mixed[] = {call->texts, call->tokens, call->heads * call->columns};
  const int64_t cache[] = {call->texts, call->kv_heads, call->capacity, call->columns};
  EP_TRY(allocate_output(context, 0, mixed, 3, &call->y));
  EP_TRY(allocate_output(context, 1, cache, 4, &call->key));
  return allocate_output(context, 2, cache, 4, &call->value);
}

OrtStatus* run(OrtKernelContext* context, Function function, const CachedCall& call, int64_t rows, int64_t cost) {
  FunctionJob job = {};
  job.call = &call;
  job.rows = rows;
  job.cost = cost;
  return run_function(context, function, job, true);
}

// What the parts of a single token's keys come to, in memory of its own; rows and cost are those of a part.
OrtStatus* run_parts(OrtKernelContext* context, const Node& node, CachedCall& call, int64_t heads, int64_t cost) {
  const int64_t floats = heads * call.parts() * call.group() * (call.columns + 2);
  call.shares = static_cast<float*>(node.allocator->Alloc(node.allocator, static_cast<size_t>(floats + heads) * 4));
  call.left = reinterpret_cast<int32_t*>(call.shares + floats);
  for (int64_t head = 0; head < heads; head++) call.left[head] = static_cast<int32_t>(call.parts());
  OrtStatus* status = run(context, Function::cached_attention, call, heads * call.parts(), cost);
  node.allocator->Free(node.allocator, call.shares);
  return status;
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Node& node = *static_cast<Node*>(kernel);
  Tensor now[kInputs];
  const Tensor* in[kInputs];
  EP_TRY(node.inputs.read(context, now, in));
  CachedCall call = {};
  EP_TRY(read_cache(node, in, &call));
  EP_TRY(read_tokens(node, in, &call));
  EP_TRY(read_places(node, in, &call));
  EP_TRY(allocate_outputs(context, &call));
  const int64_t heads = call.texts * call.kv_heads, rows = call.together() * call.group();
  EP_TRY(run(context, Function::extend_cache, call, heads, 1 + 2 * call.tokens * call.columns));
  if (call.parts() > 1) return run_parts(context, node, call, heads, attention_cost(rows, call.part_keys(), call.columns));
  return run(context, Function::cached_attention, call, heads * call.blocks(), attention_cost(rows, call.total, call.columns));
}

NamedOp g_op;

}  // namespace

OrtStatus* add_attention(OrtCustomOpDomain* domain) {
  define(g_op, "GroupQueryAttention");
  g_op.GetInputType = [](const OrtCustomOp*, size_t i) { return i == kLast || i == kTotal ? kOrtInt32 : kOrtFloat; };
  g_op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return i == kK || i == kV ? kOrtOptional : kOrtRequired; };
  g_op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t{kInputs}; };
  g_op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{3}; };
  g_op.CreateKernelV2 = create;
  g_op.KernelComputeV2 = compute;
  return ort::CustomOpDomain_Add(domain, &g_op);
}
