#include "device.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "shaders.h"

namespace {

constexpr uint32_t kSetsInPool = 256;
constexpr uint64_t kStaging = 16 << 20;
constexpr uint64_t kMoment = 500ull * 1000 * 1000;  // ns
constexpr int kPatience = 120;  // moments for one submit, in each of which this process ran: a GPU that takes longer hangs

const char* name_of(vk::Result result) {
  switch (result) {
    case vk::kOutOfHostMemory: return "out of the CPU's memory";
    case vk::kOutOfDeviceMemory: return "out of the GPU's memory";
    case vk::kDeviceLost: return "the GPU was lost: its driver reset it or it was removed";
    case vk::kTimeout: return "the GPU did not answer within a minute";
    case vk::kIncompatibleDriver: return "no driver";
    case vk::kInitializationFailed: return "its driver failed to start";
    default: return nullptr;
  }
}

const char* const kFloat16Extension = "VK_KHR_shader_float16_int8";
constexpr vk::Flags kSubgroupsNeed = vk::kSubgroupBasic | vk::kSubgroupArithmetic | vk::kSubgroupShuffle;
constexpr uint32_t kMostThreads = 128;  // of the smallest workgroup that any GPU promises

// X(name, vendor, threads, features); the last is of every other GPU
const DeviceClass kClasses[] = {
#define EP_CLASS(name, vendor, threads, features) {#name, vendor, threads, features},
#include "classes.inc"
    EP_GPU_CLASSES(EP_CLASS)
#undef EP_CLASS
};

const DeviceClass& class_of(uint32_t vendor) {
  for (const DeviceClass& c : kClasses)
    if (c.vendor == vendor || !c.vendor) return c;
  __builtin_unreachable();
}

int rank(vk::DeviceType type) {
  switch (type) {
    case vk::kDiscrete: return 4;
    case vk::kIntegrated: return 3;
    case vk::kVirtual: return 2;
    case vk::kOther: return 1;
    default: return 0;
  }
}

}  // namespace

Failure fail(const char* format, ...) {
  static thread_local char text[640];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof(text), format, list);
  va_end(list);
  return text;
}

Failure Device::check(vk::Result result, const char* what) {
  if (result == vk::kSuccess) return nullptr;
  if (result == vk::kDeviceLost || result == vk::kTimeout) lost = true;
  if (const char* known = name_of(result)) return fail("Vulkan: %s (%s)", known, what);
  return fail("Vulkan: %s failed with %d", what, result);
}

// ---- the loader and the device --------------------------------------------------------------------------------------
Failure Device::load() {
  void* loader = dlopen("libvulkan.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!loader) loader = dlopen("libvulkan.so", RTLD_NOW | RTLD_LOCAL);  // Android's name
  if (!loader) return fail("Vulkan's loader, libvulkan.so.1, is not installed");
  const auto find = reinterpret_cast<vk::GetInstanceProcAddr>(dlsym(loader, "vkGetInstanceProcAddr"));
  if (!find) return fail("libvulkan.so.1 is no Vulkan loader: it has no vkGetInstanceProcAddr");
  const auto create = reinterpret_cast<vk::CreateInstance>(find(nullptr, "vkCreateInstance"));
  const vk::ApplicationInfo application = {vk::kApplicationInfo, nullptr, "edgepeft", 1, nullptr, 0, vk::kVersion11};
  const vk::InstanceCreateInfo info = {vk::kInstanceCreateInfo, nullptr, 0, &application, 0, nullptr, 0, nullptr};
  GPU_TRY(check(create(&info, nullptr, &instance), "vkCreateInstance"));
#define EP_VULKAN_LOAD(result, name, arguments)                                                \
  api.name = reinterpret_cast<decltype(api.name)>(find(instance, "vk" #name));                 \
  if (!api.name) return fail("Vulkan's loader is older than 1.1: it has no vk" #name);
  EP_VULKAN(EP_VULKAN_LOAD)
#undef EP_VULKAN_LOAD
  return nullptr;
}

Failure Device::choose() {
  vk::PhysicalDevice found[16];
  uint32_t count = 16;
  const vk::Result result = api.EnumeratePhysicalDevices(instance, &count, found);
  if (result != vk::kSuccess && result != 5) GPU_TRY(check(result, "vkEnumeratePhysicalDevices"));  // 5: there are more
  for (uint32_t i = 0; i < count; i++) {
    vk::SubgroupProperties own = {vk::kSubgroupProperties, nullptr, 0, 0, 0, 0};
    vk::PhysicalDeviceProperties2 about = {vk::kProperties2, &own, {}};
    api.GetPhysicalDeviceProperties2(found[i], &about);
    if (about.properties.apiVersion < vk::kVersion11) continue;
    if (physical && rank(about.properties.deviceType) <= rank(properties.deviceType)) continue;
    physical = found[i];
    properties = about.properties;
    subgroups = own;
  }
  if (!physical) return fail("no GPU with Vulkan 1.1 was found");
  classify();
  const vk::Limits& limits = properties.limits;
  if (limits.maxPerStageDescriptorStorageBuffers < kBindings || limits.maxPushConstantsSize < kWords * 4 ||
      limits.maxComputeWorkGroupInvocations < 128)
    return fail("%s allows %u buffers, %u bytes and %u threads to a shader; it takes %d, %d and 128", properties.deviceName,
                limits.maxPerStageDescriptorStorageBuffers, limits.maxPushConstantsSize, limits.maxComputeWorkGroupInvocations,
                kBindings, kWords * 4);
  return nullptr;
}

void Device::classify() {
  kind = class_of(properties.vendorID);
  has = features = 0;
  if ((subgroups.supportedStages & vk::kComputeStage) && !(kSubgroupsNeed & ~subgroups.supportedOperations) && subgroups.subgroupSize >= 4 &&
      subgroups.subgroupSize <= kMostThreads)
    has |= kSubgroups & kind.features;
  if ((kind.features & kFloat16) && has_float16()) has |= kFloat16;
  has |= kBeside & kind.features;
}

void Device::take_for(uint32_t vendor) {
  const bool asked = features & kFloat16;
  properties.vendorID = vendor;
  properties.deviceType = vk::kIntegrated;
  classify();
  want(kSubgroups);
  want(kBeside);
  if (asked) want(kFloat16);
}

// A GPU has few tiles for its many threads, so many share a tile; a driver that computes on the CPU has few.
uint32_t Device::most_threads() const {
  if (properties.deviceType == vk::kCpu) return 64;
  const uint32_t allowed = properties.limits.maxComputeWorkGroupInvocations;
  return allowed < kind.threads ? kMostThreads : kind.threads;
}

// Whether the driver multiplies in float16; version 1.2 made the extension its own.
bool Device::has_float16() {
  uint32_t count = 0;
  if (api.EnumerateDeviceExtensionProperties(physical, nullptr, &count, nullptr) != vk::kSuccess) return false;
  Array<vk::ExtensionProperties> all;
  all.resize(count);
  bool named = api.EnumerateDeviceExtensionProperties(physical, nullptr, &count, all.data) == vk::kSuccess, found = false;
  for (uint32_t i = 0; i < count && named && !found; i++) found = !strcmp(all[i].extensionName, kFloat16Extension);
  all.free();
  vk::Float16Features float16 = {vk::kFloat16Features, nullptr, 0, 0};
  vk::PhysicalDeviceFeatures2 features2 = {vk::kFeatures2, &float16, {}};
  if (found) api.GetPhysicalDeviceFeatures2(physical, &features2);
  return found && float16.shaderFloat16;
}

Failure Device::make_device() {
  api.GetPhysicalDeviceMemoryProperties(physical, &memory);
  vk::QueueFamilyProperties families[16];
  uint32_t count = 16, family = 0;
  api.GetPhysicalDeviceQueueFamilyProperties(physical, &count, families);
  while (family < count && !(families[family].queueFlags & vk::kComputeQueue)) family++;
  if (family == count) return fail("%s has no queue that computes", properties.deviceName);
  const float priority = 1;
  const vk::DeviceQueueCreateInfo queues = {vk::kDeviceQueueCreateInfo, nullptr, 0, family, 1, &priority};
  const vk::Float16Features float16 = {vk::kFloat16Features, nullptr, 1, 0};
  const bool asked = has & kFloat16;
  const vk::DeviceCreateInfo info = {vk::kDeviceCreateInfo, asked ? &float16 : nullptr, 0, 1, &queues, 0, nullptr, asked, &kFloat16Extension, nullptr};
  GPU_TRY(check(api.CreateDevice(physical, &info, nullptr, &device), "vkCreateDevice"));
  api.GetDeviceQueue(device, family, 0, &queue);
  const vk::CommandPoolCreateInfo pool = {vk::kCommandPoolCreateInfo, nullptr, vk::kResetCommandBuffers, family};
  GPU_TRY(check(api.CreateCommandPool(device, &pool, nullptr, &commands), "vkCreateCommandPool"));
  const vk::CommandBufferAllocateInfo one = {vk::kCommandBufferAllocateInfo, nullptr, commands, 0, 1};
  GPU_TRY(check(api.AllocateCommandBuffers(device, &one, &recording), "vkAllocateCommandBuffers"));
  const vk::FenceCreateInfo unsignaled = {vk::kFenceCreateInfo, nullptr, 0};
  return check(api.CreateFence(device, &unsignaled, nullptr, &fence), "vkCreateFence");
}

Failure Device::make_layout() {
  vk::DescriptorSetLayoutBinding bindings[kBindings];
  for (uint32_t i = 0; i < kBindings; i++) bindings[i] = {i, vk::kDescriptorStorageBuffer, 1, vk::kComputeStage, nullptr};
  const vk::DescriptorSetLayoutCreateInfo info = {vk::kDescriptorSetLayoutCreateInfo, nullptr, 0, kBindings, bindings};
  GPU_TRY(check(api.CreateDescriptorSetLayout(device, &info, nullptr, &set_layout), "vkCreateDescriptorSetLayout"));
  const vk::PushConstantRange words = {vk::kComputeStage, 0, kWords * 4};
  const vk::PipelineLayoutCreateInfo all = {vk::kPipelineLayoutCreateInfo, nullptr, 0, 1, &set_layout, 1, &words};
  return check(api.CreatePipelineLayout(device, &all, nullptr, &layout), "vkCreatePipelineLayout");
}

Failure Device::open() {
  GPU_TRY(load());
  GPU_TRY(choose());
  GPU_TRY(make_device());
  GPU_TRY(make_layout());
  Failure failure = allocate(kBesideWords * 4, Memory::local, &beside);
  if (!failure) failure = clear(beside);
  GPU_TRY(failure);
  want(kSubgroups);
  want(kBeside);
  return nullptr;
}

Device* device(Failure* reason) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  static Device the;
  static char why[640];
  static bool tried = false;
  pthread_mutex_lock(&lock);
  if (!tried) {
    if (Failure failure = the.open()) snprintf(why, sizeof(why), "%s", failure);
    tried = true;
  }
  pthread_mutex_unlock(&lock);
  *reason = why[0] ? why : nullptr;
  return why[0] ? nullptr : &the;
}

// ---- buffers --------------------------------------------------------------------------------------------------------
int Device::memory_type(uint32_t allowed, Memory kind) const {
  const vk::Flags mapped = vk::kHostVisible | vk::kHostCoherent;
  const struct {
    vk::Flags needed, wished;
  } of[] = {{0, vk::kDeviceLocal}, {mapped, 0}, {mapped, vk::kHostCached}, {mapped, vk::kDeviceLocal}};
  const auto [needed, wished] = of[static_cast<int>(kind)];
  int best = -1;
  for (uint32_t i = 0; i < memory.memoryTypeCount; i++) {
    const vk::Flags flags = memory.memoryTypes[i].propertyFlags;
    if (!(allowed >> i & 1) || (flags & needed) != needed) continue;
    if ((flags & wished) == wished) return static_cast<int>(i);
    if (best < 0) best = static_cast<int>(i);
  }
  return best;
}

Failure Device::allocate(uint64_t bytes, Memory kind, Buffer* made) {
  *made = {};
  made->size = (bytes + 255) / 256 * 256 + (bytes == 0) * 256;
  if (made->size > properties.limits.maxStorageBufferRange)
    return fail("%s takes buffers of %u bytes, and %llu are needed", properties.deviceName,
                properties.limits.maxStorageBufferRange, static_cast<unsigned long long>(bytes));
  const vk::Flags usage = vk::kStorageBuffer | vk::kTransferSource | vk::kTransferTarget;
  const vk::BufferCreateInfo info = {vk::kBufferCreateInfo, nullptr, 0, made->size, usage, 0, 0, nullptr};
  GPU_TRY(check(api.CreateBuffer(device, &info, nullptr, &made->buffer), "vkCreateBuffer"));
  vk::MemoryRequirements needs;
  api.GetBufferMemoryRequirements(device, made->buffer, &needs);
  const int type = memory_type(needs.memoryTypeBits, kind);
  const vk::MemoryAllocateInfo want = {vk::kMemoryAllocateInfo, nullptr, needs.size, static_cast<uint32_t>(type)};
  vk::Result result = type < 0 ? vk::kOutOfDeviceMemory : api.AllocateMemory(device, &want, nullptr, &made->memory);
  if (result == vk::kSuccess) result = api.BindBufferMemory(device, made->buffer, made->memory, 0);
  if (result == vk::kSuccess && kind != Memory::local)
    result = api.MapMemory(device, made->memory, 0, vk::kWhole, 0, reinterpret_cast<void**>(&made->mapped));
  if (result == vk::kSuccess) return nullptr;
  release(made);
  char what[64];
  snprintf(what, sizeof(what), "%llu bytes asked for", static_cast<unsigned long long>(bytes));
  return check(result, what);
}

void Device::release(Buffer* buffer) {
  if (buffer->buffer) api.DestroyBuffer(device, buffer->buffer, nullptr);
  if (buffer->memory) api.FreeMemory(device, buffer->memory, nullptr);
  size_t kept = 0;
  for (const BoundSet& set : sets) {  // sets that name it are never found again
    bool names = false;
    for (vk::Handle handle : set.buffers) names = names || handle == buffer->buffer;
    if (!names) sets[kept++] = set;
  }
  sets.count = kept;
  *buffer = {};
}

Failure Device::clear(const Buffer& target) {
  Array<char> zeros;
  zeros.resize(target.size);
  memset(zeros.data, 0, target.size);
  Failure failure = fill(target, 0, zeros.data, target.size);
  zeros.free();
  return failure;
}

Failure Device::fill(const Buffer& target, uint64_t offset, const void* bytes, uint64_t count) {
  Buffer staging;
  GPU_TRY(allocate(count < kStaging ? count : kStaging, Memory::upload, &staging));
  Failure failure = nullptr;
  for (uint64_t done = 0; done < count && !failure; done += staging.size) {
    const uint64_t part = count - done < staging.size ? count - done : staging.size;
    memcpy(staging.mapped, static_cast<const char*>(bytes) + done, part);
    failure = begin();
    if (!failure) copy(staging, 0, target, offset + done, part);
    if (!failure) failure = finish();
  }
  release(&staging);
  return failure;
}

// ---- recording ------------------------------------------------------------------------------------------------------
Failure Device::begin() {
  if (lost) return fail("Vulkan: the GPU was lost in an earlier run; load the model again, on the CPU");
  const vk::CommandBufferBeginInfo info = {vk::kCommandBufferBeginInfo, nullptr, vk::kOneTime, nullptr};
  return check(api.BeginCommandBuffer(recording, &info), "vkBeginCommandBuffer");
}

Failure Device::make_pipeline(const Dispatch& d, uint32_t wanted, vk::Handle* found) {
  const size_t bytes = static_cast<size_t>(d.constant_count) * 4;
  const ShaderCode& code = shader_code(d.shader, &wanted);
  vk::SpecializationMapEntry entries[kMostConstants];
  for (uint32_t i = 0; i < static_cast<uint32_t>(d.constant_count); i++) entries[i] = {i, i * 4, 4};
  const vk::SpecializationInfo special = {static_cast<uint32_t>(d.constant_count), entries, bytes, d.constants};
  const vk::ShaderModuleCreateInfo module_info = {vk::kShaderModuleCreateInfo, nullptr, 0, code.words * 4, code.code};
  vk::Handle module;
  GPU_TRY(check(api.CreateShaderModule(device, &module_info, nullptr, &module), code.name));
  vk::ComputePipelineCreateInfo info = {vk::kComputePipelineCreateInfo, nullptr, 0, {}, layout, 0, 0};
  info.stage = {vk::kShaderStageCreateInfo, nullptr, 0, vk::kComputeStage, module, "main", &special};
  const vk::Result result = api.CreateComputePipelines(device, 0, 1, &info, nullptr, found);
  api.DestroyShaderModule(device, module, nullptr);
  GPU_TRY(check(result, code.name));
  Pipeline made = {d.shader, wanted, {}, d.constant_count, *found};
  memcpy(made.constants, d.constants, bytes);
  pipelines.push(made);
  return nullptr;
}

Failure Device::pipeline(const Dispatch& d, vk::Handle* found) {
  uint32_t wanted = features & allowed & d.features;
  shader_code(d.shader, &wanted);
  const size_t bytes = static_cast<size_t>(d.constant_count) * 4;
  for (const Pipeline& p : pipelines)
    if (p.shader == d.shader && p.features == wanted && p.constant_count == d.constant_count && !memcmp(p.constants, d.constants, bytes))
      return *found = p.handle, nullptr;
  const Failure failure = make_pipeline(d, wanted, found);
  if (!failure || !wanted || lost) return failure;
  features &= ~wanted;  // compilers of drivers fail at some shaders that are right: without what they use it goes on
  return pipeline(d, found);
}

Failure Device::bound(const Dispatch& d, vk::Handle* found) {
  BoundSet wanted;
  const Buffer* any = nullptr;
  for (const Buffer* buffer : d.buffers) any = any ? any : buffer;
  for (int i = 0; i < kBindings; i++) wanted.buffers[i] = (d.buffers[i] ? d.buffers[i] : any)->buffer;
  memcpy(wanted.offsets, d.offsets, sizeof(d.offsets));
  for (const BoundSet& set : sets)
    if (!memcmp(&set, &wanted, offsetof(BoundSet, set))) return *found = set.set, nullptr;
  vk::DescriptorSetAllocateInfo info = {vk::kDescriptorSetAllocateInfo, nullptr, pools.count ? pools[pools.count - 1] : 0, 1, &set_layout};
  if (!info.descriptorPool || api.AllocateDescriptorSets(device, &info, &wanted.set) != vk::kSuccess) {
    const vk::DescriptorPoolSize size = {vk::kDescriptorStorageBuffer, kSetsInPool * kBindings};
    const vk::DescriptorPoolCreateInfo pool = {vk::kDescriptorPoolCreateInfo, nullptr, 0, kSetsInPool, 1, &size};
    GPU_TRY(check(api.CreateDescriptorPool(device, &pool, nullptr, &info.descriptorPool), "vkCreateDescriptorPool"));
    pools.push(info.descriptorPool);
    GPU_TRY(check(api.AllocateDescriptorSets(device, &info, &wanted.set), "vkAllocateDescriptorSets"));
  }
  vk::DescriptorBufferInfo whole[kBindings];
  vk::WriteDescriptorSet writes[kBindings];
  for (uint32_t i = 0; i < kBindings; i++) {
    whole[i] = {wanted.buffers[i], wanted.offsets[i], vk::kWhole};
    writes[i] = {vk::kWriteDescriptorSet, nullptr, wanted.set, i, 0, 1, vk::kDescriptorStorageBuffer, nullptr, &whole[i], nullptr};
  }
  api.UpdateDescriptorSets(device, kBindings, writes, 0, nullptr);
  *found = sets.push(wanted).set;
  return nullptr;
}

Failure Device::record(const Dispatch& d) {
  vk::Handle pipe, set;
  GPU_TRY(pipeline(d, &pipe));
  GPU_TRY(bound(d, &set));
  api.CmdBindPipeline(recording, vk::kBindCompute, pipe);
  api.CmdBindDescriptorSets(recording, vk::kBindCompute, layout, 0, 1, &set, 0, nullptr);
  api.CmdPushConstants(recording, layout, vk::kComputeStage, 0, static_cast<uint32_t>(d.word_count) * 4, d.words);
  api.CmdDispatch(recording, d.groups[0], d.groups[1], d.groups[2]);
  barrier();
  dispatches++;
  return nullptr;
}

void Device::copy(const Buffer& from, uint64_t from_offset, const Buffer& to, uint64_t to_offset, uint64_t bytes) {
  const vk::BufferCopy region = {from_offset, to_offset, bytes};
  api.CmdCopyBuffer(recording, from.buffer, to.buffer, 1, &region);
  barrier();
}

void Device::barrier() {
  const vk::Flags stages = vk::kStageCompute | vk::kStageTransfer;
  const vk::MemoryBarrier all = {vk::kMemoryBarrier, nullptr, vk::kShaderWrite | vk::kTransferWrite,
                                 vk::kShaderRead | vk::kShaderWrite | vk::kTransferRead | vk::kTransferWrite | vk::kHostRead};
  api.CmdPipelineBarrier(recording, stages, stages | vk::kStageHost, 0, 1, &all, 0, nullptr, 0, nullptr);
}

void Device::drop() { api.EndCommandBuffer(recording); }

Failure Device::finish() {
  GPU_TRY(check(api.EndCommandBuffer(recording), "vkEndCommandBuffer"));
  const vk::SubmitInfo info = {vk::kSubmitInfo, nullptr, 0, nullptr, nullptr, 1, &recording, 0, nullptr};
  GPU_TRY(check(api.QueueSubmit(queue, 1, &info, fence), "vkQueueSubmit"));
  vk::Result result = vk::kTimeout;
  const int patience = properties.deviceType == vk::kCpu ? 20 * kPatience : kPatience;  // which does not hang, but may be slow
  for (int i = 0; i < patience && result == vk::kTimeout; i++) result = api.WaitForFences(device, 1, &fence, 1, kMoment);
  GPU_TRY(check(result, "vkWaitForFences"));
  submits++;
  return check(api.ResetFences(device, 1, &fence), "vkResetFences");
}
