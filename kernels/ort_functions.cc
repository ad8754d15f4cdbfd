// The ONNX operators of functions.h, domain "edgepeft":
//
//   RMSNorm                   x float [..,H]   weight float [H]                          -> y float [..,H]
//   SkipRMSNorm               x, skip float [..,H]   weight float [H]                    -> y, sum float [..,H]
//   GatedActivation_<act>     gate, up float [..,N]                                      -> y float [..,N]
//   PackedEmbedding_<format>  ids int64 [..]   w uint8 [T,K/32,bytes]   scale [T,B,16]   -> y float [..,K]
//
// The norms have an attribute epsilon (float). Any input may change from run to run. An id that names no row of w, from
// either end, is refused.
#include "functions.h"
#include "ort_node.h"

namespace {

constexpr size_t kMostInputs = 3;

struct Op : NamedOp {
  Function function;
  Format format;  // packed_embedding
  size_t inputs, outputs;
};
const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

struct Node : NodeBase {
  float epsilon;
  Inputs<kMostInputs> inputs;
};
const Op& op_of(const Node& node) { return self(node.op); }

OrtStatus* create(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info_, void** kernel) {
  Node* node;
  EP_TRY(make_node(self(op), info_, &node));
  OrtStatus* status = nullptr;
  if (self(op).function == Function::rms_norm) status = ort::KernelInfoGetAttribute_float(info_, "epsilon", &node->epsilon);
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
  const size_t last = op_of(node).inputs - 1;
  const Tensor &x = *in[0], &weight = *in[last];
  if (x.rank < 1) return node.fail(0, "x", -1, "float32 [..,H]", x);
  take_rows(x, job);
  if (last == 2 && !in[1]->is_like(x)) return node.fail(1, "skip", -1, (Text() << x << ", as x is").s, *in[1]);
  if (last == 2) job->other = in[1]->floats();
  if (!weight.is(job->columns)) return node.fail(last, "weight", -1, (Text() << "float32 [" << job->columns << "]").s, weight);
  job->weight = weight.floats();
  job->epsilon = node.epsilon;
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

OrtStatus* read_embedding(const Node& node, const Tensor* const* in, FunctionJob* job) {
  const Tensor &ids = *in[0], &w = *in[1], &scale = *in[2];
  const FormatInfo& f = info(op_of(node).format);
  if (ids.rank == kMaxDims) return node.fail(0, "ids", -1, "at most 7 dimensions", ids);
  if (w.rank != 3 || w.dims[2] != unit_bytes(f) || !columns_fit(f, w.dims[1] * kUnit))
    return node.fail(1, "w", -1,
                     (Text() << "uint8 [T,K/32," << unit_bytes(f) << "] with K a multiple of " << int64_t{f.act_block}).s, w);
  const int64_t tiles = w.dims[0], k = w.dims[1] * kUnit, rows = tiles * kTileRows;
  if (!scale.is(tiles, scale_blocks(f, k), kTileRows))
    return node.fail(2, "scale", -1, (Text() << "[" << tiles << "," << scale_blocks(f, k) << ",16]").s, scale);
  job->ids = static_cast<const int64_t*>(ids.data);
  for (int64_t i = 0; i < ids.count; i++)
    if (job->ids[i] < 0 || job->ids[i] >= rows)
      return node.fail((Text() << "input 0 (ids), element " << i).s, (Text() << "0.." << rows - 1).s, job->ids[i]);
  job->rows = ids.count;
  job->columns = k;
  job->format = op_of(node).format;
  job->w = static_cast<const uint8_t*>(w.data);
  job->w_scale = scale.data;
  return nullptr;
}

OrtStatus* read_job(const Node& node, const Tensor* const* in, FunctionJob* job) {
  if (op_of(node).function == Function::rms_norm) return read_norm(node, in, job);
  if (op_of(node).function == Function::packed_embedding) return read_embedding(node, in, job);
  return read_gated(node, in, job);
}

// y, and sum where there is one: the dimensions of the first input, and after those of ids K.
OrtStatus* allocate_outputs(OrtKernelContext* context, const Op& op, const Tensor& first, FunctionJob* job) {
  int64_t dims[kMaxDims];
  size_t rank = first.rank;
  for (size_t i = 0; i < rank; i++) dims[i] = first.dims[i];
  if (op.function == Function::packed_embedding) dims[rank++] = job->columns;
  EP_TRY(allocate_output(context, 0, dims, rank, &job->y));
  return op.outputs == 2 ? allocate_output(context, 1, dims, rank, &job->sum) : nullptr;
}

struct Work {
  const FunctionRow* row;
  FunctionJob job;
};
void run_task(void* work, size_t task) {
  const Work& w = *static_cast<const Work*>(work);
  w.row->ops->run(function_task(w.job, static_cast<int64_t>(task)));
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Node& node = *static_cast<Node*>(kernel);
  Tensor now[kMostInputs];
  const Tensor* in[kMostInputs];
  EP_TRY(node.inputs.read(context, now, in));
  Work work = {select_function(op_of(node).function), {}};
  EP_TRY(read_job(node, in, &work.job));
  EP_TRY(allocate_outputs(context, op_of(node), *in[0], &work.job));
  return parallel(context, run_task, function_tasks(work.job), &work);
}

OrtStatus* infer_shapes(const OrtCustomOp* op, OrtShapeInferContext* context) {
  Shape y, w;
  EP_TRY(y.read(context, 0));
  const bool embedding = self(op).function == Function::packed_embedding;
  if (embedding) EP_TRY(w.read(context, 1));
  if (!y.rank || (embedding && (w.rank != 3 || y.rank == kMaxDims))) return nullptr;
  if (embedding) y.set(y.rank++, w.dims[1] * kUnit);
  for (size_t i = 0; i < self(op).outputs; i++) EP_TRY(y.write(context, i));
  return nullptr;
}

OrtElement input_type(const OrtCustomOp* op, size_t i) {
  if (self(op).function != Function::packed_embedding) return kOrtFloat;
  return i == 0 ? kOrtInt64 : i == 1 ? kOrtUint8 : info(self(op).format).half_scale ? kOrtHalf : kOrtFloat;
}

// ---- the table ----------------------------------------------------------------------------------------------------
constexpr int kOps = 4 + static_cast<int>(Format::count);
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
  define(0, "RMSNorm", Function::rms_norm, 2, 1);
  define(1, "SkipRMSNorm", Function::rms_norm, 3, 2);
  define(2, "GatedActivation_silu", Function::gated_silu, 2, 1);
  define(3, "GatedActivation_gelu_tanh", Function::gated_gelu_tanh, 2, 1);
  for (int f = 0; f < static_cast<int>(Format::count); f++) {
    const Format format = static_cast<Format>(f);
    define(4 + f, (Text() << "PackedEmbedding_" << info(format).tag).s, Function::packed_embedding, 3, 1).format = format;
  }
  for (int i = 0; i < kOps; i++) EP_TRY(ort::CustomOpDomain_Add(domain, &g_ops[i]));
  return nullptr;
}
