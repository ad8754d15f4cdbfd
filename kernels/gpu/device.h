// One Vulkan device: found by dlopen, its buffers, its pipelines, and the recording of dispatches.
//
// Every shader has the same layout: kBindings storage buffers and kWords words of push constants. Offsets into buffers that
// change from run to run are among the words, so that a descriptor set is made once, not once a dispatch.
//
// Functions that can fail return nullptr or what went wrong, for a person to read. A device that is lost stays lost.
#pragma once
#include <pthread.h>

#include <initializer_list>

#include "vulkan_abi.h"

constexpr int kBindings = 9;
constexpr int kWords = 32;
constexpr int kMostConstants = 12;

using Failure = const char*;

#define GPU_TRY(call)                       \
  do {                                      \
    if (Failure failed_ = (call)) return failed_; \
  } while (0)

// Keeps one message for each thread.
Failure fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A growing array of plain values.
template <class T>
struct Array {
  T* data = nullptr;
  size_t count = 0, room = 0;

  T& operator[](size_t i) { return data[i]; }
  const T& operator[](size_t i) const { return data[i]; }
  T* begin() { return data; }
  T* end() { return data + count; }
  void resize(size_t n) {
    if (n > room) {
      room = n > 2 * room ? n : 2 * room;
      data = static_cast<T*>(__builtin_realloc(data, room * sizeof(T)));
    }
    count = n;
  }
  T& push(const T& value) {
    const T copy = value;
    resize(count + 1);
    return data[count - 1] = copy;
  }
  void clear() { count = 0; }
  void free() {
    __builtin_free(data);
    *this = {};
  }
};

enum class Memory { local, upload, download, shared };  // shared: seen by both, the GPU's own where there is such

struct Buffer {
  vk::Handle buffer = 0, memory = 0;
  uint64_t size = 0;
  char* mapped = nullptr;  // where the CPU sees it
};

enum class Shader : int;

// What a device may have beyond Vulkan 1.1's least, and shaders have variants for.
// kBeside: A x is computed in the dispatch that reads it, which takes atomics that say what other workgroups wrote.
enum Feature : uint32_t { kSubgroups = 1, kFloat16 = 2, kBeside = 4 };

// Where an adapted linear has A x from: shaders/linear.comp.
enum class Low : uint32_t { read, inside, beside, behind };
// What tiles and ranks of one dispatch tell each other in: words of its state, of each of few rows, and of A x.
constexpr int64_t kFewRows = 8;  // of x, that the first shader takes
constexpr int64_t kMostTiles = 1 << 14, kMostRanks = 1 << 10;  // of one row
constexpr uint64_t kBesideLow = static_cast<uint64_t>(kFewRows * (1 + kMostTiles)), kBesideWords = kBesideLow + kFewRows * kMostRanks;

// What is known of a vendor's GPUs: rows of classes.inc.
struct DeviceClass {
  const char* name;
  uint32_t vendor, threads, features;  // threads: most that sum one tile; features: that are worth a trial
};

// What a dispatch is made of.
struct Dispatch {
  Shader shader;
  uint32_t constants[kMostConstants];
  int constant_count = 0;
  uint32_t features = kSubgroups;  // of the device's, that it may use
  const Buffer* buffers[kBindings] = {};
  uint64_t offsets[kBindings] = {};  // bytes, multiples of 256: of constants
  uint32_t words[kWords];
  int word_count = 0;
  uint32_t groups[3] = {1, 1, 1};

  void constant(uint32_t value) { constants[constant_count++] = value; }
  void word(uint64_t value) { words[word_count++] = static_cast<uint32_t>(value); }
};

struct Pipeline {
  Shader shader;
  uint32_t features;
  uint32_t constants[kMostConstants];
  int constant_count;
  vk::Handle handle;
};

struct BoundSet {
  vk::Handle buffers[kBindings];
  uint64_t offsets[kBindings];
  vk::Handle set;
};

struct Device {
  vk::Api api;
  vk::Instance instance = nullptr;
  vk::PhysicalDevice physical = nullptr;
  vk::Device device = nullptr;
  vk::Queue queue = nullptr;
  vk::PhysicalDeviceProperties properties;
  DeviceClass kind;
  uint32_t has = 0;        // features that the driver says it has and its class allows, and that were not tried yet
  uint32_t features = 0;   // those that were tried and right
  uint32_t allowed = ~0u;  // those of them that are used
  vk::SubgroupProperties subgroups;
  vk::MemoryProperties memory;
  vk::Handle set_layout = 0, layout = 0, commands = 0, fence = 0;
  vk::CommandBuffer recording = nullptr;
  Array<Pipeline> pipelines;
  Array<BoundSet> sets;
  Array<vk::Handle> pools;
  Buffer beside;            // zeros before and behind every dispatch, but for A x
  bool ranks_last = false;  // of a dispatch, for tests
  uint64_t submits = 0, dispatches = 0, copied = 0;  // copied: bytes of runs, in and out
  // After so many products a command buffer ends, as phones take a GPU that is busy for seconds for one that hangs.
  uint64_t most_products = 8ull << 30;
  bool lost = false;
  pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  // of whoever records: there is one command buffer

  Failure open();
  Failure allocate(uint64_t bytes, Memory kind, Buffer* made);
  void release(Buffer* buffer);
  // Puts bytes into a buffer that the CPU need not see, by way of one that it does.
  Failure fill(const Buffer& target, uint64_t offset, const void* bytes, uint64_t count);
  Failure clear(const Buffer& target);
  Failure begin();
  Failure record(const Dispatch& dispatch);
  void copy(const Buffer& from, uint64_t from_offset, const Buffer& to, uint64_t to_offset, uint64_t bytes);
  Failure finish();  // submits what was recorded and waits for it
  void drop();       // forgets what was recorded
  Failure check(vk::Result result, const char* what);
  // Takes the GPU for one of a vendor's phones from now on, and tries what such have: for tests on drivers of no vendor.
  void take_for(uint32_t vendor);
  uint32_t most_threads() const;  // that sum one tile
  // Has a feature used from now on, if the device has it and it computes what the plain shader does. Costs a trial, once.
  void want(Feature feature);

 private:
  Failure load();
  Failure choose();
  void classify();
  bool trial(uint32_t feature);
  bool has_float16();
  Failure make_device();
  Failure make_layout();
  int memory_type(uint32_t allowed, Memory kind) const;
  Failure pipeline(const Dispatch& dispatch, vk::Handle* found);
  Failure make_pipeline(const Dispatch& dispatch, uint32_t features, vk::Handle* found);
  Failure bound(const Dispatch& dispatch, vk::Handle* found);
  void barrier();
};

// The process's device, opened at first use; `reason` says why there is none.
Device* device(Failure* reason);
