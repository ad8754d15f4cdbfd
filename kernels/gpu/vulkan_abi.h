// What the execution provider needs of Vulkan 1.1, declared from its published ABI, as no headers come with a driver.
// Structures have the registry's layout and their members its names; tests lay them beside the real header where one is
// installed. Of long structures only the members in use are named, the others are counted.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace vk {

using Bool = uint32_t;
using Flags = uint32_t;
using Size = uint64_t;
// Dispatchable handles are pointers; the others have 64 bits everywhere.
using Instance = struct InstanceT*;
using PhysicalDevice = struct PhysicalDeviceT*;
using Device = struct DeviceT*;
using Queue = struct QueueT*;
using CommandBuffer = struct CommandBufferT*;
using Handle = uint64_t;

enum Result : int32_t {
  kSuccess = 0, kTimeout = 2, kOutOfHostMemory = -1, kOutOfDeviceMemory = -2, kInitializationFailed = -3, kDeviceLost = -4,
  kLayerNotPresent = -6, kIncompatibleDriver = -9, kUnknown = -13,
};
enum DeviceType : uint32_t { kOther = 0, kIntegrated = 1, kDiscrete = 2, kVirtual = 3, kCpu = 4 };
enum : uint32_t {
  kApplicationInfo = 0, kInstanceCreateInfo = 1, kDeviceQueueCreateInfo = 2, kDeviceCreateInfo = 3, kSubmitInfo = 4,
  kMemoryAllocateInfo = 5, kFenceCreateInfo = 8, kBufferCreateInfo = 12, kShaderModuleCreateInfo = 16,
  kShaderStageCreateInfo = 18, kComputePipelineCreateInfo = 29, kPipelineLayoutCreateInfo = 30,
  kDescriptorSetLayoutCreateInfo = 32, kDescriptorPoolCreateInfo = 33, kDescriptorSetAllocateInfo = 34,
  kWriteDescriptorSet = 35, kCommandPoolCreateInfo = 39, kCommandBufferAllocateInfo = 40, kCommandBufferBeginInfo = 42,
  kMemoryBarrier = 46, kFeatures2 = 1000059000, kProperties2 = 1000059001, kFloat16Features = 1000082000, kSubgroupProperties = 1000094000,
};
constexpr uint32_t kVersion11 = 1u << 22 | 1u << 12;
constexpr Flags kComputeQueue = 2;
constexpr Flags kDeviceLocal = 1, kHostVisible = 2, kHostCoherent = 4, kHostCached = 8;
constexpr Flags kTransferSource = 1, kTransferTarget = 2, kStorageBuffer = 0x20;
constexpr uint32_t kDescriptorStorageBuffer = 7;
constexpr Flags kComputeStage = 0x20, kResetCommandBuffers = 2, kOneTime = 1;
constexpr Flags kStageCompute = 0x800, kStageTransfer = 0x1000, kStageHost = 0x4000;
constexpr Flags kShaderRead = 0x20, kShaderWrite = 0x40, kTransferRead = 0x800, kTransferWrite = 0x1000, kHostRead = 0x2000;
constexpr uint32_t kBindCompute = 1;
constexpr Size kWhole = ~Size{0};
constexpr Flags kSubgroupBasic = 1, kSubgroupArithmetic = 4, kSubgroupShuffle = 0x10;

struct ApplicationInfo { uint32_t sType; const void* pNext; const char* pApplicationName; uint32_t applicationVersion; const char* pEngineName; uint32_t engineVersion, apiVersion; };
struct InstanceCreateInfo { uint32_t sType; const void* pNext; Flags flags; const ApplicationInfo* pApplicationInfo; uint32_t enabledLayerCount; const char* const* ppEnabledLayerNames; uint32_t enabledExtensionCount; const char* const* ppEnabledExtensionNames; };
struct Limits {
  uint32_t others0[7], maxStorageBufferRange, maxPushConstantsSize, maxMemoryAllocationCount, others1[9], maxPerStageDescriptorStorageBuffers;
  uint32_t others2[34], maxComputeSharedMemorySize, maxComputeWorkGroupCount[3], maxComputeWorkGroupInvocations;
  uint32_t others3[23];
  uint64_t minStorageBufferOffsetAlignment, others4[21];
};
struct PhysicalDeviceProperties { uint32_t apiVersion, driverVersion, vendorID, deviceID; DeviceType deviceType; char deviceName[256]; uint8_t pipelineCacheUUID[16]; alignas(8) Limits limits; uint32_t sparse[5]; };
struct SubgroupProperties { uint32_t sType; void* pNext; uint32_t subgroupSize; Flags supportedStages, supportedOperations; Bool quadOperationsInAllStages; };
struct ExtensionProperties { char extensionName[256]; uint32_t specVersion; };
struct PhysicalDeviceFeatures2 { uint32_t sType; void* pNext; Bool features[55]; };
struct Float16Features { uint32_t sType; void* pNext; Bool shaderFloat16, shaderInt8; };
struct PhysicalDeviceProperties2 { uint32_t sType; void* pNext; PhysicalDeviceProperties properties; };
struct MemoryType { Flags propertyFlags; uint32_t heapIndex; };
struct MemoryHeap { Size size; Flags flags; };
struct MemoryProperties { uint32_t memoryTypeCount; MemoryType memoryTypes[32]; uint32_t memoryHeapCount; MemoryHeap memoryHeaps[16]; };
struct QueueFamilyProperties { Flags queueFlags; uint32_t queueCount, timestampValidBits, minImageTransferGranularity[3]; };
struct DeviceQueueCreateInfo { uint32_t sType; const void* pNext; Flags flags; uint32_t queueFamilyIndex, queueCount; const float* pQueuePriorities; };
struct DeviceCreateInfo { uint32_t sType; const void* pNext; Flags flags; uint32_t queueCreateInfoCount; const DeviceQueueCreateInfo* pQueueCreateInfos; uint32_t enabledLayerCount; const char* const* ppEnabledLayerNames; uint32_t enabledExtensionCount; const char* const* ppEnabledExtensionNames; const void* pEnabledFeatures; };
struct BufferCreateInfo { uint32_t sType; const void* pNext; Flags flags; Size size; Flags usage; uint32_t sharingMode, queueFamilyIndexCount; const uint32_t* pQueueFamilyIndices; };
struct MemoryRequirements { Size size, alignment; uint32_t memoryTypeBits; };
struct MemoryAllocateInfo { uint32_t sType; const void* pNext; Size allocationSize; uint32_t memoryTypeIndex; };
struct ShaderModuleCreateInfo { uint32_t sType; const void* pNext; Flags flags; size_t codeSize; const uint32_t* pCode; };
struct SpecializationMapEntry { uint32_t constantID, offset; size_t size; };
struct SpecializationInfo { uint32_t mapEntryCount; const SpecializationMapEntry* pMapEntries; size_t dataSize; const void* pData; };
struct ShaderStageCreateInfo { uint32_t sType; const void* pNext; Flags flags, stage; Handle module; const char* pName; const SpecializationInfo* pSpecializationInfo; };
struct ComputePipelineCreateInfo { uint32_t sType; const void* pNext; Flags flags; ShaderStageCreateInfo stage; Handle layout, basePipelineHandle; int32_t basePipelineIndex; };
struct DescriptorSetLayoutBinding { uint32_t binding, descriptorType, descriptorCount; Flags stageFlags; const Handle* pImmutableSamplers; };
struct DescriptorSetLayoutCreateInfo { uint32_t sType; const void* pNext; Flags flags; uint32_t bindingCount; const DescriptorSetLayoutBinding* pBindings; };
struct PushConstantRange { Flags stageFlags; uint32_t offset, size; };
struct PipelineLayoutCreateInfo { uint32_t sType; const void* pNext; Flags flags; uint32_t setLayoutCount; const Handle* pSetLayouts; uint32_t pushConstantRangeCount; const PushConstantRange* pPushConstantRanges; };
struct DescriptorPoolSize { uint32_t type, descriptorCount; };
struct DescriptorPoolCreateInfo { uint32_t sType; const void* pNext; Flags flags; uint32_t maxSets, poolSizeCount; const DescriptorPoolSize* pPoolSizes; };
struct DescriptorSetAllocateInfo { uint32_t sType; const void* pNext; Handle descriptorPool; uint32_t descriptorSetCount; const Handle* pSetLayouts; };
struct DescriptorBufferInfo { Handle buffer; Size offset, range; };
struct WriteDescriptorSet { uint32_t sType; const void* pNext; Handle dstSet; uint32_t dstBinding, dstArrayElement, descriptorCount, descriptorType; const void* pImageInfo; const DescriptorBufferInfo* pBufferInfo; const Handle* pTexelBufferView; };
struct CommandPoolCreateInfo { uint32_t sType; const void* pNext; Flags flags; uint32_t queueFamilyIndex; };
struct CommandBufferAllocateInfo { uint32_t sType; const void* pNext; Handle commandPool; uint32_t level, commandBufferCount; };
struct CommandBufferBeginInfo { uint32_t sType; const void* pNext; Flags flags; const void* pInheritanceInfo; };
struct MemoryBarrier { uint32_t sType; const void* pNext; Flags srcAccessMask, dstAccessMask; };
struct BufferCopy { Size srcOffset, dstOffset, size; };
struct FenceCreateInfo { uint32_t sType; const void* pNext; Flags flags; };
struct SubmitInfo { uint32_t sType; const void* pNext; uint32_t waitSemaphoreCount; const Handle* pWaitSemaphores; const Flags* pWaitDstStageMask; uint32_t commandBufferCount; const CommandBuffer* pCommandBuffers; uint32_t signalSemaphoreCount; const Handle* pSignalSemaphores; };

static_assert(sizeof(Limits) == 504 && offsetof(Limits, maxComputeSharedMemorySize) == 216, "the registry's layout");
static_assert(offsetof(Limits, minStorageBufferOffsetAlignment) == 328, "the registry's layout");
static_assert(sizeof(PhysicalDeviceProperties) == 824 && offsetof(PhysicalDeviceProperties, limits) == 296, "the registry's layout");

// X(result, name, arguments)
#define EP_VULKAN(X)                                                                                                     \
  X(Result, EnumeratePhysicalDevices, (Instance, uint32_t*, PhysicalDevice*))                                            \
  X(void, GetPhysicalDeviceProperties2, (PhysicalDevice, PhysicalDeviceProperties2*))                                    \
  X(void, GetPhysicalDeviceFeatures2, (PhysicalDevice, PhysicalDeviceFeatures2*))                                        \
  X(Result, EnumerateDeviceExtensionProperties, (PhysicalDevice, const char*, uint32_t*, ExtensionProperties*))          \
  X(void, GetPhysicalDeviceMemoryProperties, (PhysicalDevice, MemoryProperties*))                                        \
  X(void, GetPhysicalDeviceQueueFamilyProperties, (PhysicalDevice, uint32_t*, QueueFamilyProperties*))                   \
  X(Result, CreateDevice, (PhysicalDevice, const DeviceCreateInfo*, const void*, Device*))                               \
  X(void, GetDeviceQueue, (Device, uint32_t, uint32_t, Queue*))                                                          \
  X(Result, CreateBuffer, (Device, const BufferCreateInfo*, const void*, Handle*))                                       \
  X(void, DestroyBuffer, (Device, Handle, const void*))                                                                  \
  X(void, GetBufferMemoryRequirements, (Device, Handle, MemoryRequirements*))                                            \
  X(Result, AllocateMemory, (Device, const MemoryAllocateInfo*, const void*, Handle*))                                   \
  X(void, FreeMemory, (Device, Handle, const void*))                                                                     \
  X(Result, BindBufferMemory, (Device, Handle, Handle, Size))                                                            \
  X(Result, MapMemory, (Device, Handle, Size, Size, Flags, void**))                                                      \
  X(Result, CreateShaderModule, (Device, const ShaderModuleCreateInfo*, const void*, Handle*))                           \
  X(void, DestroyShaderModule, (Device, Handle, const void*))                                                            \
  X(Result, CreateDescriptorSetLayout, (Device, const DescriptorSetLayoutCreateInfo*, const void*, Handle*))             \
  X(Result, CreatePipelineLayout, (Device, const PipelineLayoutCreateInfo*, const void*, Handle*))                       \
  X(Result, CreateComputePipelines, (Device, Handle, uint32_t, const ComputePipelineCreateInfo*, const void*, Handle*))  \
  X(Result, CreateDescriptorPool, (Device, const DescriptorPoolCreateInfo*, const void*, Handle*))                       \
  X(Result, ResetDescriptorPool, (Device, Handle, Flags))                                                                \
  X(void, DestroyDescriptorPool, (Device, Handle, const void*))                                                          \
  X(Result, AllocateDescriptorSets, (Device, const DescriptorSetAllocateInfo*, Handle*))                                 \
  X(void, UpdateDescriptorSets, (Device, uint32_t, const WriteDescriptorSet*, uint32_t, const void*))                    \
  X(Result, CreateCommandPool, (Device, const CommandPoolCreateInfo*, const void*, Handle*))                             \
  X(Result, AllocateCommandBuffers, (Device, const CommandBufferAllocateInfo*, CommandBuffer*))                          \
  X(Result, BeginCommandBuffer, (CommandBuffer, const CommandBufferBeginInfo*))                                          \
  X(Result, EndCommandBuffer, (CommandBuffer))                                                                           \
  X(void, CmdBindPipeline, (CommandBuffer, uint32_t, Handle))                                                            \
  X(void, CmdBindDescriptorSets, (CommandBuffer, uint32_t, Handle, uint32_t, uint32_t, const Handle*, uint32_t, const uint32_t*)) \
  X(void, CmdPushConstants, (CommandBuffer, Handle, Flags, uint32_t, uint32_t, const void*))                             \
  X(void, CmdDispatch, (CommandBuffer, uint32_t, uint32_t, uint32_t))                                                    \
  X(void, CmdCopyBuffer, (CommandBuffer, Handle, Handle, uint32_t, const BufferCopy*))                                   \
  X(void, CmdPipelineBarrier, (CommandBuffer, Flags, Flags, Flags, uint32_t, const MemoryBarrier*, uint32_t, const void*, uint32_t, const void*)) \
  X(Result, CreateFence, (Device, const FenceCreateInfo*, const void*, Handle*))                                         \
  X(Result, WaitForFences, (Device, uint32_t, const Handle*, Bool, uint64_t))                                            \
  X(Result, ResetFences, (Device, uint32_t, const Handle*))                                                              \
  X(Result, QueueSubmit, (Queue, uint32_t, const SubmitInfo*, Handle))

using Function = void (*)();
using GetInstanceProcAddr = Function (*)(Instance, const char*);
using CreateInstance = Result (*)(const InstanceCreateInfo*, const void*, Instance*);

// The functions of the loader that was found.
struct Api {
#define EP_VULKAN_MEMBER(result, name, arguments) result(*name) arguments;
  EP_VULKAN(EP_VULKAN_MEMBER)
#undef EP_VULKAN_MEMBER
};

}  // namespace vk
