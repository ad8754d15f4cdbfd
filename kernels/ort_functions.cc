// The ONNX operators of functions.h, domain "edgepeft":
//
//   RMSNorm                   x float [..,H]   weight float [H]                          -> y float [..,H]
//   SkipRMSNorm               x, skip float [..,H]   weight float [H]                    -> y, sum float [..,H]
//   SkipLayerNorm             x, skip float [..,H]   weight, bias float [H]              -> y float [..,H]
//   ErfGelu                   x float [..,N]                                             -> y float [..,N]
//   GatedActivation_<act>     gate, up float [..,N]                                      -> y float [..,N]
//   PackedEmbedding_<format>  ids int64 [..]   w uint8 [T,K/32,bytes]   scale [T,B,16]   -> y float [..,K]
//   RowEmbedding_i<b>b32      ids int64 [..]   w uint8 [V,K*b/8]   scale float16 [V,K/32] -> y float [..,K]
//   PaddedAttention[_one]     q float [B,Q,H]   k, v float [B,S,H]   mask int64 [B,S]    -> y float [B,Q,H]
//
// The norms have an attribute epsilon (float), attention one of num_heads (int); _one is the same with a body for Q = 1.
// Any input may change from run to run. An id that names no row of w, from either end, is refused.
#include "ort_function.h"

namespace {

constexpr size_t kMostInputs = 4;

struct Op : NamedOp {
  Function function;
  Format format;  // packed_embedding
  int bits;       // row_embedding
  size_t inputs, outputs;
};
const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

struct Node : NodeBase {
  float epsilon;
  int64_t heads;
  Inputs<kMostInputs> inputs;
};
const Op& op_of(const Node& node) { return self(node.op); }
bool is_norm(Function f) { return f == Function::rms_norm || f == Function::layer_norm; }
bool is_embedding(Function f) { return f == Function::packed_embedding || f == Function::row_embedding; }

OrtStatus* read_attributes(const OrtKernelInfo* info_, Node* node) {
  if (is_norm(op_of(*node).function)) return ort::KernelInfoGetAttribute_float(info_, "epsilon", &node->epsilon);
  if (op_of(*node).function != Function::attention) return nullptr;
  EP_TRY(ort::KernelInfoGetAttribute_int64(info_, "num_heads", &node->heads));
  return node->heads > 0 ? nullptr : node->fail("attribute num_heads", "at least 1", node->heads);
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info_, void** kernel) {
  Node* node;
  EP_TRY(make_node(self(op), info_, &node));
  OrtStatus* status = read_attributes(info_, node);
  if (!status) status = node->inputs.read_constants(info_, self(op).inputs);
  if (status) destroy_node(node);
  else *kernel = node;
  return status;
}

// ---- one run ------------------------------------------------------------------------------------------------------
void take_rows(const Tensor& x, FunctionJob* job) {
  job->x = x.floats();
  job->columns = x.dims[x.rank - 1];
  job->rows = job->columns ? x.count / job->columns : 0;
}

OrtStatus* read_norm(const Node& node, const Tensor* const* in, FunctionJob* job) {
  const bool layer = op_of(node).function == Function::layer_norm, skip = layer || op_of(node).inputs == 3;
  const size_t at = skip ? 2 : 1;  // of the weight
  const Tensor &x = *in[0], &weight = *in[at];
  if (x.rank < 1) return node.fail(0, "x", -1, "float32 [..,H]", x);
  take_rows(x, job);
  if (skip && !in[1]->is_like(x)) return node.fail(1, "skip", -1, (Text() << x << ", as x is").s, *in[1]);
  if (skip) job->other = in[1]->floats();
  if (!weight.is(job->columns)) return node.fail(at, "weight", -1, (Text() << "float32 [" << job->columns << "]").s, weight);
  job->weight = weight.floats();
  job->epsilon = node.epsilon;
  if (!layer) return nullptr;
  if (!in[3]->is(job->columns)) return node.fail(3, "bias", -1, (Text() << "float32 [" << job->columns << "]").s, *in[3]);
  job->bias = in[3]->floats();
  return nullptr;
}

OrtStatus* read_gelu(const Node& node, const Tensor* const* in, FunctionJob* job) {
  if (in[0]->rank < 1) return node.fail(0, "x", -1, "float32 [..,N]", *in[0]);
  take_rows(*in[0], job);
  return nullptr;
}

OrtStatus* read_gated(const Node& node, const Tensor* const* in, FunctionJob* job) {
  const Tensor &gate = *in[0], &up = *in[1];
  if (gate.rank < 1) return node.fail(0, "gate", -1, "float32 [..,N]", gate);
  if (!up.is_like(gate)) return node.fail(1, "up", -1, (Text() << gate << ", as gate is").s, up);
  take_rows(gate, job);
  job->other = up.floats();
  return nullptr;
}

// Ids of a weight of some rows; what is read of each is K long.
OrtStatus* read_ids(const Node& node, const Tensor& ids, int64_t rows, int64_t k, FunctionJob* job) {
  if (ids.rank == kMaxDims) return node.fail(0, "ids", -1, "at most 7 dimensions", ids);
  job->ids = static_cast<const int64_t*>(ids.data);
  for (int64_t i = 0; i < ids.count; i++)
    if (job->ids[i] < 0 || job->ids[i] >= rows)
      return node.fail((Text() << "input 0 (ids), element " << i).s, (Text() << "0.." << rows - 1).s, job->ids[i]);
  job->rows = ids.count;
  job->columns = k;
  return nullptr;
}

OrtStatus* read_tiles(const Node& node, const Tensor* const* in, FunctionJob* job) {
  const Tensor &w = *in[1], &scale = *in[2];
  const FormatInfo& f = info(op_of(node).format);
  if (w.rank != 3 || w.dims[2] != unit_bytes(f) || !columns_fit(f, w.dims[1] * kUnit))
    return node.fail(1, "w", -1,
                     (Text() << "uint8 [T,K/32," << unit_bytes(f) << "] with K a multiple of " << int64_t{f.act_block}).s, w);
  const int64_t tiles = w.dims[0], k = w.dims[1] * kUnit;
  if (!scale.is(tiles, scale_blocks(f, k), kTileRows))
    return node.fail(2, "scale", -1, (Text() << "[" << tiles << "," << scale_blocks(f, k) << ",16]").s, scale);
  job->format = op_of(node).format;
  job->w = static_cast<const uint8_t*>(w.data);
  job->w_scale = scale.data;
  return read_ids(node, *in[0], tiles * kTileRows, k, job);
}

OrtStatus* read_rows(const Node& node, const Tensor* const* in, FunctionJob* job) {
  const Tensor &w = *in[1], &scale = *in[2];
  const int64_t bytes = kEmbeddingBlock * op_of(node).bits / 8;  // of a block
  if (w.rank != 2 || !w.dims[1] || w.dims[1] % bytes)
    return node.fail(1, "w", -1, (Text() << "uint8 [V,K*" << int64_t{op_of(node).bits} << "/8] with K a multiple of 32").s, w);
  const int64_t rows = w.dims[0], blocks = w.dims[1] / bytes;
  if (!scale.is(rows, blocks)) return node.fail(2, "scale", -1, (Text() << "[" << rows << "," << blocks << "]").s, scale);
  job->bits = op_of(node).bits;
  job->w = static_cast<const uint8_t*>(w.data);
  job->w_scale = scale.data;
  return read_ids(node, *in[0], rows, blocks * kEmbeddingBlock, job);
}

OrtStatus* read_attention(const Node& node, const Tensor* const* in, FunctionJob* job) {
  const Tensor &q = *in[0], &k = *in[1], &v = *in[2], &mask = *in[3];
  const int64_t width = q.rank == 3 ? q.dims[2] : 0;
  if (!width || width % node.heads || width / node.heads > kHeadColumns)
    return node.fail(0, "q", -1, (Text() << "float32 [B,Q," << node.heads << "*D], D of 1.." << kHeadColumns).s, q);
  if (!k.is(q.dims[0], k.rank == 3 ? k.dims[1] : 0, width))
    return node.fail(1, "k", -1, (Text() << "float32 [" << q.dims[0] << ",S," << width << "]").s, k);
  if (!v.is_like(k)) return node.fail(2, "v", -1, (Text() << k << ", as k is").s, v);
  if (!mask.is(k.dims[0], k.dims[1])) return node.fail(3, "mask", -1, (Text() << "int64 [" << k.dims[0] << "," << k.dims[1] << "]").s, mask);
  job->heads = node.heads;
  job->rows = q.dims[0] * node.heads;
  job->columns = width / node.heads;
  job->queries = q.dims[1];
  job->keys = k.dims[1];
  job->cost = attention_cost(job->queries, job->keys, job->columns);
  job->q = q.floats();
  job->k = k.floats();
  job->v = v.floats();
  job->mask = static_cast<const int64_t*>(mask.data);
  return nullptr;
}

OrtStatus* read_job(const Node& node, const Tensor* const* in, FunctionJob* job) {
  switch (op_of(node).function) {
    case Function::rms_norm:
    case Function::layer_norm: return read_norm(node, in, job);
    case Function::gelu: return read_gelu(node, in, job);
    case Function::packed_embedding: return read_tiles(node, in, job);
    case Function::row_embedding: return read_rows(node, in, job);
    case Function::attention: return read_attention(node, in, job);
    default: return read_gated(node, in, job);
  }
}

// y, and sum where there is one: the dimensions of the first input, and after those of ids K.
OrtStatus* allocate_outputs(OrtKernelContext* context, const Op& op, const Tensor& first, FunctionJob* job) {
  int64_t dims[kMaxDims];
  size_t rank = first.rank;
  for (size_t i = 0; i < rank; i++) dims[i] = first.dims[i];
  if (is_embedding(op.function)) dims[rank++] = job->columns;
  EP_TRY(allocate_output(context, 0, dims, rank, &job->y));
  return op.outputs == 2 ? allocate_output(context, 1, dims, rank, &job->sum) : nullptr;
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Node& node = *static_cast<Node*>(kernel);
  Tensor now[kMostInputs];
  const Tensor* in[kMostInputs];
  EP_TRY(node.inputs.read(context, now, in));
  FunctionJob job = {};
  EP_TRY(read_job(node, in, &job));
  EP_TRY(allocate_outputs(context, op_of(node), *in[0], &job));
  return run_function(context, op_of(node).function, job);
}

OrtStatus* infer_shapes(const OrtCustomOp* op, OrtShapeInferContext* context) {
  Shape y, w;
  EP_TRY(y.read(context, 0));
  const bool tiles = self(op).function == Function::packed_embedding, embedding = is_embedding(self(op).function);
  if (embedding) EP_TRY(w.read(context, 1));
  if (!y.rank || (embedding && (w.rank != (tiles ? 3 : 2) || y.rank == kMaxDims))) return nullptr;
  if (embedding) y.set(y.rank++, tiles ? w.dims[1] * kUnit : w.dims[1] * 8 / self(op).bits);
  for (size_t i = 0; i < self(op).outputs; i++) EP_TRY(y.write(context, i));
  return nullptr;
}

OrtElement input_type(const OrtCustomOp* op, size_t i) {
  const Function f = self(op).function;
  if (f == Function::attention && i == 3) return kOrtInt64;
  if (!is_embedding(f)) return kOrtFloat;
  if (f == Function::row_embedding && i == 2) return kOrtHalf;
  return i == 0 ? kOrtInt64 : i == 1 ? kOrtUint8 : info(self(op).format).half_scale ? kOrtHalf : kOrtFloat;
}

// ---- the table ----------------------------------------------------------------------------------------------------
constexpr int kOps = 10 + static_cast<int>(Format::count);
Op g_ops[kOps];

Op& define(int i, const char* name, Function function, size_t inputs, size_t outputs) {
  Op& op = g_ops[i];
  define(op, name);
  op.function = function;
  op.inputs = inputs;
  op.outputs = outputs;
  op.GetInputType = input_type;
  op.GetInputTypeCount = [](const OrtCustomOp* o) { return self(o).inputs; };
  op.GetOutputTypeCount = [](const OrtCustomOp* o) { return self(o).outputs; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.InferOutputShapeFn = infer_shapes;
  return op;
}

}  // namespace

OrtStatus* add_functions(OrtCustomOpDomain* domain) {
  int n = 0;
  define(n++, "RMSNorm", Function::rms_norm, 2, 1);
  define(n++, "SkipRMSNorm", Function::rms_norm, 3, 2);
  define(n++, "SkipLayerNorm", Function::layer_norm, 4, 1);
  define(n++, "ErfGelu", Function::gelu, 1, 1);
  define(n++, "GatedActivation_silu", Function::gated_silu, 2, 1);
  define(n++, "GatedActivation_gelu_tanh", Function::gated_gelu_tanh, 2, 1);
  define(n++, "RowEmbedding_i4b32", Function::row_embedding, 3, 1).bits = 4;
  define(n++, "RowEmbedding_i8b32", Function::row_embedding, 3, 1).bits = 8;
  define(n++, "PaddedAttention", Function::attention, 4, 1);
  define(n++, "PaddedAttention_one", Function::attention, 4, 1);
  for (int f = 0; f < static_cast<int>(Format::count); f++) {
    const Format format = static_cast<Format>(f);
    define(n++, (Text() << "PackedEmbedding_" << info(format).tag).s, Function::packed_embedding, 3, 1).format = format;
  }
  for (int i = 0; i < kOps; i++) EP_TRY(ort::CustomOpDomain_Add(domain, &g_ops[i]));
  return nullptr;
}
