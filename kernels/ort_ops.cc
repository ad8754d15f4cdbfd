// The ONNX operators: domain "edgepeft", AdapterMatMul_<format>_g<G> for every format and G = 1..3.
//
//   y_g = s_out_g . ( W_g.(s_in . x) + B_g.( gate_g . (A_g.x) ) ) + bias_g
//
// inputs   0 x float [..,K]   1 w uint8 [T,K/32,bytes]   2 w_scale [T,B,16]   3 bias float [16T]   4 s_in float [1]|[K]
//          then per group: a [R,K]   b [n_g,R]   (both float16 or both float)
//                          gate float [1]|[R]|[..,R]   s_out float [1]|[n_g]
// outputs  y_g float [..,n_g]
// attributes  K, N = 16T, n0.. (rows of each group), activation "int8" | "float"
// w and w_scale are constants; all else may change from run to run. A [1] that holds 1 costs nothing.
#include "adapter_matmul.h"
#include "ort_abi.h"

const OrtApi* ort::api = nullptr;

namespace {

#define EP_TRY(call)                            \
  do {                                          \
    if (OrtStatus* status = (call)) return status; \
  } while (0)

constexpr size_t kMaxDims = 8;
constexpr size_t kX = 0, kW = 1, kScale = 2, kBias = 3, kSIn = 4, kFirstGroup = 5;  // inputs
constexpr size_t kA = 0, kB = 1, kGate = 2, kSOut = 3, kPerGroup = 4;               // of a group
constexpr size_t kMaxInputs = kFirstGroup + kPerGroup * kMaxGroups;

struct Op : OrtCustomOp {
  Format format;
  int groups;
  char name[48];
};
const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }
size_t input_count(const Op& op) { return kFirstGroup + kPerGroup * static_cast<size_t>(op.groups); }

// ---- tensors and messages -----------------------------------------------------------------------------------------
struct Tensor {
  void* data;
  OrtElement type;
  size_t rank;
  int64_t dims[kMaxDims];
  int64_t count;

  const float* floats() const { return static_cast<const float*>(data); }
  bool is(int64_t a) const { return rank == 1 && dims[0] == a; }
  bool is(int64_t a, int64_t b) const { return rank == 2 && dims[0] == a && dims[1] == b; }
  bool is(int64_t a, int64_t b, int64_t c) const { return rank == 3 && dims[0] == a && dims[1] == b && dims[2] == c; }
  bool neutral() const { return count == 1 && floats()[0] == 1.0f; }
};

struct Text {
  char s[640];
  size_t n = 0;
  Text() { s[0] = 0; }
  Text& operator<<(const char* t) {
    while (*t && n < sizeof(s) - 1) s[n++] = *t++;
    s[n] = 0;
    return *this;
  }
  Text& operator<<(int64_t v) {
    char digits[24];
    int i = 24;
    digits[--i] = 0;
    uint64_t u = v < 0 ? 0 - static_cast<uint64_t>(v) : static_cast<uint64_t>(v);
    do digits[--i] = static_cast<char>('0' + u % 10);
    while (u /= 10);
    if (v < 0) digits[--i] = '-';
    return *this << digits + i;
  }
  Text& operator<<(const Tensor& t) {
    const bool known = t.type == kOrtFloat || t.type == kOrtHalf || t.type == kOrtUint8;
    *this << (!known ? "another type [" : t.type == kOrtFloat ? "float32 [" : t.type == kOrtHalf ? "float16 [" : "uint8 [");
    for (size_t i = 0; i < t.rank; i++) *this << (i ? "," : "") << t.dims[i];
    return *this << "]";
  }
};

OrtStatus* view(const OrtValue* value, Tensor* t) {
  OrtTensorTypeAndShapeInfo* shape;
  EP_TRY(ort::GetTensorTypeAndShape(value, &shape));
  OrtStatus* status = ort::GetTensorElementType(shape, &t->type);
  if (!status) status = ort::GetDimensionsCount(shape, &t->rank);
  if (!status && t->rank > kMaxDims) status = ort::CreateStatus(kOrtInvalidArgument, "edgepeft: a tensor has more than 8 dimensions");
  if (!status) status = ort::GetDimensions(shape, t->dims, t->rank);
  ort::ReleaseTensorTypeAndShapeInfo(shape);
  if (status) return status;
  t->count = 1;
  for (size_t i = 0; i < t->rank; i++) t->count *= t->dims[i];
  return ort::GetTensorMutableData(const_cast<OrtValue*>(value), &t->data);
}

// ---- a node -------------------------------------------------------------------------------------------------------
struct Node {
  OrtAllocator* allocator;
  const Op* op;
  char name[128];
  int64_t k, n, rows[kMaxGroups];
  Act act;
  bool constant[kMaxInputs];  // read once, when the session is made
  Tensor input[kMaxInputs];

  OrtStatus* fail(size_t input_index, const char* input_name, int group, const char* expected, const Tensor& found) const {
    Text t;
    t << op->name << " '" << name << "': input " << static_cast<int64_t>(input_index) << " (" << input_name;
    if (group >= 0) t << static_cast<int64_t>(group);
    return ort::CreateStatus(kOrtInvalidArgument, (t << "): expected " << expected << ", found " << found).s);
  }
  template <class Found>
  OrtStatus* fail(const char* what, const char* expected, Found found) const {
    Text t;
    t << op->name << " '" << name << "': " << what << ": expected " << expected << ", found " << found;
    return ort::CreateStatus(kOrtInvalidArgument, t.s);
  }
};

OrtStatus* read_attributes(const OrtKernelInfo* info_, Node* node) {
  EP_TRY(ort::KernelInfoGetAttribute_int64(info_, "K", &node->k));
  EP_TRY(ort::KernelInfoGetAttribute_int64(info_, "N", &node->n));
  const char* const names[] = {"n0", "n1", "n2"};
  int64_t padded = 0;
  for (int g = 0; g < node->op->groups; g++) {
    EP_TRY(ort::KernelInfoGetAttribute_int64(info_, names[g], &node->rows[g]));
    if (node->rows[g] < 1 || (node->op->groups > 1 && node->rows[g] % kTileRows))
      return node->fail(names[g], node->op->groups > 1 ? "a positive multiple of 16" : "at least 1", node->rows[g]);
    padded += (node->rows[g] + kTileRows - 1) / kTileRows * kTileRows;
  }
  if (node->n != padded) return node->fail("attribute N", (Text() << padded << ", the groups' rows in whole tiles of 16").s, node->n);
  const FormatInfo& f = info(node->op->format);
  if (!columns_fit(f, node->k)) return node->fail("attribute K", (Text() << "a positive multiple of " << int64_t{f.act_block}).s, node->k);
  char activation[16];
  size_t size = sizeof(activation);
  EP_TRY(ort::KernelInfoGetAttribute_string(info_, "activation", activation, &size));
  if (!same(activation, "int8") && !same(activation, "float"))
    return node->fail("attribute activation", "int8 or float", static_cast<const char*>(activation));
  node->act = same(activation, "int8") ? Act::int8 : Act::float32;
  return nullptr;
}

OrtStatus* read_constants(const OrtKernelInfo* info_, Node* node) {
  for (size_t i = 1; i < input_count(*node->op); i++) {
    int constant = 0;
    const OrtValue* value = nullptr;
    EP_TRY(ort::KernelInfoGetConstantInput_tensor(info_, i, &constant, &value));
    node->constant[i] = constant && value;
    if (node->constant[i]) EP_TRY(view(value, &node->input[i]));
  }
  if (!node->constant[kW] || !node->constant[kScale])
    return node->fail("inputs 1 (w) and 2 (w_scale)", "constant initializers", "an input of the graph or a computed value");
  const FormatInfo& f = info(node->op->format);
  const int64_t tiles = node->n / kTileRows, blocks = scale_blocks(f, node->k);
  if (!node->input[kW].is(tiles, node->k / kUnit, unit_bytes(f)))
    return node->fail(kW, "w", -1,
                      (Text() << "uint8 [" << tiles << "," << node->k / kUnit << "," << unit_bytes(f) << "]").s, node->input[kW]);
  if (!node->input[kScale].is(tiles, blocks, kTileRows))
    return node->fail(kScale, "w_scale", -1, (Text() << "[" << tiles << "," << blocks << ",16]").s, node->input[kScale]);
  return nullptr;
}

void destroy(void* kernel) {
  OrtAllocator* allocator = static_cast<Node*>(kernel)->allocator;
  allocator->Free(allocator, kernel);
  ort::ReleaseAllocator(allocator);
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info_, void** kernel) {
  OrtAllocator* allocator;
  EP_TRY(ort::KernelInfoGetAllocator(info_, kOrtDefaultMemory, &allocator));
  Node* node = static_cast<Node*>(allocator->Alloc(allocator, sizeof(Node)));
  node->allocator = allocator;
  node->op = &self(op);
  size_t size = sizeof(node->name);
  if (OrtStatus* status = ort::KernelInfo_GetNodeName(info_, node->name, &size)) {  // longer than we show: no name
    ort::ReleaseStatus(status);
    node->name[0] = 0;
  }
  OrtStatus* status = read_attributes(info_, node);
  if (!status) status = read_constants(info_, node);
  if (status) destroy(node);
  else *kernel = node;
  return status;
}

// ---- one run ------------------------------------------------------------------------------------------------------
OrtStatus* read_group(const Node& node, const Tensor* const* in, int g, const Tensor& x, Group* group) {
  const size_t at = kFirstGroup + kPerGroup * static_cast<size_t>(g);
  const Tensor &a = *in[at + kA], &b = *in[at + kB], &gate = *in[at + kGate], &s_out = *in[at + kSOut];
  group->n = node.rows[g];
  if ((a.type != kOrtHalf && a.type != kOrtFloat) || a.rank != 2 || a.dims[1] != node.k)
    return node.fail(at + kA, "a", g, (Text() << "float16 or float32 [R," << node.k << "]").s, a);
  group->rank = a.dims[0];
  group->half = a.type == kOrtHalf;
  if (b.type != a.type || !b.is(group->n, group->rank))
    return node.fail(at + kB, "b", g,
                     (Text() << (group->half ? "float16 [" : "float32 [") << group->n << "," << group->rank << "], to go with a").s, b);
  group->a = a.data;
  group->b = b.data;
  bool per_row = gate.rank == x.rank && gate.dims[gate.rank - 1] == group->rank;
  for (size_t i = 0; per_row && i + 1 < x.rank; i++) per_row = gate.dims[i] == x.dims[i];
  if (!gate.is(1) && !gate.is(group->rank) && !per_row)
    return node.fail(at + kGate, "gate", g,
                     (Text() << "float32 [1], [" << group->rank << "] or [..," << group->rank
                             << "] with the leading dimensions of x").s, gate);
  group->gate = gate.neutral() ? nullptr : gate.floats();
  group->gate_row = gate.is(1) || gate.is(group->rank) ? 0 : group->rank;
  group->gate_step = gate.is(1) ? 0 : 1;
  if (!s_out.is(1) && !s_out.is(group->n))
    return node.fail(at + kSOut, "s_out", g, (Text() << "float32 [1] or [" << group->n << "]").s, s_out);
  group->s_out = s_out.neutral() ? nullptr : s_out.floats();
  group->s_out_step = s_out.is(1) ? 0 : 1;
  return nullptr;
}

OrtStatus* read_call(const Node& node, const Tensor* const* in, Call* call) {
  const Tensor &x = *in[kX], &bias = *in[kBias], &s_in = *in[kSIn];
  if (x.rank < 1 || x.dims[x.rank - 1] != node.k) return node.fail(kX, "x", -1, (Text() << "float32 [..," << node.k << "]").s, x);
  if (!bias.is(node.n)) return node.fail(kBias, "bias", -1, (Text() << "float32 [" << node.n << "]").s, bias);
  if (!s_in.is(1) && !s_in.is(node.k)) return node.fail(kSIn, "s_in", -1, (Text() << "float32 [1] or [" << node.k << "]").s, s_in);
  const Row* row = select_row(node.op->format, node.act);
  call->format = node.op->format;
  call->ops = row->ops;
  call->act = node.act;
  call->m = x.count / node.k;
  call->k = node.k;
  call->x = x.floats();
  call->s_in = s_in.neutral() ? nullptr : s_in.floats();
  call->s_in_step = s_in.is(1) ? 0 : 1;
  call->w = static_cast<const uint8_t*>(in[kW]->data);
  call->w_scale = in[kScale]->data;
  call->bias = bias.floats();
  call->groups = node.op->groups;
  for (int g = 0; g < call->groups; g++) EP_TRY(read_group(node, in, g, x, &call->group[g]));
  return nullptr;
}

OrtStatus* allocate_outputs(OrtKernelContext* context, const Tensor& x, Call* call) {
  int64_t dims[kMaxDims];
  for (size_t i = 0; i < x.rank; i++) dims[i] = x.dims[i];
  for (int g = 0; g < call->groups; g++) {
    dims[x.rank - 1] = call->group[g].n;
    OrtValue* value;
    void* data;
    EP_TRY(ort::KernelContext_GetOutput(context, static_cast<size_t>(g), dims, x.rank, &value));
    EP_TRY(ort::GetTensorMutableData(value, &data));
    call->group[g].y = static_cast<float*>(data);
  }
  return nullptr;
}

// On the session's own threads; a single task needs none.
OrtStatus* parallel(OrtKernelContext* context, void (*task)(void*, size_t), int64_t tasks, Call* call) {
  if (tasks == 1) return task(call, 0), nullptr;
  return ort::KernelContext_ParallelFor(context, task, static_cast<size_t>(tasks), size_t{0}, static_cast<void*>(call));
}
void prepare_task(void* call, size_t i) { prepare(*static_cast<const Call*>(call), static_cast<int64_t>(i)); }
void run_task(void* call, size_t i) { run(*static_cast<const Call*>(call), static_cast<int64_t>(i)); }

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Node& node = *static_cast<Node*>(kernel);
  Tensor now[kMaxInputs];
  const Tensor* in[kMaxInputs];
  for (size_t i = 0; i < input_count(*node.op); i++) {
    in[i] = i != kX && node.constant[i] ? &node.input[i] : &now[i];
    if (in[i] != &now[i]) continue;
    const OrtValue* value = nullptr;
    EP_TRY(ort::KernelContext_GetInput(context, i, &value));
    EP_TRY(view(value, &now[i]));
  }
  Call call = {};
  EP_TRY(read_call(node, in, &call));
  EP_TRY(allocate_outputs(context, *in[kX], &call));
  if (call.m == 0) return nullptr;
  void* scratch = node.allocator->Alloc(node.allocator, static_cast<size_t>(plan(call)) + 64);
  place(call, reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t{63}));
  OrtStatus* status = parallel(context, prepare_task, call.prepare_tasks, &call);
  if (!status) status = parallel(context, run_task, call.tasks, &call);
  node.allocator->Free(node.allocator, scratch);
  return status;
}

// y_g has the dimensions of x, names included, but for the last.
OrtStatus* infer_shapes(const OrtCustomOp* op, OrtShapeInferContext* context) {
  OrtTensorTypeAndShapeInfo* x;
  EP_TRY(ort::ShapeInferContext_GetInputTypeShape(context, size_t{0}, &x));
  size_t rank = 0;
  int64_t dims[kMaxDims];
  const char* names[kMaxDims];
  EP_TRY(ort::GetDimensionsCount(x, &rank));
  if (rank < 1 || rank > kMaxDims) return nullptr;  // not known yet, or for compute to refuse
  EP_TRY(ort::GetDimensions(x, dims, rank));
  EP_TRY(ort::GetSymbolicDimensions(x, names, rank));
  const char* const attributes[] = {"n0", "n1", "n2"};
  for (int g = 0; g < self(op).groups; g++) {
    const OrtOpAttr* attribute = nullptr;
    size_t size = 0;
    EP_TRY(ort::ShapeInferContext_GetAttribute(context, attributes[g], &attribute));
    EP_TRY(ort::ReadOpAttr(attribute, kOrtAttributeInt, static_cast<void*>(&dims[rank - 1]), sizeof(int64_t), &size));
    names[rank - 1] = "";
    OrtTensorTypeAndShapeInfo* y;
    EP_TRY(ort::CreateTensorTypeAndShapeInfo(&y));
    OrtStatus* status = ort::SetTensorElementType(y, kOrtFloat);
    if (!status) status = ort::SetDimensions(y, dims, rank);
    if (!status) status = ort::SetSymbolicDimensions(y, names, rank);
    if (!status) status = ort::ShapeInferContext_SetOutputTypeShape(context, static_cast<size_t>(g), y);
    ort::ReleaseTensorTypeAndShapeInfo(y);
    if (status) return status;
  }
  return nullptr;
}

OrtElement input_type(const OrtCustomOp* op, size_t i) {
  if (i == kW) return kOrtUint8;
  if (i == kScale) return info(self(op).format).half_scale ? kOrtHalf : kOrtFloat;
  const bool adapter = i >= kFirstGroup && (i - kFirstGroup) % kPerGroup <= kB;
  return adapter ? kOrtAny : kOrtFloat;  // what any admits, read_group narrows
}

void define(Op& op, Format f, int groups) {
  op.format = f;
  op.groups = groups;
  Text name;
  name << "AdapterMatMul_" << info(f).tag << "_g" << int64_t{groups};
  for (size_t i = 0; i <= name.n; i++) op.name[i] = name.s[i];
  op.version = kOrtApiVersion;
  op.GetName = [](const OrtCustomOp* o) -> const char* { return self(o).name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU
  op.GetInputType = input_type;
  op.GetInputTypeCount = [](const OrtCustomOp* o) { return input_count(self(o)); };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return kOrtFloat; };
  op.GetOutputTypeCount = [](const OrtCustomOp* o) { return static_cast<size_t>(self(o).groups); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return kOrtRequired; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return kOrtRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return kOrtDefaultMemory; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 0x7fffffff; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = destroy;
  op.InferOutputShapeFn = infer_shapes;
}

Op g_ops[static_cast<int>(Format::count) * kMaxGroups];

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  if (!api) {  // older than 1.18: its first table still knows how to say so
    ort::api = base->GetApi(1);
    return ort::CreateStatus(kOrtFail, (Text() << "edgepeft: expected ONNX Runtime 1.18 or later, found " << base->GetVersionString()).s);
  }
  ort::api = api;
  OrtCustomOpDomain* domain;  // ORT keeps the pointer as long as any session lives, so it is never released
  EP_TRY(ort::CreateCustomOpDomain("edgepeft", &domain));
  for (int f = 0; f < static_cast<int>(Format::count); f++)
    for (int g = 1; g <= kMaxGroups; g++) {
      Op& op = g_ops[f * kMaxGroups + g - 1];
      define(op, static_cast<Format>(f), g);
      EP_TRY(ort::CustomOpDomain_Add(domain, &op));
    }
  return ort::AddCustomOpDomain(options, domain);
}
