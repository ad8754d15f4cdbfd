// What adapters add beside the terms of a linear: a router's gates, bottlenecks, and rows before a text.
#include "operators.h"

namespace {

// A float32 value of the step alone.
Failure own(Run& run, const Dims& dims, Value* v) {
  *v = {kFloat, dims, nullptr, nullptr, 0};
  return run.temporary(bytes_of(kFloat, dims.count()), &v->buffer, &v->offset);
}

Dims with_last(Dims dims, int64_t last) {
  dims.d[dims.rank - 1] = last;
  return dims;
}

}  // namespace

Failure run_router_gate(Run& run, const Step& s) {
  Value &x = run.in(s, 0), &router = run.in(s, 1);
  const int64_t experts = router.dims.rank == 2 ? router.dims.d[0] : 0, ranks = run.in(s, 2).dims.d[0];
  if (!x.dims.rank || experts <= 0 || ranks % experts) return run.refuse(s, "expected a router [E, K] and as many ranks for each expert");
  Value scores;
  GPU_TRY(own(run, with_last(x.dims, experts), &scores));
  GPU_TRY(multiply(run, s, x, router, nullptr, true, scores));
  GPU_TRY(run.make(s, 0, with_last(x.dims, ranks)));
  const Value& gate = run.out(s, 0);
  Dispatch d;
  d.shader = Shader::share;
  d.buffers[0] = scores.buffer;
  d.buffers[1] = gate.buffer;
  for (int64_t size : {scores.dims.count() / experts, ranks, experts}) d.word(static_cast<uint64_t>(size));
  for (uint64_t at : {scores.element(), gate.element()}) d.word(at);
  d.groups[0] = static_cast<uint32_t>((gate.dims.count() + 63) / 64);
  return d.groups[0] ? run.record(d) : nullptr;
}

Failure run_bottleneck(Run& run, const Step& s) {
  Value &y = run.in(s, 0), &h = run.in(s, 1), &down = run.in(s, 2), &up = run.in(s, 4);
  if (!h.dims.rank || down.dims.rank != 2 || up.dims.rank != 2 || up.dims.d[0] != y.dims.last() || up.dims.d[1] != down.dims.d[0])
    return run.refuse(s, "expected down [R, H] and up [N, R]");
  Value low, high, added;
  GPU_TRY(run.to_gpu(y));
  GPU_TRY(own(run, with_last(h.dims, down.dims.d[0]), &low));
  GPU_TRY(own(run, low.dims, &high));
  GPU_TRY(own(run, y.dims, &added));
  GPU_TRY(multiply(run, s, h, down, &run.in(s, 3), true, low));
  GPU_TRY(each(run, Each::gelu, low, nullptr, high));
  GPU_TRY(multiply(run, s, high, up, &run.in(s, 5), true, added));
  GPU_TRY(run.make(s, 0, y.dims));
  return each(run, Each::add, y, &added, run.out(s, 0));
}

Failure run_before(Run& run, const Step& s) {
  Value &x = run.in(s, 0), &rows = run.in(s, 1);
  if (x.dims.rank != 3 || rows.dims.rank != 2 || rows.dims.d[1] != x.dims.d[2] || x.type != kFloat || rows.type != kFloat)
    return run.refuse(s, "expected x [B, S, H] and rows [V, H] in float32");
  GPU_TRY(run.to_gpu(x));
  GPU_TRY(run.to_gpu(rows));
  Dims dims = x.dims;
  dims.d[1] += rows.dims.d[0];
  GPU_TRY(run.make(s, 0, dims));
  if (run.short_of_room) return nullptr;
  const Value& z = run.out(s, 0);
  const uint64_t before = bytes_of(kFloat, rows.dims.count()), text = bytes_of(kFloat, x.dims.d[1] * x.dims.d[2]);
  for (uint64_t b = 0; b < static_cast<uint64_t>(x.dims.d[0]); b++) {
    const uint64_t at = z.offset + b * (before + text);
    if (before) run.device.copy(*rows.buffer, rows.offset, *z.buffer, at, before);
    if (text) run.device.copy(*x.buffer, x.offset + b * text, *z.buffer, at + before, text);
  }
  return nullptr;
}
