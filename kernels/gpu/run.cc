// One run of a program: its values' memory, the inputs and outputs, and the command buffer that is recorded and submitted.
#include <string.h>

#include "program.h"

uint64_t bytes_of(int type, int64_t count) {
  const uint64_t n = static_cast<uint64_t>(count);
  switch (type) {
    case kUint8: case kInt8: case kBool: return n;
    case kHalf: return 2 * n;
    case kInt64: return 8 * n;
    default: return 4 * n;
  }
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

Failure Run::make_mapped(const Step& s, int i, const Dims& dims, int type) {
  const int at = program.places[static_cast<size_t>(s.out[i])].output;
  if (at == kNone) return make(s, i, dims, type);
  OrtValue* value;
  GPU_TRY(said(ort::KernelContext_GetOutput(context, static_cast<size_t>(at), dims.d, static_cast<size_t>(dims.rank), &value)));
  Value v;
  GPU_TRY(view(value, &v));
  if (!v.buffer) return make(s, i, dims, type);
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
    if (failure || run.short_of_room || run.products < device->most_products) continue;
    run.products = 0;
    failure = device->finish();
    if (!failure) failure = device->begin();
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
