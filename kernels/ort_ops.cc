// The ONNX operators: domain "edgepeft", AdapterMatMul_<format>_g<G>[_offset] for every format and G = 1..3.
//
//   y_g = s_out_g . ( W_g.(s_in . x) + C_g.sums + B_g.( gate_g . (A_g.x) ) ) + bias_g      sums of s_in . x over J blocks of K
//
// inputs   0 x float [..,K]   1 w uint8 [T,K/32,bytes]   2 w_scale [T,B,16]   3 s_in float [1]|[K]
//          then per group: a [R,K]   b [R,n_g]   (both float16 or both float)
//                          gate float [1]|[R]|[..,R]*  s_out float [1]|[n_g]   bias float [1]|[n_g]
//          _offset only, and last: w_offset [J,N] float16 or float, which is C
// outputs  y_g float [..,n_g]
// attributes  K, N = 16T, n0.. (rows of each group), activation "int8" | "float"
//             * [..] as x has them, or 1 in place of the last ones: tokens of a text then share its gates
// w, w_scale and w_offset are constants; all else may change from run to run. A [1] that holds 1, or 0 as a bias, costs nothing.
#include "adapter_matmul.h"
#include "ort_node.h"

const OrtApi* ort::api = nullptr;

namespace {

constexpr int kOpVersion = 3;  // ops.VERSION: nodes of an earlier one have other inputs
constexpr size_t kX = 0, kW = 1, kScale = 2, kSIn = 3, kFirstGroup = 4;                // inputs
constexpr size_t kA = 0, kB = 1, kGate = 2, kSOut = 3, kBias = 4, kPerGroup = 5;  // of a group
constexpr size_t kMaxInputs = kFirstGroup + kPerGroup * kMaxGroups + 1;

struct Op : NamedOp {
  Format format;
  int groups;
  bool offset;  // it has w_offset
};
const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }
size_t groups_end(const Op& op) { return kFirstGroup + kPerGroup * static_cast<size_t>(op.groups); }  // where w_offset is
size_t input_count(const Op& op) { return groups_end(op) + (op.offset ? 1 : 0); }

// ---- a node -------------------------------------------------------------------------------------------------------
struct Node : NodeBase {
  int64_t k, n, rows[kMaxGroups];
  Act act;
  Inputs<kMaxInputs> inputs;
};
const Op& op_of(const Node& node) { return self(node.op); }

OrtStatus* read_attributes(const OrtKernelInfo* info_, Node* node) {
  EP_TRY(ort::KernelInfoGetAttribute_int64(info_, "K", &node->k));
  EP_TRY(ort::KernelInfoGetAttribute_int64(info_, "N", &node->n));
  const char* const names[] = {"n0", "n1", "n2"};
  int64_t padded = 0;
  for (int g = 0; g < op_of(*node).groups; g++) {
    EP_TRY(ort::KernelInfoGetAttribute_int64(info_, names[g], &node->rows[g]));
    if (node->rows[g] < 1 || (op_of(*node).groups > 1 && node->rows[g] % kTileRows))
      return node->fail(names[g], op_of(*node).groups > 1 ? "a positive multiple of 16" : "at least 1", node->rows[g]);
    padded += (node->rows[g] + kTileRows - 1) / kTileRows * kTileRows;
  }
  if (node->n != padded) return node->fail("attribute N", (Text() << padded << ", the groups' rows in whole tiles of 16").s, node->n);
  const FormatInfo& f = info(op_of(*node).format);
  if (!columns_fit(f, node->k)) return node->fail("attribute K", (Text() << "a positive multiple of " << int64_t{f.act_block}).s, node->k);
  char activation[16];
  size_t size = sizeof(activation);
  EP_TRY(ort::KernelInfoGetAttribute_string(info_, "activation", activation, &size));
  if (!same(activation, "int8") && !same(activation, "float"))
    return node->fail("attribute activation", "int8 or float", static_cast<const char*>(activation));
  node->act = same(activation, "int8") ? Act::int8 : Act::float32;
  return nullptr;
}

OrtStatus* check_offset(const Node& node) {
  const size_t at = groups_end(op_of(node));
  if (!node.inputs.constant[at]) return node.fail("input w_offset", "a constant initializer", "an input of the graph or a computed value");
  const Tensor& offset = node.inputs.kept[at];
  const bool number = offset.type == kOrtHalf || offset.type == kOrtFloat;
  const int64_t blocks = offset.rank == 2 ? offset.dims[0] : 0;
  if (number && offset.is(blocks, node.n) && blocks > 0 && node.k % (blocks * kUnit) == 0) return nullptr;
  return node.fail(at, "w_offset", -1,
                   (Text() << "float16 or float32 [J," << node.n << "], K/J a multiple of " << int64_t{kUnit}).s, offset);
}

OrtStatus* read_constants(const OrtKernelInfo* info_, Node* node) {
  EP_TRY(node->inputs.read_constants(info_, input_count(op_of(*node))));
  if (!node->inputs.constant[kW] || !node->inputs.constant[kScale])
    return node->fail("inputs 1 (w) and 2 (w_scale)", "constant initializers", "an input of the graph or a computed value");
  const FormatInfo& f = info(op_of(*node).format);
  const Tensor &w = node->inputs.kept[kW], &scale = node->inputs.kept[kScale];
  const int64_t tiles = node->n / kTileRows, blocks = scale_blocks(f, node->k);
  if (!w.is(tiles, node->k / kUnit, unit_bytes(f)))
    return node->fail(kW, "w", -1, (Text() << "uint8 [" << tiles << "," << node->k / kUnit << "," << unit_bytes(f) << "]").s, w);
  if (!scale.is(tiles, blocks, kTileRows))
    return node->fail(kScale, "w_scale", -1, (Text() << "[" << tiles << "," << blocks << ",16]").s, scale);
  return op_of(*node).offset ? check_offset(*node) : nullptr;
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info_, void** kernel) {
  Node* node;
  EP_TRY(make_node(self(op), info_, &node));
  OrtStatus* status = read_attributes(info_, node);
  if (!status) status = read_constants(info_, node);
  if (status) destroy_node(node);
  else *kernel = node;
  return status;
}

// ---- one run ------------------------------------------------------------------------------------------------------
OrtStatus* read_group(const Node& node, const Tensor* const* in, int g, const Tensor& x, Group* group) {
  const size_t at = kFirstGroup + kPerGroup * static_cast<size_t>(g);
  const Tensor &a = *in[at + kA], &b = *in[at + kB], &gate = *in[at + kGate], &s_out = *in[at + kSOut], &bias = *in[at + kBias];
  group->n = node.rows[g];
  if ((a.type != kOrtHalf && a.type != kOrtFloat) || a.rank != 2 || a.dims[1] != node.k)
    return node.fail(at + kA, "a", g, (Text() << "float16 or float32 [R," << node.k << "]").s, a);
  group->rank = a.dims[0];
  group->half = a.type == kOrtHalf;
  if (b.type != a.type || !b.is(group->rank, group->n))
    return node.fail(at + kB, "b", g,
                     (Text() << (group->half ? "float16 [" : "float32 [") << group->rank << "," << group->n << "], to go with a").s, b);
  group->a = a.data;
  group->b = b.data;
  const int64_t gates = gate.rank ? gate.dims[gate.rank - 1] : 0;
  const bool for_all = gate.count == gates && (gates == 1 || gates == group->rank);  // leading dimensions of 1, if any
  bool fits = gate.rank == x.rank && gates == group->rank;
  int64_t each = 1;  // rows of x that share gates
  size_t i = 0;
  while (fits && i + 1 < x.rank && gate.dims[i] == x.dims[i]) i++;
  for (; fits && i + 1 < x.rank; i++) fits = gate.dims[i] == 1, each *= x.dims[i];
  if (!for_all && !fits)
    return node.fail(at + kGate, "gate", g,
                     (Text() << "float32 [1], [" << group->rank << "] or [..," << group->rank
                             << "] with the leading dimensions of x, or 1 for the last of them").s, gate);
  group->gate = gate.holds(1.0f) ? nullptr : gate.floats();
  group->gate_each = for_all ? x.count / node.k : each;
  group->gate_step = for_all && gates == 1 ? 0 : 1;
  if (!s_out.is(1) && !s_out.is(group->n))
    return node.fail(at + kSOut, "s_out", g, (Text() << "float32 [1] or [" << group->n << "]").s, s_out);
  group->s_out = s_out.holds(1.0f) ? nullptr : s_out.floats();
  group->s_out_step = s_out.is(1) ? 0 : 1;
  if (!bias.is(1) && !bias.is(group->n))
    return node.fail(at + kBias, "bias", g, (Text() << "float32 [1] or [" << group->n << "]").s, bias);
  group->bias = bias.holds(0.0f) ? nullptr : bias.floats();
  group->bias_step = bias.is(1) ? 0 : 1;
  return nullptr;
}

OrtStatus* read_call(const Node& node, const Tensor* const* in, Call* call) {
  const Tensor &x = *in[kX], &s_in = *in[kSIn];
  if (x.rank < 1 || x.dims[x.rank - 1] != node.k) return node.fail(kX, "x", -1, (Text() << "float32 [..," << node.k << "]").s, x);
  if (!s_in.is(1) && !s_in.is(node.k)) return node.fail(kSIn, "s_in", -1, (Text() << "float32 [1] or [" << node.k << "]").s, s_in);
  const Row* row = select_row(op_of(node).format, node.act);
  call->format = op_of(node).format;
  call->ops = row->ops;
  call->act = node.act;
  call->m = x.count / node.k;
  call->k = node.k;
  call->x = x.floats();
  call->s_in = s_in.holds(1.0f) ? nullptr : s_in.floats();
  call->s_in_step = s_in.is(1) ? 0 : 1;
  call->w = static_cast<const uint8_t*>(in[kW]->data);
  call->w_scale = in[kScale]->data;
  if (op_of(node).offset) {
    const Tensor& offset = *in[groups_end(op_of(node))];
    call->blocks = offset.dims[0];
    call->offset = offset.data;
    call->offset_half = offset.type == kOrtHalf;
  }
  call->groups = op_of(node).groups;
  for (int g = 0; g < call->groups; g++) EP_TRY(read_group(node, in, g, x, &call->group[g]));
  return nullptr;
}

OrtStatus* allocate_outputs(OrtKernelContext* context, const Tensor& x, Call* call) {
  int64_t dims[kMaxDims];
  for (size_t i = 0; i < x.rank; i++) dims[i] = x.dims[i];
  for (int g = 0; g < call->groups; g++) {
    dims[x.rank - 1] = call->group[g].n;
    EP_TRY(allocate_output(context, static_cast<size_t>(g), dims, x.rank, &call->group[g].y));
  }
  return nullptr;
}

void run_task(void* call, size_t i) { run(*static_cast<const Call*>(call), static_cast<int64_t>(i)); }

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Node& node = *static_cast<Node*>(kernel);
  Tensor now[kMaxInputs];
  const Tensor* in[kMaxInputs];
  EP_TRY(node.inputs.read(context, now, in));
  Call call = {};
  EP_TRY(read_call(node, in, &call));
  EP_TRY(allocate_outputs(context, *in[kX], &call));
  if (call.m == 0) return nullptr;
  void* scratch = node.allocator->Alloc(node.allocator, static_cast<size_t>(plan(call)) + 64);
  place(call, reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t{63}));
  OrtStatus* status = parallel(context, run_task, call.tasks, &call);
  node.allocator->Free(node.allocator, scratch);
  return status;
}

// y_g has the dimensions of x, names included, but for the last.
OrtStatus* infer_shapes(const OrtCustomOp* op, OrtShapeInferContext* context) {
  Shape y;
  EP_TRY(y.read(context, kX));
  if (!y.rank) return nullptr;
  const char* const attributes[] = {"n0", "n1", "n2"};
  for (int g = 0; g < self(op).groups; g++) {
    const OrtOpAttr* attribute = nullptr;
    size_t size = 0;
    int64_t rows = 0;
    EP_TRY(ort::ShapeInferContext_GetAttribute(context, attributes[g], &attribute));
    EP_TRY(ort::ReadOpAttr(attribute, kOrtAttributeInt, static_cast<void*>(&rows), sizeof(rows), &size));
    y.set(y.rank - 1, rows);
    EP_TRY(y.write(context, static_cast<size_t>(g)));
  }
  return nullptr;
}

OrtElement input_type(const OrtCustomOp* op, size_t i) {
  if (i == kW) return kOrtUint8;
  if (i == kScale) return info(self(op).format).half_scale ? kOrtHalf : kOrtFloat;
  if (i == groups_end(self(op))) return kOrtAny;  // what any admits, check_offset and read_group narrow
  const bool adapter = i >= kFirstGroup && (i - kFirstGroup) % kPerGroup <= kB;
  return adapter ? kOrtAny : kOrtFloat;
}

void define(Op& op, Format f, int groups, bool offset) {
  define(op, (Text() << "AdapterMatMul_" << info(f).tag << "_g" << int64_t{groups} << (offset ? "_offset" : "")).s);
  op.format = f;
  op.groups = groups;
  op.offset = offset;
  op.GetInputType = input_type;
  op.GetInputTypeCount = [](const OrtCustomOp* o) { return input_count(self(o)); };
  op.GetOutputTypeCount = [](const OrtCustomOp* o) { return static_cast<size_t>(self(o).groups); };
  op.GetStartVersion = [](const OrtCustomOp*) { return kOpVersion; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.InferOutputShapeFn = infer_shapes;
}

Op g_ops[static_cast<int>(Format::count) * kMaxGroups * 2];

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  if (!api) {  // older than 1.18: its first table still knows how to say so
    ort::api = base->GetApi(1);
    return ort::CreateStatus(kOrtFail, (Text() << "edgepeft: expected ONNX Runtime 1.18 or later, found " << base->GetVersionString()).s);
  }
  ort::api = api;
  const char* digit = base->GetVersionString() + 2;  // behind "1."
  for (ort::release = 0; *digit >= '0' && *digit <= '9'; digit++) ort::release = 10 * ort::release + *digit - '0';
  OrtCustomOpDomain* domain;  // ORT keeps the pointer as long as any session lives, so it is never released
  EP_TRY(ort::CreateCustomOpDomain("edgepeft", &domain));
  for (int f = 0; f < static_cast<int>(Format::count); f++)
    for (int i = 0; i < 2 * kMaxGroups; i++) {
      Op& op = g_ops[f * 2 * kMaxGroups + i];
      define(op, static_cast<Format>(f), i / 2 + 1, i % 2);
      EP_TRY(ort::CustomOpDomain_Add(domain, &op));
    }
  EP_TRY(add_functions(domain));
  EP_TRY(add_attention(domain));
  return ort::AddCustomOpDomain(options, domain);
}
