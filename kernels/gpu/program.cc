#include "program.h"

#include <stdio.h>
#include <string.h>

namespace {

constexpr uint64_t kLarge = 256 << 10;  // bytes from which a constant has a buffer of its own and no copy on the CPU
constexpr uint64_t kAlign = 256;        // of what lies in buffers: no shader reads wider vectors than 16 bytes

uint64_t aligned(uint64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

uint64_t hash_of(const char* text) {
  uint64_t h = 1469598103934665603ull;
  for (; *text; text++) h = (h ^ static_cast<uint8_t>(*text)) * 1099511628211ull;
  return h;
}

// Keeps what ONNX Runtime said.
Failure said(OrtStatus* status) {
  if (!status) return nullptr;
  ort::ReleaseStatus(status);
  return fail("ONNX Runtime refused what it was asked");
}

Failure view(const OrtValue* value, Value* v) {
  OrtTensorTypeAndShapeInfo* info;
  GPU_TRY(said(ort::GetTensorTypeAndShape(value, &info)));
  OrtElement type;
  size_t rank = 0;
  OrtStatus* status = ort::GetTensorElementType(info, &type);
  if (!status) status = ort::GetDimensionsCount(info, &rank);
  if (!status && rank <= kDims) status = ort::GetDimensions(info, v->dims.d, rank);
  ort::ReleaseTensorTypeAndShapeInfo(info);
  GPU_TRY(said(status));
  if (rank > kDims) return fail("a tensor has more than 8 dimensions");
  v->type = type;
  v->dims.rank = static_cast<int>(rank);
  void* data;
  GPU_TRY(said(ort::GetTensorMutableData(const_cast<OrtValue*>(value), &data)));
  v->host = static_cast<const char*>(data);
  v->buffer = shared_block(data, &v->offset);
  if (v->offset % 16) v->buffer = nullptr;  // shaders read vectors of 16 bytes
  return nullptr;
}

}  // namespace

uint64_t bytes_of(int type, int64_t count) {
  const uint64_t n = static_cast<uint64_t>(count);
  switch (type) {
    case kUint8: case kInt8: case kBool: return n;
    case kHalf: return 2 * n;
    case kInt64: return 8 * n;
    default: return 4 * n;
  }
}

// ---- attributes -----------------------------------------------------------------------------------------------------
namespace {
const OrtOpAttr* attribute_of(const OrtNode* node, const char* name) {
  const OrtOpAttr* found = nullptr;
  if (OrtStatus* status = ort::Node_GetAttributeByName(node, name, &found)) return ort::ReleaseStatus(status), nullptr;
  return found;
}
template <class T>
bool read(const OrtNode* node, const char* name, int type, T* data, size_t size, size_t* got) {
  const OrtOpAttr* attribute = attribute_of(node, name);
  if (!attribute) return false;
  OrtStatus* status = ort::ReadOpAttr(attribute, type, static_cast<void*>(data), size, got);
  if (status) ort::ReleaseStatus(status);
  return !status;
}
}  // namespace

int64_t Node::whole(const char* attribute, int64_t otherwise) const {
  int64_t value;
  size_t got;
  return read(node, attribute, kOrtAttributeInt, &value, sizeof(value), &got) ? value : otherwise;
}
float Node::number(const char* attribute, float otherwise) const {
  float value;
  size_t got;
  return read(node, attribute, kOrtAttributeFloat, &value, sizeof(value), &got) ? value : otherwise;
}
bool Node::is(const char* attribute, const char* text) const {
  char value[32];
  size_t got = 0;
  return read(node, attribute, kOrtAttributeString, value, sizeof(value), &got) && got <= sizeof(value) &&
         !strncmp(value, text, strlen(text)) && (got == strlen(text) || value[strlen(text)] == 0);
}

bool Node::is_wholes(const char* attribute, int64_t first, int64_t second) const {
  int64_t value[2];
  size_t got = 0;
  return read(node, attribute, kOrtAttributeInts, value, sizeof(value), &got) && got == sizeof(value) && value[0] == first &&
         value[1] == second;
}

// ---- making a program -----------------------------------------------------------------------------------------------
int Program::place(const OrtValueInfo* info, bool* made) {
  const char* name = nullptr;
  *made = false;
  if (!info || said(ort::GetValueInfoName(info, &name)) || !name || !*name) return kNone;
  const uint64_t hash = hash_of(name);
  for (size_t i = 0; i < places.count; i++)
    if (places[i].hash == hash && !strcmp(places[i].name, name)) return static_cast<int>(i);
  Place p;
  p.name = strdup(name);
  p.hash = hash;
  p.root = static_cast<int>(places.count);
  places.push(p);
  constants.push({});
  *made = true;
  return p.root;
}

Failure Program::add_value(const OrtValueInfo* info, int* index) {
  bool made, constant = false;
  *index = place(info, &made);
  if (!made) return nullptr;
  GPU_TRY(said(ort::ValueInfo_IsConstantInitializer(info, &constant)));
  if (!constant) return nullptr;
  const OrtValue* value = nullptr;
  GPU_TRY(said(ort::ValueInfo_GetInitializerValue(info, &value)));
  Value& v = constants[static_cast<size_t>(*index)];
  GPU_TRY(view(value, &v));
  v.buffer = nullptr;
  const uint64_t bytes = bytes_of(v.type, v.dims.count());
  if (bytes < kLarge) {
    char* copy = static_cast<char*>(__builtin_malloc(bytes + 1));
    memcpy(copy, v.host, bytes);
    v.host = kept.push(copy);
    return nullptr;
  }
  Buffer* buffer = large.push(static_cast<Buffer*>(__builtin_calloc(1, sizeof(Buffer))));
  GPU_TRY(device->allocate(bytes, Memory::local, buffer));
  GPU_TRY(device->fill(*buffer, 0, v.host, bytes));
  v.host = nullptr;
  v.buffer = buffer;
  return nullptr;
}

// Small constants lie in one buffer, and on the CPU.
Failure Program::keep_constants() {
  uint64_t total = 0;
  for (const Value& v : constants)
    if (v.host) total += aligned(bytes_of(v.type, v.dims.count()));
  GPU_TRY(device->allocate(total, Memory::local, &small));
  char* all = static_cast<char*>(__builtin_calloc(1, total + 1));
  uint64_t at = 0;
  for (Value& v : constants) {
    if (!v.host) continue;
    const uint64_t bytes = bytes_of(v.type, v.dims.count());
    memcpy(all + at, v.host, bytes);
    v.buffer = &small;
    v.offset = at;
    at += aligned(bytes);
  }
  Failure failure = total ? device->fill(small, 0, all, total) : nullptr;
  __builtin_free(all);
  return failure;
}

namespace {
Failure describe(const OrtNode* node, Node* about) {
  about->node = node;
  GPU_TRY(said(ort::Node_GetName(node, &about->name)));
  GPU_TRY(said(ort::Node_GetOperatorType(node, &about->op)));
  GPU_TRY(said(ort::Node_GetDomain(node, &about->domain)));
  GPU_TRY(said(ort::Node_GetNumInputs(node, &about->inputs)));
  return said(ort::Node_GetNumOutputs(node, &about->outputs));
}
}  // namespace

Failure set_up(const OrtNode* node, Node* about, Step* step) {
  GPU_TRY(describe(node, about));
  *step = {};
  snprintf(step->name, sizeof(step->name), "%s", about->name);
  step->op = find_operator(about->domain, about->op);
  const char* why = step->op ? nullptr : "it has no shader";
  if (!why && (about->inputs > kMostInputs || about->outputs > kMostOutputs)) why = "it has too many inputs";
  if (!why) why = step->op->setup(*about, step);
  return why ? fail("%s '%s': %s", about->op, about->name, why) : nullptr;
}

Failure Program::add_step(const OrtNode* node) {
  Node about;
  Step step;
  GPU_TRY(set_up(node, &about, &step));
  const OrtValueInfo *in[kMostInputs], *out[kMostOutputs];
  GPU_TRY(said(ort::Node_GetInputs(node, in, about.inputs)));
  GPU_TRY(said(ort::Node_GetOutputs(node, out, about.outputs)));
  step.inputs = static_cast<int>(about.inputs);
  step.outputs = static_cast<int>(about.outputs);
  const int now = static_cast<int>(steps.count);
  for (int i = 0; i < step.inputs; i++) {
    GPU_TRY(add_value(in[i], &step.in[i]));
    if (step.in[i] != kNone) places[static_cast<size_t>(places[static_cast<size_t>(step.in[i])].root)].last_step = now;
  }
  for (int i = 0; i < step.outputs; i++) GPU_TRY(add_value(out[i], &step.out[i]));
  if (step.op->same_memory) places[static_cast<size_t>(step.out[0])].root = places[static_cast<size_t>(step.in[0])].root;
  steps.push(step);
  return nullptr;
}

Failure Program::compile(const OrtGraph* graph, const OrtNode* fused) {
  Array<const OrtNode*> nodes;
  size_t count;
  GPU_TRY(said(ort::Graph_GetNumNodes(graph, &count)));
  nodes.resize(count);
  GPU_TRY(said(ort::Graph_GetNodes(graph, nodes.data, count)));
  for (const OrtNode* node : nodes) GPU_TRY(add_step(node));
  nodes.free();
  Node about;
  GPU_TRY(describe(fused, &about));
  Array<const OrtValueInfo*> ends;
  ends.resize(about.inputs + about.outputs + 1);
  GPU_TRY(said(ort::Node_GetInputs(fused, ends.data, about.inputs)));
  GPU_TRY(said(ort::Node_GetOutputs(fused, ends.data + about.inputs, about.outputs)));
  for (size_t i = 0; i < about.inputs + about.outputs; i++) {
    bool made;
    const int at = place(ends[i], &made);
    const bool input = i < about.inputs;
    (input ? inputs : outputs).push(at);
    if (at == kNone) continue;
    Place& p = places[static_cast<size_t>(at)];
    (input ? p.input : p.output) = static_cast<int>(input ? i : i - about.inputs);
    if (!input) places[static_cast<size_t>(p.root)].last_step = static_cast<int>(steps.count);  // to the end
  }
  ends.free();
  return keep_constants();
}

void Program::free() {
  for (Buffer* buffer : {&scratch, &upload, &download, &small}) device->release(buffer);
  for (Buffer* buffer : large) {
    device->release(buffer);
    __builtin_free(buffer);
  }
  for (char* copy : kept) __builtin_free(copy);
  for (Place& p : places) __builtin_free(const_cast<char*>(p.name));
  large.free();
  kept.free();
  places.free();
  constants.free();
  steps.free();
  inputs.free();
  outputs.free();
}

// ---- a run's memory -------------------------------------------------------------------------------------------------
uint64_t Run::take(uint64_t bytes, int root) {
  const uint64_t size = aligned(bytes ? bytes : 1);
  uint64_t at = 0;
  size_t i = 0;
  for (; i < blocks.count && blocks[i].offset - at < size; i++) at = blocks[i].offset + blocks[i].size;
  blocks.push({});
  for (size_t j = blocks.count - 1; j > i; j--) blocks[j] = blocks[j - 1];
  blocks[i] = {at, size, root};
  if (at + size > scratch_peak) scratch_peak = at + size;
  if (scratch_peak > program.scratch.size) short_of_room = true;
  return at;
}

void Run::end_step() {
  size_t kept = 0;
  for (const Block& block : blocks)
    if (block.root != kNone && program.places[static_cast<size_t>(block.root)].last_step > step) blocks[kept++] = block;
  blocks.count = kept;
}

Failure Run::temporary(uint64_t bytes, const Buffer** buffer, uint64_t* offset) {
  *offset = take(bytes, kNone);
  *buffer = &program.scratch;
  return nullptr;
}

Failure Run::make(const Step& s, int i, const Dims& dims, int type) {
  const int at = s.out[i];
  Value& v = values[static_cast<size_t>(at)];
  v = {type, dims, nullptr, &program.scratch, take(bytes_of(type, dims.count()), program.places[static_cast<size_t>(at)].root)};
  return nullptr;
}

Failure Run::make_mapped(const Step& s, int i, const Dims& dims) {
  const int at = program.places[static_cast<size_t>(s.out[i])].output;
  if (at == kNone) return make(s, i, dims);
  OrtValue* value;
  GPU_TRY(said(ort::KernelContext_GetOutput(context, static_cast<size_t>(at), dims.d, static_cast<size_t>(dims.rank), &value)));
  Value v;
  GPU_TRY(view(value, &v));
  if (!v.buffer) return make(s, i, dims);
  values[static_cast<size_t>(s.out[i])] = v;
  return nullptr;
}

char* Run::make_host(const Step& s, int i, const Dims& dims, int type) {
  char* bytes = static_cast<char*>(__builtin_malloc(bytes_of(type, dims.count()) + 8));
  numbers.push(bytes);
  values[static_cast<size_t>(s.out[i])] = {type, dims, bytes, nullptr, 0};
  return bytes;
}

Failure Run::upload(const void* bytes, uint64_t count, const Buffer** buffer, uint64_t* offset) {
  *buffer = &program.upload;
  *offset = upload_used;
  upload_used += aligned(count ? count : 1);
  if (upload_used > program.upload.size) short_of_room = true;
  else memcpy(program.upload.mapped + *offset, bytes, count);
  return nullptr;
}

Failure Run::to_gpu(Value& value) {
  if (value.buffer) return nullptr;
  if (!value.host) return fail("a value was read before it was computed");
  return upload(value.host, bytes_of(value.type, value.dims.count()), &value.buffer, &value.offset);
}

Failure Run::together(Value** some, int count, const Buffer** buffer) {
  *buffer = nullptr;
  bool one = true;
  for (int i = 0; i < count; i++) {
    if (!some[i]) continue;
    GPU_TRY(to_gpu(*some[i]));
    if (!*buffer) *buffer = some[i]->buffer;
    one = one && some[i]->buffer == *buffer;
  }
  if (one) return nullptr;
  for (int i = 0; i < count; i++) {
    if (!some[i] || some[i]->buffer == &program.upload) continue;
    if (!some[i]->host) return fail("values that belong together lie in two buffers of the GPU");
    some[i]->buffer = nullptr;
    GPU_TRY(to_gpu(*some[i]));
  }
  *buffer = &program.upload;
  return nullptr;
}

void Run::free() {
  for (char* bytes : numbers) __builtin_free(bytes);
  numbers.free();
  values.free();
  blocks.free();
}

// ---- running --------------------------------------------------------------------------------------------------------
namespace {
struct Fetch {
  void* to;
  uint64_t offset, bytes;
};
}  // namespace

static Failure read_inputs(Run& run) {
  Program& p = run.program;
  run.values.resize(p.constants.count);
  memcpy(static_cast<void*>(run.values.data), p.constants.data, p.constants.count * sizeof(Value));
  for (size_t i = 0; i < p.inputs.count; i++) {
    if (p.inputs[i] == kNone || p.constants[static_cast<size_t>(p.inputs[i])].type) continue;
    const OrtValue* value = nullptr;
    GPU_TRY(said(ort::KernelContext_GetInput(run.context, i, &value)));
    if (value) GPU_TRY(view(value, &run.values[static_cast<size_t>(p.inputs[i])]));
  }
  return nullptr;
}

// Hands the outputs over: at once what the CPU computed, and behind the shaders what it has to fetch.
static Failure write_outputs(Run& run, Array<Fetch>* fetches) {
  Program& p = run.program;
  for (size_t i = 0; i < p.outputs.count; i++) {
    const Value& v = run.values[static_cast<size_t>(p.outputs[i])];
    const uint64_t bytes = bytes_of(v.type, v.dims.count());
    OrtValue* value;
    void* to;
    GPU_TRY(said(ort::KernelContext_GetOutput(run.context, i, v.dims.d, static_cast<size_t>(v.dims.rank), &value)));
    GPU_TRY(said(ort::GetTensorMutableData(value, &to)));
    uint64_t offset;
    const Buffer* own = shared_block(to, &offset);
    if (v.buffer && own == v.buffer && offset == v.offset) continue;
    if (v.host) {
      memcpy(to, v.host, bytes);
      continue;
    }
    const uint64_t at = run.download_used;
    run.download_used += aligned(bytes);
    if (run.download_used > p.download.size) run.short_of_room = true;
    if (bytes == 0 || run.short_of_room) continue;
    run.device.copy(*v.buffer, v.offset, p.download, at, bytes);
    fetches->push({to, at, bytes});
  }
  return nullptr;
}

Failure Program::attempt(Run& run) {
  Array<Fetch> fetches;
  GPU_TRY(read_inputs(run));
  GPU_TRY(device->begin());
  Failure failure = nullptr;
  for (run.step = 0; run.step < static_cast<int>(steps.count) && !failure; run.step++) {
    const Step& s = steps[static_cast<size_t>(run.step)];
    failure = s.op->run(run, s);
    run.end_step();
  }
  if (!failure) failure = write_outputs(run, &fetches);
  if (failure || run.short_of_room) device->drop();
  else failure = device->finish();
  device->copied += run.upload_used + run.download_used;
  if (!failure && !run.short_of_room)
    for (const Fetch& f : fetches) memcpy(f.to, download.mapped + f.offset, f.bytes);
  fetches.free();
  return failure;
}

Failure Program::run(OrtKernelContext* context) {
  Failure failure = nullptr;
  for (bool again = true; again && !failure;) {
    Run one = {*this, *device, context};
    failure = attempt(one);
    again = one.short_of_room && !failure;
    const struct {
      Buffer* buffer;
      uint64_t need;
      Memory kind;
    } all[] = {{&scratch, one.scratch_peak, Memory::local}, {&upload, one.upload_used, Memory::upload}, {&download, one.download_used, Memory::download}};
    for (const auto& [buffer, need, kind] : all) {
      if (failure || need <= buffer->size) continue;
      device->release(buffer);
      failure = device->allocate(need + need / 4, kind, buffer);
    }
    one.free();
  }
  return failure;
}

// ---- memory that both sides see -------------------------------------------------------------------------------------
namespace {
pthread_mutex_t blocks_lock = PTHREAD_MUTEX_INITIALIZER;
Array<Buffer*> blocks;
}  // namespace

const Buffer* shared_block(const void* address, uint64_t* offset) {
  const char* at = static_cast<const char*>(address);
  const Buffer* found = nullptr;
  pthread_mutex_lock(&blocks_lock);
  for (const Buffer* block : blocks)
    if (at >= block->mapped && at < block->mapped + block->size) found = block;
  pthread_mutex_unlock(&blocks_lock);
  *offset = found ? static_cast<uint64_t>(at - found->mapped) : 0;
  return found;
}

extern "C" __attribute__((visibility("default"))) void* edgepeft_vulkan_allocate(uint64_t bytes) {
  Failure reason;
  Device* own = device(&reason);
  if (!own) return nullptr;
  Buffer made;
  pthread_mutex_lock(&own->lock);
  const Failure failure = own->allocate(bytes, Memory::shared, &made);
  pthread_mutex_unlock(&own->lock);
  if (failure) return nullptr;
  Buffer* block = static_cast<Buffer*>(__builtin_malloc(sizeof(Buffer)));
  *block = made;
  pthread_mutex_lock(&blocks_lock);
  blocks.push(block);
  pthread_mutex_unlock(&blocks_lock);
  return block->mapped;
}

extern "C" __attribute__((visibility("default"))) void edgepeft_vulkan_free(void* address) {
  Failure reason;
  Device* own = device(&reason);
  pthread_mutex_lock(&own->lock);
  pthread_mutex_lock(&blocks_lock);
  for (size_t i = 0; i < blocks.count; i++) {
    if (blocks[i]->mapped != address) continue;
    own->release(blocks[i]);
    __builtin_free(blocks[i]);
    blocks[i] = blocks[--blocks.count];
    break;
  }
  pthread_mutex_unlock(&blocks_lock);
  pthread_mutex_unlock(&own->lock);
}
