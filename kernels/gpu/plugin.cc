// The plugin: what ONNX Runtime calls to find the device, to ask which nodes it takes, and to run them.
//
// A graph is taken whole or not at all: a node without a shader would bring activations back to the CPU and out again.
// edgepeft_vulkan_missing() says why there is no device, edgepeft_vulkan_refused() which node was in the way.
#include <stdio.h>
#include <string.h>

#include "program.h"

const OrtApi* ort::api;

namespace {

constexpr char kName[] = "EdgePeftVulkanExecutionProvider";
constexpr char kPrecision[] = "ep.edgepeftvulkanexecutionprovider.precision";  // where a session keeps the provider's option
constexpr uint32_t kVendor = 0xED9E;
const OrtEpApi* ep_api;
char refused[640];

OrtStatus* status_of(Failure failure) {
  return failure ? ort::CreateStatus(static_cast<OrtErrorCode>(kOrtEpFail), failure) : nullptr;
}

struct Compiled : OrtNodeComputeInfo {
  Program program;
};

// One for each session.
struct Provider : OrtEp {
  bool float16;
};

// ---- running --------------------------------------------------------------------------------------------------------
OrtStatus* create_state(OrtNodeComputeInfo* self, OrtNodeComputeContext*, void** state) { return *state = self, nullptr; }
void release_state(OrtNodeComputeInfo*, void*) {}
OrtStatus* compute(OrtNodeComputeInfo* self, void*, OrtKernelContext* context) {
  Program& program = static_cast<Compiled*>(self)->program;
  pthread_mutex_lock(&program.device->lock);
  Failure failure = program.run(context);
  pthread_mutex_unlock(&program.device->lock);
  return status_of(failure);
}

// ---- taking a graph -------------------------------------------------------------------------------------------------
OrtStatus* capability(OrtEp*, const OrtGraph* graph, OrtEpGraphSupportInfo* info) {
  size_t count = 0;
  if (OrtStatus* status = ort::Graph_GetNumNodes(graph, &count)) return status;
  Array<const OrtNode*> nodes;
  nodes.resize(count);
  OrtStatus* status = count ? ort::Graph_GetNodes(graph, nodes.data, count) : nullptr;
  Failure failure = nullptr;
  for (size_t i = 0; i < count && !status && !failure; i++) {
    Node about;
    Step step;
    failure = set_up(nodes[i], &about, &step);
  }
  if (failure && !refused[0]) snprintf(refused, sizeof(refused), "%s", failure);  // what comes later is of inlined parts
  const OrtNodeFusionOptions options = {kEpApiVersion, true};
  if (!status && !failure && count) status = ep_api->EpGraphSupportInfo_AddNodesToFuse(info, nodes.data, count, &options);
  nodes.free();
  return status;
}

OrtStatus* compile(OrtEp* self, const OrtGraph** graphs, const OrtNode** fused, size_t count, OrtNodeComputeInfo** made, OrtNode**) {
  Failure failure = nullptr;
  Device* own = device(&failure);
  for (size_t i = 0; i < count && !failure; i++) {
    Compiled* one = static_cast<Compiled*>(__builtin_calloc(1, sizeof(Compiled)));
    *static_cast<OrtNodeComputeInfo*>(one) = {kEpApiVersion, create_state, compute, release_state};
    one->program.device = own;
    one->program.float16 = static_cast<Provider*>(self)->float16;
    pthread_mutex_lock(&own->lock);
    if (one->program.float16) own->want(kFloat16);
    failure = one->program.compile(graphs[i], fused[i]);
    if (failure) one->program.free();
    pthread_mutex_unlock(&own->lock);
    if (failure) __builtin_free(one);
    else made[i] = one;
  }
  return status_of(failure);
}

void release_compiled(OrtEp*, OrtNodeComputeInfo** made, size_t count) {
  for (size_t i = 0; i < count; i++) {
    Compiled* one = static_cast<Compiled*>(made[i]);
    pthread_mutex_lock(&one->program.device->lock);
    one->program.free();
    pthread_mutex_unlock(&one->program.device->lock);
    __builtin_free(one);
  }
}

// ---- the provider and its factory -----------------------------------------------------------------------------------
// Whether the provider's option `precision` is "float16"; "float32" is what it is without one.
bool asks_for_float16(const OrtSessionOptions* options) {
  char value[16] = {};
  size_t size = sizeof(value);
  OrtStatus* status = ort::GetSessionConfigEntry(options, kPrecision, value, &size);
  if (status) ort::ReleaseStatus(status);
  return !status && !strcmp(value, "float16");
}

OrtStatus* create_ep(OrtEpFactory*, const OrtHardwareDevice* const*, const OrtKeyValuePairs* const*, size_t, const OrtSessionOptions* options,
                     const OrtLogger*, OrtEp** made) {
  Provider* ep = static_cast<Provider*>(__builtin_calloc(1, sizeof(Provider)));
  *static_cast<OrtEp*>(ep) = {kEpApiVersion, [](const OrtEp*) -> const char* { return kName; }, capability, compile, release_compiled, {}};
  ep->float16 = asks_for_float16(options);
  refused[0] = 0;
  return *made = ep, nullptr;
}

// One device for ONNX Runtime: its GPU, or its CPU where it knows of none, as for a driver that computes there.
OrtStatus* devices(OrtEpFactory* factory, const OrtHardwareDevice* const* all, size_t count, OrtEpDevice** made, size_t most, size_t* found) {
  *found = 0;
  Failure reason;
  if (!device(&reason) || !most) return nullptr;
  for (int kind : {kOrtGpuDevice, kOrtCpuDevice})
    for (size_t i = 0; i < count; i++) {
      if (ort::HardwareDevice_Type(all[i]) != kind) continue;
      OrtStatus* status = ep_api->CreateEpDevice(factory, all[i], nullptr, nullptr, made);
      if (!status) *found = 1;
      return status;
    }
  return nullptr;
}

OrtEpFactory make_factory() {
  OrtEpFactory f = {};
  f.version = kEpApiVersion;
  f.GetName = [](const OrtEpFactory*) -> const char* { return kName; };
  f.GetVendor = [](const OrtEpFactory*) -> const char* { return "edgepeft"; };
  f.GetVersion = [](const OrtEpFactory*) -> const char* { return "1.0.0"; };
  f.GetVendorId = [](const OrtEpFactory*) { return kVendor; };
  f.GetSupportedDevices = devices;
  f.CreateEp = create_ep;
  f.ReleaseEp = [](OrtEpFactory*, OrtEp* ep) { __builtin_free(static_cast<Provider*>(ep)); };
  f.CreateDataTransfer = [](OrtEpFactory*, void** transfer) -> OrtStatus* { return *transfer = nullptr, nullptr; };
  f.IsStreamAware = [](const OrtEpFactory*) { return false; };
  return f;
}

}  // namespace

#define EP_EXPORT extern "C" __attribute__((visibility("default")))

EP_EXPORT OrtStatus* CreateEpFactories(const char*, const OrtApiBase* base, const OrtLogger*, OrtEpFactory** factories, size_t most, size_t* count) {
  static OrtEpFactory factory = make_factory();
  ort::api = base->GetApi(kEpApiVersion);
  *count = 0;
  if (!ort::api) {
    ort::api = base->GetApi(1);
    return ort::CreateStatus(kOrtFail, fail("edgepeft: Vulkan needs ONNX Runtime 1.23 or later, found %s", base->GetVersionString()));
  }
  ep_api = ort::GetEpApi();
  if (most) factories[(*count)++] = &factory;
  return nullptr;
}
EP_EXPORT OrtStatus* ReleaseEpFactory(OrtEpFactory*) { return nullptr; }

EP_EXPORT const char* edgepeft_vulkan_missing() {
  Failure reason;
  return device(&reason) ? "" : reason;
}
EP_EXPORT const char* edgepeft_vulkan_device() {
  Failure reason;
  const Device* own = device(&reason);
  return own ? own->properties.deviceName : "";
}
// What of the device's is in use, and what it is taken for: "adreno, workgroups of 128, subgroups of 64".
EP_EXPORT const char* edgepeft_vulkan_about() {
  Failure reason;
  const Device* own = device(&reason);
  static char text[128];
  if (!own) return "";
  int at = snprintf(text, sizeof(text), "%s, workgroups of %u", own->properties.deviceType == vk::kCpu ? "software" : own->kind.name, own->most_threads());
  if (own->features & own->allowed & kSubgroups) at += snprintf(text + at, sizeof(text) - static_cast<size_t>(at), ", subgroups of %u", own->subgroups.subgroupSize);
  if (own->features & own->allowed & kFloat16) snprintf(text + at, sizeof(text) - static_cast<size_t>(at), ", float16");
  return text;
}
// Lets things go wrong from now on, for tests: 1 there is no memory left, 2 the device is lost at the next submit, 3 we
// submit with a fence that was not reset, which only a validation layer minds, 4 the driver fails to compile the next shader.
EP_EXPORT void edgepeft_vulkan_plant(int fault) {
  Failure reason;
  Device* own = device(&reason);
  if (!own) return;
  if (fault == 1) own->api.AllocateMemory = [](vk::Device, const vk::MemoryAllocateInfo*, const void*, vk::Handle*) { return vk::kOutOfDeviceMemory; };
  if (fault == 3) own->api.ResetFences = [](vk::Device, uint32_t, const vk::Handle*) { return vk::kSuccess; };
  if (fault == 4) {
    own->pipelines.clear();
    static const auto compile = own->api.CreateComputePipelines;
    own->api.CreateComputePipelines = [](vk::Device, vk::Handle, uint32_t, const vk::ComputePipelineCreateInfo*, const void*, vk::Handle*) {
      Failure none;
      device(&none)->api.CreateComputePipelines = compile;
      return vk::kUnknown;
    };
  }
  if (fault == 2) own->api.QueueSubmit = [](vk::Queue, uint32_t, const vk::SubmitInfo*, vk::Handle) { return vk::kDeviceLost; };
}
// Ends a command buffer after so many products from now on, for tests.
EP_EXPORT void edgepeft_vulkan_split(uint64_t products) {
  Failure reason;
  if (Device* own = device(&reason)) own->most_products = products;
}
// Takes the GPU for one of a vendor's from now on, with its workgroups and what of its features is found right, for tests.
EP_EXPORT void edgepeft_vulkan_take_for(uint32_t vendor) {
  Failure reason;
  Device* own = device(&reason);
  if (!own) return;
  pthread_mutex_lock(&own->lock);
  own->take_for(vendor);
  pthread_mutex_unlock(&own->lock);
}
// Puts the workgroups that compute A x behind those that wait for it, for tests.
EP_EXPORT void edgepeft_vulkan_ranks_last(int last) {
  Failure reason;
  if (Device* own = device(&reason)) own->ranks_last = last != 0;
}
// Uses no other features than these from now on (bits of enum Feature), for tests and comparisons; returns those in use.
EP_EXPORT uint32_t edgepeft_vulkan_use(uint32_t features) {
  Failure reason;
  Device* own = device(&reason);
  if (!own) return 0;
  pthread_mutex_lock(&own->lock);
  own->allowed = features;
  const uint32_t in_use = own->features & features;
  pthread_mutex_unlock(&own->lock);
  return in_use;
}
EP_EXPORT const char* edgepeft_vulkan_refused() { return refused; }
// Command buffers submitted, shaders dispatched, and bytes that runs copied in and out, since the process began.
EP_EXPORT void edgepeft_vulkan_counts(uint64_t (&counts)[3]) {
  Failure reason;
  const Device* own = device(&reason);
  const uint64_t all[] = {own ? own->submits : 0, own ? own->dispatches : 0, own ? own->copied : 0};
  memcpy(counts, all, sizeof(all));
}
