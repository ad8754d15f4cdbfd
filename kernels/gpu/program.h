// A graph as a program for the device: values, steps in order, and one run of them.
//
//     graph inputs ─► on the CPU, or mapped ─┐
//     constants: small ones on both sides ───┼─► steps ─► one command buffer, one submit ─► graph outputs
//     large ones on the GPU alone ───────────┘
//
// Whole numbers and what depends on them alone (counts, positions, masks) are computed on the CPU while the steps are
// recorded, as shapes need them there; everything else stays on the GPU. A value of one side is brought to the GPU when a
// shader first asks for it. Intermediate values share one buffer by what is still to be read, in the order of recording.
// Memory from edgepeft_vulkan_allocate is seen by both sides: inputs and outputs that lie there are neither copied in
// nor out, which is how keys, values and adapters stay on the GPU.
#pragma once
#include "device.h"
#include "ep_abi.h"

constexpr size_t kDims = 8;
constexpr int kMostInputs = 24;
constexpr int kMostOutputs = 4;
constexpr int kNone = -1;
constexpr uint32_t kNeutral = 0xffffffffu;  // in place of an offset: nothing to read

enum : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kBool = 9, kHalf = 10 };

struct Dims {
  int rank = 0;
  int64_t d[kDims] = {};

  int64_t count() const {
    int64_t n = 1;
    for (int i = 0; i < rank; i++) n *= d[i];
    return n;
  }
  int64_t last() const { return rank ? d[rank - 1] : 1; }
  void push(int64_t n) { d[rank++] = n; }
};

constexpr uint64_t kAlign = 256;  // of what lies in buffers: no shader reads wider vectors than 16 bytes

inline uint64_t aligned(uint64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }
uint64_t bytes_of(int type, int64_t count);

struct Value {
  int type = 0;
  Dims dims;
  const char* host = nullptr;      // where the CPU has it
  const Buffer* buffer = nullptr;  // where the GPU has it
  uint64_t offset = 0;             // bytes

  bool holds(float number) const { return host && type == kFloat && dims.count() == 1 && *reinterpret_cast<const float*>(host) == number; }
  int64_t whole(int64_t i) const { return type == kInt64 ? reinterpret_cast<const int64_t*>(host)[i] : reinterpret_cast<const int32_t*>(host)[i]; }
  uint64_t element() const { return offset / bytes_of(type, 1); }
};

// What the compiled program knows of a value.
struct Place {
  const char* name;
  uint64_t hash;
  int input = kNone, output = kNone;  // of the graph
  int root;                           // whose memory it has
  int last_step = kNone;              // that reads its memory; of roots
};

struct Run;
struct Step;

// A node while the program is made.
struct Node {
  const OrtNode* node;
  const char *name, *op, *domain;
  size_t inputs, outputs;

  int64_t whole(const char* attribute, int64_t otherwise) const;
  float number(const char* attribute, float otherwise) const;
  bool is(const char* attribute, const char* text, bool otherwise = false) const;
  bool is_wholes(const char* attribute, int64_t first, int64_t second) const;
};

// One row for each operator. `setup` reads attributes and refuses what cannot be run; `run` records it or computes it.
struct Operator {
  const char *domain, *name;  // a name that ends in '*' stands for all that begin so
  Failure (*setup)(const Node&, Step*);
  Failure (*run)(Run&, const Step&);
  bool same_memory;  // of the first input and the first output
};
const Operator* find_operator(const char* domain, const char* name);

struct Step {
  const Operator* op;
  char name[96];
  int in[kMostInputs], out[kMostOutputs];
  int inputs, outputs;
  int64_t whole[8];
  float number[4];
};

struct Block {
  uint64_t offset, size;
  int root;
};

struct Program {
  Device* device;
  bool float16;  // products may be rounded to it where the device has it
  Array<Place> places;
  Array<Value> constants;  // what a run's values begin as, one for each place
  Array<Step> steps;
  Array<int> inputs, outputs;  // places
  Buffer scratch, upload, download, small;
  Array<Buffer*> large;  // of constants
  Array<char*> kept;     // the CPU's copies

  // Whoever calls these holds the device's lock.
  Failure compile(const OrtGraph* graph, const OrtNode* fused);
  Failure run(OrtKernelContext* context);
  void free();

 private:
  int place(const OrtValueInfo* info, bool* made);
  Failure add_value(const OrtValueInfo* info, int* index);
  Failure add_step(const OrtNode* node);
  Failure keep_constants();
  Failure attempt(Run& run);
};

// One run; a fresh one where a buffer turned out too small.
struct Run {
  Program& program;
  Device& device;
  OrtKernelContext* context;
  Array<Value> values;
  Array<Block> blocks;   // of scratch, by offset
  Array<char*> numbers;  // of the CPU
  uint64_t scratch_used = 0, scratch_peak = 0, upload_used = 0, download_used = 0;
  uint64_t products = 0;  // recorded and not submitted yet
  int step = 0;
  bool short_of_room = false;

  Value& in(const Step& s, int i) { return values[static_cast<size_t>(s.in[i])]; }
  Value& out(const Step& s, int i) { return values[static_cast<size_t>(s.out[i])]; }
  bool has(const Step& s, int i) const { return i < s.inputs && s.in[i] != kNone; }
  bool wants(const Step& s, int i) const { return i < s.outputs && s.out[i] != kNone; }

  Failure to_gpu(Value& value);
  // Sees to it that values, and those null aside, lie in one buffer, which it returns.
  Failure together(Value** some, int count, const Buffer** buffer);
  Failure upload(const void* bytes, uint64_t count, const Buffer** buffer, uint64_t* offset);
  Failure make(const Step& s, int i, const Dims& dims, int type = kFloat);
  Failure make_mapped(const Step& s, int i, const Dims& dims, int type);  // in the caller's own memory where the GPU sees that
  char* make_host(const Step& s, int i, const Dims& dims, int type);
  Failure temporary(uint64_t bytes, const Buffer** buffer, uint64_t* offset);  // until the step ends
  Failure record(const Dispatch& dispatch) { return short_of_room ? nullptr : device.record(dispatch); }
  Failure refuse(const Step& s, const char* what) { return fail("%s '%s': %s", s.op->name, s.name, what); }
  void end_step();
  void free();

 private:
  uint64_t take(uint64_t bytes, int root);
};

Failure said(OrtStatus* status);                    // keeps what ONNX Runtime said
Failure view(const OrtValue* value, Value* v);      // where it lies, and its type and shape
Failure describe(const OrtNode* node, Node* about);  // all but its attributes
// Reads a node into a step; says why where it cannot be run.
Failure set_up(const OrtNode* node, Node* about, Step* step);

// The block of shared memory that an address lies in, and how far; null for others.
const Buffer* shared_block(const void* address, uint64_t* offset);
