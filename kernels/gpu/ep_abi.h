// What a plugin execution provider needs of ONNX Runtime's C interface beyond ort_abi.h, declared from its published ABI.
// Asked for as version 23: ONNX Runtime 1.23 and later answer.
#pragma once
#include "../ort_abi.h"

constexpr uint32_t kEpApiVersion = 23;

struct OrtEpDevice;
struct OrtHardwareDevice;
struct OrtKeyValuePairs;
struct OrtLogger;
struct OrtGraph;
struct OrtNode;
struct OrtValueInfo;
struct OrtTypeInfo;
struct OrtEpGraphSupportInfo;
struct OrtNodeComputeContext;

constexpr int kOrtEpFail = 11;
constexpr int kOrtCpuDevice = 0, kOrtGpuDevice = 1;
constexpr int kOrtAttributeInts = 2, kOrtAttributeFloat = 3, kOrtAttributeString = 5;

struct OrtNodeFusionOptions {
  uint32_t version;
  bool drop_constant_initializers;
};

struct OrtNodeComputeInfo {
  uint32_t version;
  OrtStatus* (*CreateState)(OrtNodeComputeInfo*, OrtNodeComputeContext*, void**);
  OrtStatus* (*Compute)(OrtNodeComputeInfo*, void*, OrtKernelContext*);
  void (*ReleaseState)(OrtNodeComputeInfo*, void*);
};

struct OrtEp {
  uint32_t version;
  const char* (*GetName)(const OrtEp*);
  OrtStatus* (*GetCapability)(OrtEp*, const OrtGraph*, OrtEpGraphSupportInfo*);
  OrtStatus* (*Compile)(OrtEp*, const OrtGraph**, const OrtNode**, size_t, OrtNodeComputeInfo**, OrtNode**);
  void (*ReleaseNodeComputeInfos)(OrtEp*, OrtNodeComputeInfo**, size_t);
  void* optional[9];  // layouts, dynamic options, start and end of runs, allocators, streams, compatibility: none of ours
};

struct OrtEpFactory {
  uint32_t version;
  const char* (*GetName)(const OrtEpFactory*);
  const char* (*GetVendor)(const OrtEpFactory*);
  OrtStatus* (*GetSupportedDevices)(OrtEpFactory*, const OrtHardwareDevice* const*, size_t, OrtEpDevice**, size_t, size_t*);
  OrtStatus* (*CreateEp)(OrtEpFactory*, const OrtHardwareDevice* const*, const OrtKeyValuePairs* const*, size_t,
                         const OrtSessionOptions*, const OrtLogger*, OrtEp**);
  void (*ReleaseEp)(OrtEpFactory*, OrtEp*);
  uint32_t (*GetVendorId)(const OrtEpFactory*);
  const char* (*GetVersion)(const OrtEpFactory*);
  void* compatibility;
  OrtStatus* (*CreateAllocator)(OrtEpFactory*, const OrtMemoryInfo*, const OrtKeyValuePairs*, OrtAllocator**);
  void (*ReleaseAllocator)(OrtEpFactory*, OrtAllocator*);
  OrtStatus* (*CreateDataTransfer)(OrtEpFactory*, void**);
  bool (*IsStreamAware)(const OrtEpFactory*);
  void* streams;
};
static_assert(sizeof(OrtEp) == 14 * sizeof(void*) && sizeof(OrtEpFactory) == 14 * sizeof(void*), "version 23 has 14 words");

struct OrtEpApi {
  OrtStatus* (*CreateEpDevice)(OrtEpFactory*, const OrtHardwareDevice*, const OrtKeyValuePairs*, const OrtKeyValuePairs*, OrtEpDevice**);
  void (*ReleaseEpDevice)(OrtEpDevice*);
  OrtStatus* (*EpGraphSupportInfo_AddNodesToFuse)(OrtEpGraphSupportInfo*, const OrtNode* const*, size_t, const OrtNodeFusionOptions*);
};

// X(index in OrtApi, result, name, arguments)
#define EP_ORT_EP_API(X)                                                                    \
  X(55, OrtStatus*, CastTypeInfoToTensorInfo, (const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**)) \
  X(238, OrtStatus*, GetSessionConfigEntry, (const OrtSessionOptions*, const char*, char*, size_t*)) \
  X(289, OrtStatus*, GetValueInfoName, (const OrtValueInfo*, const char**))                 \
  X(290, OrtStatus*, GetValueInfoTypeInfo, (const OrtValueInfo*, const OrtTypeInfo**))      \
  X(307, int, HardwareDevice_Type, (const OrtHardwareDevice*))                              \
  X(317, const OrtEpApi*, GetEpApi, ())                                                     \
  X(326, OrtStatus*, ValueInfo_GetInitializerValue, (const OrtValueInfo*, const OrtValue**)) \
  X(331, OrtStatus*, ValueInfo_IsConstantInitializer, (const OrtValueInfo*, bool*))         \
  X(344, OrtStatus*, Graph_GetNumNodes, (const OrtGraph*, size_t*))                         \
  X(345, OrtStatus*, Graph_GetNodes, (const OrtGraph*, const OrtNode**, size_t))            \
  X(349, OrtStatus*, Node_GetName, (const OrtNode*, const char**))                          \
  X(350, OrtStatus*, Node_GetOperatorType, (const OrtNode*, const char**))                  \
  X(351, OrtStatus*, Node_GetDomain, (const OrtNode*, const char**))                        \
  X(353, OrtStatus*, Node_GetNumInputs, (const OrtNode*, size_t*))                          \
  X(354, OrtStatus*, Node_GetInputs, (const OrtNode*, const OrtValueInfo**, size_t))        \
  X(355, OrtStatus*, Node_GetNumOutputs, (const OrtNode*, size_t*))                         \
  X(356, OrtStatus*, Node_GetOutputs, (const OrtNode*, const OrtValueInfo**, size_t))       \
  X(361, OrtStatus*, Node_GetAttributeByName, (const OrtNode*, const char*, const OrtOpAttr**))

namespace ort {
EP_ORT_EP_API(EP_ORT_CALL)
}  // namespace ort
