// What all our ONNX operators share: tensors as ONNX Runtime hands them over, messages, what a session keeps of a node,
// shapes, and the fields of OrtCustomOp that are the same for every operator.
#pragma once
#include "formats.h"
#include "ort_abi.h"

#define EP_TRY(call)                            \
  do {                                          \
    if (OrtStatus* status = (call)) return status; \
  } while (0)

constexpr size_t kMaxDims = 8;

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
  bool is_like(const Tensor& t) const {
    for (size_t i = 0; i < t.rank && rank == t.rank; i++)
      if (dims[i] != t.dims[i]) return false;
    return rank == t.rank;
  }
  bool holds(float number) const { return count == 1 && floats()[0] == number; }
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
    const char* type = "another type [";
    if (t.type == kOrtFloat) type = "float32 [";
    if (t.type == kOrtHalf) type = "float16 [";
    if (t.type == kOrtUint8) type = "uint8 [";
    if (t.type == kOrtInt32) type = "int32 [";
    if (t.type == kOrtInt64) type = "int64 [";
    *this << type;
    for (size_t i = 0; i < t.rank; i++) *this << (i ? "," : "") << t.dims[i];
    return *this << "]";
  }
};

inline OrtStatus* view(const OrtValue* value, Tensor* t) {
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

// ---- operators and nodes ------------------------------------------------------------------------------------------
struct NamedOp : OrtCustomOp {
  char name[48];
};

struct NodeBase {
  OrtAllocator* allocator;
  const NamedOp* op;
  char name[128];

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

template <class N>
OrtStatus* make_node(const NamedOp& op, const OrtKernelInfo* info_, N** made) {
  OrtAllocator* allocator;
  EP_TRY(ort::KernelInfoGetAllocator(info_, kOrtDefaultMemory, &allocator));
  N* node = *made = static_cast<N*>(allocator->Alloc(allocator, sizeof(N)));
  node->allocator = allocator;
  node->op = &op;
  size_t size = sizeof(node->name);
  if (OrtStatus* status = ort::KernelInfo_GetNodeName(info_, node->name, &size)) {  // longer than we show: no name
    ort::ReleaseStatus(status);
    node->name[0] = 0;
  }
  return nullptr;
}
inline void destroy_node(void* kernel) {
  OrtAllocator* allocator = static_cast<NodeBase*>(kernel)->allocator;
  allocator->Free(allocator, kernel);
  ort::ReleaseAllocator(allocator);
}

// The inputs of a node; constant ones are read once, when the session is made.
template <size_t most>
struct Inputs {
  size_t count;
  bool constant[most];
  Tensor kept[most];

  OrtStatus* read_constants(const OrtKernelInfo* info_, size_t inputs) {
    count = inputs;
    for (size_t i = 0; i < count; i++) {
      int is_constant = 0;
      const OrtValue* value = nullptr;
      EP_TRY(ort::KernelInfoGetConstantInput_tensor(info_, i, &is_constant, &value));
      constant[i] = is_constant && value;
      if (constant[i]) EP_TRY(view(value, &kept[i]));
    }
    return nullptr;
  }
  // in[i] is either a constant or in now[i].
  OrtStatus* read(const OrtKernelContext* context, Tensor (&now)[most], const Tensor* (&in)[most]) const {
    for (size_t i = 0; i < count; i++) {
      in[i] = constant[i] ? &kept[i] : &now[i];
      if (constant[i]) continue;
      const OrtValue* value = nullptr;
      EP_TRY(ort::KernelContext_GetInput(context, i, &value));
      if (value) EP_TRY(view(value, &now[i]));
      else now[i] = {};  // an optional one that is not there
    }
    return nullptr;
  }
};

inline OrtStatus* allocate_output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank, float** y) {
  OrtValue* value;
  void* data;
  EP_TRY(ort::KernelContext_GetOutput(context, index, dims, rank, &value));
  EP_TRY(ort::GetTensorMutableData(value, &data));
  *y = static_cast<float*>(data);
  return nullptr;
}

// On the session's own threads; a single task needs none.
// apart: tasks differ in length, and are handed out one by one, not in as many runs of them as there are threads.
inline OrtStatus* parallel(OrtKernelContext* context, void (*task)(void*, size_t), int64_t tasks, void* work, bool apart = false) {
  if (tasks == 1) return task(work, 0), nullptr;
  if (tasks < 1) return nullptr;
  return ort::KernelContext_ParallelFor(context, task, static_cast<size_t>(tasks), static_cast<size_t>(apart ? tasks : 0), work);
}

// ---- shapes -------------------------------------------------------------------------------------------------------
struct Shape {
  size_t rank = 0;  // 0: not known yet
  int64_t dims[kMaxDims];
  const char* names[kMaxDims];  // of dimensions that are not known yet, or ""

  void set(size_t i, int64_t dim) {
    dims[i] = dim;
    names[i] = "";
  }
  OrtStatus* read(OrtShapeInferContext* context, size_t input) {
    OrtTensorTypeAndShapeInfo* shape;
    EP_TRY(ort::ShapeInferContext_GetInputTypeShape(context, input, &shape));
    size_t count = 0;
    EP_TRY(ort::GetDimensionsCount(shape, &count));
    if (count > kMaxDims) return nullptr;  // for compute to refuse
    EP_TRY(ort::GetDimensions(shape, dims, count));
    EP_TRY(ort::GetSymbolicDimensions(shape, names, count));
    rank = count;
    return nullptr;
  }
  OrtStatus* write(OrtShapeInferContext* context, size_t output) {
    OrtTensorTypeAndShapeInfo* shape;
    EP_TRY(ort::CreateTensorTypeAndShapeInfo(&shape));
    OrtStatus* status = ort::SetTensorElementType(shape, kOrtFloat);
    if (!status) status = ort::SetDimensions(shape, dims, rank);
    if (!status) status = ort::SetSymbolicDimensions(shape, names, rank);
    if (!status) status = ort::ShapeInferContext_SetOutputTypeShape(context, output, shape);
    ort::ReleaseTensorTypeAndShapeInfo(shape);
    return status;
  }
};

// ---- what does not vary: CPU, float outputs, inputs and outputs required, one version -----------------------------
inline void define(NamedOp& op, const char* name) {
  size_t i = 0;
  do op.name[i] = name[i];
  while (name[i++]);
  op.version = kOrtApiVersion;
  op.GetName = [](const OrtCustomOp* o) -> const char* { return static_cast<const NamedOp*>(o)->name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return kOrtFloat; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return kOrtRequired; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return kOrtRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return kOrtDefaultMemory; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 0x7fffffff; };
  op.KernelDestroy = destroy_node;
}

OrtStatus* add_functions(OrtCustomOpDomain* domain);  // the operators of ort_functions.cc
OrtStatus* add_attention(OrtCustomOpDomain* domain);  // that of ort_attention.cc
