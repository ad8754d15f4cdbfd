// What picks rows, cuts, and renames: rows are copied as 32-bit words, shapes and which rows are known on the CPU.
#include "operators.h"

namespace {

constexpr uint32_t kMostGroups = 4096;

enum How : uint32_t { kAll, kIndexed, kTurned };

// y = rows of `words` each: those that `index` names, or all, `stride` words apart, from `first` words on; or x turned.
Failure rows(Run& run, const Value& x, const Value& y, int64_t count, int64_t words, int64_t stride, int64_t first, const Array<uint32_t>* index, How how = kAll) {
  Dispatch d;
  uint64_t at = 0;
  d.shader = Shader::rows;
  d.constant(index ? kIndexed : how);
  d.buffers[0] = x.buffer;
  d.buffers[2] = y.buffer;
  if (index) GPU_TRY(run.upload(index->data, index->count * 4, &d.buffers[1], &at));
  const int64_t sizes[] = {count, words, static_cast<int64_t>(x.offset / 4) + first, stride, static_cast<int64_t>(at / 4), static_cast<int64_t>(y.offset / 4)};
  for (int64_t size : sizes) d.word(static_cast<uint64_t>(size));
  const int64_t groups = (count * words + 63) / 64;
  d.groups[0] = static_cast<uint32_t>(groups < kMostGroups ? groups : kMostGroups);
  return groups ? run.record(d) : nullptr;
}

Failure pick(Run& run, const Step& s, Value& x, const Dims& dims, int64_t inner, const Array<uint32_t>& index) {
  const uint64_t bytes = bytes_of(x.type, inner);
  if (bytes % 4) return run.refuse(s, "rows that do not fill 32-bit words have no shader");
  GPU_TRY(run.to_gpu(x));
  GPU_TRY(run.make(s, 0, dims, x.type));
  const int64_t words = static_cast<int64_t>(bytes / 4);
  return rows(run, x, run.out(s, 0), static_cast<int64_t>(index.count), words, words, 0, &index);
}

Failure rename(Run& run, const Step& s, const Dims& dims) {
  const Value& x = run.in(s, 0);
  if (dims.count() != x.dims.count()) return run.refuse(s, "the new shape has another number of elements");
  Value y = x;
  y.dims = dims;
  run.out(s, 0) = y;
  return nullptr;
}

// Whole numbers of a tensor on the CPU, a negative axis counted from the end of `rank`.
Failure axes(Run& run, const Step& s, int64_t rank, bool* on) {
  if (!run.has(s, 1) || !run.in(s, 1).host) return run.refuse(s, "its axes are not known before the run");
  const Value& given = run.in(s, 1);
  for (int64_t i = 0; i < given.dims.count(); i++) {
    const int64_t axis = given.whole(i) + (given.whole(i) < 0 ? rank : 0);
    if (axis < 0 || axis >= rank) return run.refuse(s, "an axis is beyond the shape");
    on[axis] = true;
  }
  return nullptr;
}

}  // namespace

Failure set_gather(const Node& node, Step* step) {
  step->whole[0] = node.whole("axis", 0);
  return nullptr;
}

Failure run_gather(Run& run, const Step& s) {
  Value &x = run.in(s, 0), &index = run.in(s, 1);
  const int64_t axis = s.whole[0] + (s.whole[0] < 0 ? x.dims.rank : 0);
  if (!index.host || axis < 0 || axis >= x.dims.rank) return run.refuse(s, "which rows to pick is not known before the run");
  int64_t outer = 1, inner = 1;
  Dims dims;
  for (int i = 0; i < axis; i++) dims.push(x.dims.d[i]), outer *= x.dims.d[i];
  for (int i = 0; i < index.dims.rank; i++) dims.push(index.dims.d[i]);
  for (int i = static_cast<int>(axis) + 1; i < x.dims.rank; i++) dims.push(x.dims.d[i]), inner *= x.dims.d[i];
  const int64_t size = x.dims.d[axis], n = index.dims.count();
  Array<uint32_t> all;
  Failure failure = nullptr;
  for (int64_t o = 0; o < outer; o++)
    for (int64_t i = 0; i < n; i++) {
      const int64_t at = index.whole(i) + (index.whole(i) < 0 ? size : 0);
      if (at < 0 || at >= size) failure = run.refuse(s, "an index is beyond the tensor");
      all.push(static_cast<uint32_t>(o * size + at));
    }
  if (!failure) failure = pick(run, s, x, dims, inner, all);
  all.free();
  return failure;
}

Failure set_gather_nd(const Node& node, Step* step) {
  (void)step;
  return node.whole("batch_dims", 0) == 1 ? nullptr : "only rows of each text have a shader";
}

Failure run_gather_nd(Run& run, const Step& s) {
  Value &x = run.in(s, 0), &index = run.in(s, 1);
  if (!index.host || index.dims.rank != 3 || index.dims.last() != 1 || x.dims.rank < 2 || x.dims.d[0] != index.dims.d[0])
    return run.refuse(s, "expected indices [batch, n, 1] that are known before the run");
  const int64_t batch = x.dims.d[0], size = x.dims.d[1], n = index.dims.d[1];
  int64_t inner = 1;
  Dims dims;
  dims.push(batch);
  dims.push(n);
  for (int i = 2; i < x.dims.rank; i++) dims.push(x.dims.d[i]), inner *= x.dims.d[i];
  Array<uint32_t> all;
  Failure failure = nullptr;
  for (int64_t i = 0; i < batch * n; i++) {
    const int64_t at = index.whole(i) + (index.whole(i) < 0 ? size : 0);
    if (at < 0 || at >= size) failure = run.refuse(s, "an index is beyond the tensor");
    all.push(static_cast<uint32_t>(i / n * size + at));
  }
  if (!failure) failure = pick(run, s, x, dims, inner, all);
  all.free();
  return failure;
}

Failure set_turn(const Node& node, Step* step) {
  (void)step;
  return node.is_wholes("perm", 1, 0) ? nullptr : "only rows turned into columns have a shader";
}

Failure run_turn(Run& run, const Step& s) {
  Value& x = run.in(s, 0);
  if (x.dims.rank != 2 || bytes_of(x.type, 1) != 4) return run.refuse(s, "expected a matrix of 32-bit numbers");
  GPU_TRY(run.to_gpu(x));
  Dims dims;
  dims.push(x.dims.d[1]);
  dims.push(x.dims.d[0]);
  GPU_TRY(run.make(s, 0, dims, x.type));
  return rows(run, x, run.out(s, 0), dims.d[0], dims.d[1], dims.d[0], 0, nullptr, kTurned);
}

Failure set_split(const Node& node, Step* step) {
  step->whole[0] = node.whole("axis", 0);
  return nullptr;
}

Failure run_split(Run& run, const Step& s) {
  Value& x = run.in(s, 0);
  const bool given = run.has(s, 1);
  if ((s.whole[0] != -1 && s.whole[0] != x.dims.rank - 1) || (given && !run.in(s, 1).host) || x.type != kFloat)
    return run.refuse(s, "only float32 cut along its last axis has a shader");
  GPU_TRY(run.to_gpu(x));
  const int64_t width = x.dims.last(), count = width ? x.dims.count() / width : 0;
  int64_t first = 0;
  for (int i = 0; i < s.outputs; i++) {
    const int64_t even = (width + s.outputs - 1) / s.outputs, own = given ? run.in(s, 1).whole(i) : even < width - first ? even : width - first;
    Dims dims = x.dims;
    dims.d[dims.rank - 1] = own;
    if (first + own > width) return run.refuse(s, "its parts are longer than the whole");
    GPU_TRY(run.make(s, i, dims));
    GPU_TRY(rows(run, x, run.out(s, i), count, own, width, first, nullptr));
    first += own;
  }
  return nullptr;
}

Failure run_same(Run& run, const Step& s) { return rename(run, s, run.in(s, 0).dims); }

Failure run_reshape(Run& run, const Step& s) {
  const Value &x = run.in(s, 0), &shape = run.in(s, 1);
  if (!shape.host) return run.refuse(s, "its shape is not known before the run");
  Dims dims;
  int open = kNone;
  int64_t known = 1;
  for (int64_t i = 0; i < shape.dims.count(); i++) {
    int64_t size = shape.whole(i);
    if (size == 0 && i < x.dims.rank) size = x.dims.d[i];
    if (size < 0) open = dims.rank;
    else known *= size;
    dims.push(size);
  }
  if (open != kNone) dims.d[open] = known ? x.dims.count() / known : 0;
  return rename(run, s, dims);
}

Failure run_squeeze(Run& run, const Step& s) {
  const Dims& x = run.in(s, 0).dims;
  bool gone[kDims] = {};
  Dims dims;
  if (run.has(s, 1)) GPU_TRY(axes(run, s, x.rank, gone));
  for (int i = 0; i < x.rank; i++) gone[i] = run.has(s, 1) ? gone[i] : x.d[i] == 1;
  for (int i = 0; i < x.rank; i++)
    if (!gone[i]) dims.push(x.d[i]);
  return rename(run, s, dims);
}

Failure run_unsqueeze(Run& run, const Step& s) {
  const Dims& x = run.in(s, 0).dims;
  bool added[kDims] = {};
  Dims dims;
  const int64_t rank = x.rank + run.in(s, 1).dims.count();
  if (rank > static_cast<int64_t>(kDims)) return run.refuse(s, "more than 8 dimensions");
  GPU_TRY(axes(run, s, rank, added));
  for (int i = 0, from = 0; i < rank; i++) dims.push(added[i] ? 1 : x.d[from++]);
  return rename(run, s, dims);
}
