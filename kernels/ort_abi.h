// What the library needs of ONNX Runtime's C interface, declared from its published ABI: no headers are installed with
// ORT's packages. OrtApi is a table of function pointers that only ever grows at its end, so an entry is an index.
// Asked for as version 18: ORT 1.18 and later answer.
#pragma once
#include <stddef.h>
#include <stdint.h>

constexpr uint32_t kOrtApiVersion = 18;

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtOpAttr;
struct OrtMemoryInfo;

struct OrtApi {
  void* entry[1];  // some 300 of them
};
struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

enum OrtElement : int { kOrtAny = 0, kOrtFloat = 1, kOrtUint8 = 2, kOrtInt32 = 6, kOrtInt64 = 7, kOrtHalf = 10 };
enum OrtErrorCode : int { kOrtFail = 1, kOrtInvalidArgument = 2 };
enum OrtArity : int { kOrtRequired = 0, kOrtOptional = 1 };
enum OrtMemoryType : int { kOrtDefaultMemory = 0 };
constexpr int kOrtAttributeInt = 1;

struct OrtAllocator {
  uint32_t version;
  void* (*Alloc)(OrtAllocator*, size_t);
  void (*Free)(OrtAllocator*, void*);
  const OrtMemoryInfo* (*Info)(const OrtAllocator*);
};

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  OrtElement (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  OrtElement (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  OrtArity (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  OrtArity (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  OrtMemoryType (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};
static_assert(sizeof(OrtCustomOp) == 26 * sizeof(void*), "the ABI has 26 words");
static_assert(offsetof(OrtCustomOp, InferOutputShapeFn) == 19 * sizeof(void*), "in this order");

// X(index in OrtApi, result, name, arguments)
#define EP_ORT_API(X)                                                                                                   \
  X(0, OrtStatus*, CreateStatus, (OrtErrorCode, const char*))                                                           \
  X(26, OrtStatus*, CreateCustomOpDomain, (const char*, OrtCustomOpDomain**))                                           \
  X(27, OrtStatus*, CustomOpDomain_Add, (OrtCustomOpDomain*, const OrtCustomOp*))                                       \
  X(28, OrtStatus*, AddCustomOpDomain, (OrtSessionOptions*, OrtCustomOpDomain*))                                        \
  X(51, OrtStatus*, GetTensorMutableData, (OrtValue*, void**))                                                          \
  X(57, OrtStatus*, CreateTensorTypeAndShapeInfo, (OrtTensorTypeAndShapeInfo**))                                        \
  X(58, OrtStatus*, SetTensorElementType, (OrtTensorTypeAndShapeInfo*, OrtElement))                                     \
  X(59, OrtStatus*, SetDimensions, (OrtTensorTypeAndShapeInfo*, const int64_t*, size_t))                                \
  X(60, OrtStatus*, GetTensorElementType, (const OrtTensorTypeAndShapeInfo*, OrtElement*))                              \
  X(61, OrtStatus*, GetDimensionsCount, (const OrtTensorTypeAndShapeInfo*, size_t*))                                    \
  X(62, OrtStatus*, GetDimensions, (const OrtTensorTypeAndShapeInfo*, int64_t*, size_t))                                \
  X(63, OrtStatus*, GetSymbolicDimensions, (const OrtTensorTypeAndShapeInfo*, const char**, size_t))                    \
  X(65, OrtStatus*, GetTensorTypeAndShape, (const OrtValue*, OrtTensorTypeAndShapeInfo**))                              \
  X(85, OrtStatus*, KernelInfoGetAttribute_float, (const OrtKernelInfo*, const char*, float*))                          \
  X(86, OrtStatus*, KernelInfoGetAttribute_int64, (const OrtKernelInfo*, const char*, int64_t*))                        \
  X(87, OrtStatus*, KernelInfoGetAttribute_string, (const OrtKernelInfo*, const char*, char*, size_t*))                 \
  X(90, OrtStatus*, KernelContext_GetInput, (const OrtKernelContext*, size_t, const OrtValue**))                        \
  X(91, OrtStatus*, KernelContext_GetOutput, (OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**))           \
  X(93, void, ReleaseStatus, (OrtStatus*))                                                                              \
  X(99, void, ReleaseTensorTypeAndShapeInfo, (OrtTensorTypeAndShapeInfo*))                                              \
  X(132, void, ReleaseAllocator, (OrtAllocator*))                                                                       \
  X(244, OrtStatus*, KernelInfo_GetNodeName, (const OrtKernelInfo*, char*, size_t*))                                    \
  X(249, OrtStatus*, KernelInfoGetConstantInput_tensor, (const OrtKernelInfo*, size_t, int*, const OrtValue**))         \
  X(268, OrtStatus*, ShapeInferContext_GetInputTypeShape, (const OrtShapeInferContext*, size_t, OrtTensorTypeAndShapeInfo**)) \
  X(269, OrtStatus*, ShapeInferContext_GetAttribute, (const OrtShapeInferContext*, const char*, const OrtOpAttr**))     \
  X(270, OrtStatus*, ShapeInferContext_SetOutputTypeShape, (const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*)) \
  X(271, OrtStatus*, SetSymbolicDimensions, (OrtTensorTypeAndShapeInfo*, const char**, size_t))                         \
  X(272, OrtStatus*, ReadOpAttr, (const OrtOpAttr*, int, void*, size_t, size_t*))                                       \
  X(274, OrtStatus*, KernelContext_ParallelFor, (const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)) \
  X(278, OrtStatus*, KernelInfoGetAllocator, (const OrtKernelInfo*, OrtMemoryType, OrtAllocator**))

namespace ort {
extern const OrtApi* api;
extern int release;  // of ONNX Runtime that asked for the operators: 24 of 1.24
#define EP_ORT_CALL(index, result, name, arguments)                                \
  template <class... A>                                                            \
  inline result name(A... a) {                                                     \
    return reinterpret_cast<result(*) arguments>(api->entry[index])(a...);         \
  }
EP_ORT_API(EP_ORT_CALL)
}  // namespace ort
