// Making a program of a graph: places, constants on the side that reads them, and steps in the graph's order.
#include <string.h>

#include "program.h"

namespace {

constexpr uint64_t kLarge = 256 << 10;  // bytes from which a constant has a buffer of its own and no copy on the CPU

uint64_t hash_of(const char* text) {
  uint64_t h = 1469598103934665603ull;
  for (; *text; text++) h = (h ^ static_cast<uint8_t>(*text)) * 1099511628211ull;
  return h;
}

}  // namespace

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
