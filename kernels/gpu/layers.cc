// Norms, what is done to each number, packed embeddings and small matrices in float.
#include <string.h>

#include "operators.h"
#include "../formats.h"

namespace {

constexpr uint32_t kThreads = 64;
constexpr uint32_t kMostGroups = 4096;  // of shaders that go over many numbers in steps

void word(Dispatch* d, int64_t value) { d->word(static_cast<uint64_t>(value)); }

void spread(Dispatch* d, int64_t count) {
  const int64_t groups = (count + kThreads - 1) / kThreads;
  d->groups[0] = static_cast<uint32_t>(groups < kMostGroups ? groups : kMostGroups);
}

uint32_t bits(float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  return u;
}

}  // namespace

// ---- norms ----------------------------------------------------------------------------------------------------------
namespace {
enum NormKind { kSkip, kLayer };
}

Failure set_norm(const Node& node, Step* step) {
  step->whole[kSkip] = !strcmp(node.op, "SkipRMSNorm");
  step->number[0] = node.number("epsilon", 1e-6f);
  return nullptr;
}

Failure set_skip_layer_norm(const Node& node, Step* step) {
  step->whole[kSkip] = step->whole[kLayer] = 1;
  step->number[0] = node.number("epsilon", 1e-12f);
  return nullptr;
}

Failure run_norm(Run& run, const Step& s) {
  const bool skip = s.whole[kSkip], layer = s.whole[kLayer];
  Value& x = run.in(s, 0);
  Value& weight = run.in(s, skip ? 2 : 1);
  Value *other = skip ? &run.in(s, 1) : nullptr, *bias = layer ? &run.in(s, 3) : nullptr;
  const int64_t k = x.dims.last(), rows = k ? x.dims.count() / k : 0;
  if (weight.dims.count() != k || (layer && bias->dims.count() != k) || (skip && other->dims.count() != x.dims.count()))
    return run.refuse(s, "expected one weight for each column");
  for (Value* value : {&x, other, &weight, bias})
    if (value) GPU_TRY(run.to_gpu(*value));
  const int total = skip && !layer ? 1 : 0;  // which output x + skip is kept in; y until it is replaced
  for (int i = 0; i <= total; i++) GPU_TRY(run.make(s, i, x.dims));
  Dispatch d;
  d.shader = Shader::norm;
  for (uint32_t constant : {kThreads, uint32_t{skip}, uint32_t{layer}}) d.constant(constant);
  d.buffers[0] = x.buffer;
  d.buffers[1] = skip ? other->buffer : nullptr;
  d.buffers[2] = run.out(s, 0).buffer;
  d.buffers[3] = weight.buffer;
  d.buffers[4] = bias ? bias->buffer : nullptr;
  word(&d, k);
  for (uint64_t at : {x.element(), skip ? other->element() : 0, run.out(s, 0).element(), run.out(s, total).element(),
                      weight.element(), bias ? bias->element() : 0})
    d.word(at);
  d.word(bits(s.number[0]));
  d.groups[0] = static_cast<uint32_t>(rows);
  return rows ? run.record(d) : nullptr;
}

// ---- each number by itself ------------------------------------------------------------------------------------------
namespace {
const char* const kEach[] = {"Add", "Sub", "Mul", "Div", "Tanh", "Gelu", nullptr, "Relu", "Sigmoid", "GatedActivation_silu",
                             "GatedActivation_gelu_tanh", nullptr, "Sum"};
constexpr int kAdd = 0, kDiv = 3, kGelu = 5, kGeluTanh = 6, kSum = 12;

// Whether repeating `part` as a whole fills `whole`.
bool repeats(const Dims& part, const Dims& whole) {
  bool inside = true;
  for (int i = 1; i <= part.rank; i++) {
    const int64_t own = part.d[part.rank - i], full = i <= whole.rank ? whole.d[whole.rank - i] : 1;
    if (own != full) inside = false;
    if (!inside && own != 1) return false;
  }
  return true;
}

// Whether a row of `part` is for all rows of a text: [texts, 1.., R] and [texts, .., R].
bool repeats_in_texts(const Dims& part, const Dims& whole) {
  if (part.rank < 3 || part.rank != whole.rank || part.d[0] != whole.d[0] || part.last() != whole.last()) return false;
  return part.count() == part.d[0] * part.last();
}
}  // namespace

Failure set_each(const Node& node, Step* step) {
  for (size_t i = 0; i < sizeof(kEach) / sizeof(kEach[0]); i++)
    if (kEach[i] && !strcmp(kEach[i], node.op)) step->whole[0] = static_cast<int64_t>(i);
  if (!strcmp(node.op, "ErfGelu")) step->whole[0] = kGelu;
  if (step->whole[0] == kSum) step->whole[0] = kAdd;
  if (step->whole[0] == kGelu && node.is("approximate", "tanh")) step->whole[0] = kGeluTanh;
  return node.inputs <= 2 && node.inputs ? nullptr : "more than two operands have no shader";
}

Failure run_each(Run& run, const Step& s) {
  Value* a = &run.in(s, 0);
  Value* b = s.inputs > 1 ? &run.in(s, 1) : nullptr;
  if (s.whole[0] <= kDiv && b && a->host && b->host) return count(run, s);
  const Dims& dims = b && b->dims.count() > a->dims.count() ? b->dims : a->dims;
  if (a->type != kFloat || (b && b->type != kFloat)) return run.refuse(s, "only float32 has a shader");
  if (!repeats(a->dims, dims) || (b && !repeats(b->dims, dims) && !repeats_in_texts(b->dims, dims))) return run.refuse(s, "such a broadcast has no shader");
  GPU_TRY(run.to_gpu(*a));
  if (b) GPU_TRY(run.to_gpu(*b));
  GPU_TRY(run.make(s, 0, dims));
  return each(run, static_cast<Each>(s.whole[0]), *a, b, run.out(s, 0));
}

Failure each(Run& run, Each op, const Value& a, const Value* b, const Value& y) {
  const int64_t n = y.dims.count();
  Dispatch d;
  d.shader = Shader::each;
  d.constant(static_cast<uint32_t>(op));
  d.buffers[0] = a.buffer;
  d.buffers[1] = b ? b->buffer : nullptr;
  d.buffers[2] = y.buffer;
  word(&d, n);
  d.word(a.element());
  word(&d, a.dims.count());
  d.word(b ? b->element() : 0);
  const int64_t texts = b && repeats_in_texts(b->dims, y.dims) ? b->dims.d[0] : 1;
  word(&d, b ? b->dims.count() / texts : 0);
  d.word(y.element());
  word(&d, n / texts);
  spread(&d, n);
  return n ? run.record(d) : nullptr;
}

// ---- packed embeddings ----------------------------------------------------------------------------------------------
namespace {
enum Embedding { kBits, kBlock, kTable, kHalfScales, kTiled };
constexpr int64_t kRowBlock = 32;  // columns of a table in rows that share a scale
}

Failure set_embedding(const Node& node, Step* step) {
  for (const FormatInfo& f : kFormats) {
    if (strcmp(f.tag, node.op + strlen("PackedEmbedding_"))) continue;
    const int64_t about[] = {f.bits, f.block, f.nf4, f.half_scale, 1};
    memcpy(step->whole, about, sizeof(about));
    return nullptr;
  }
  return "its format has no shader";
}

Failure set_row_embedding(const Node& node, Step* step) {
  const int64_t about[] = {strcmp(node.op, "RowEmbedding_i4b32") ? 8 : 4, kRowBlock, 0, 1, 0};
  memcpy(step->whole, about, sizeof(about));
  return nullptr;
}

Failure run_embedding(Run& run, const Step& s) {
  const bool tiled = s.whole[kTiled];
  Value &ids = run.in(s, 0), &w = run.in(s, 1), &scale = run.in(s, 2);
  if (!ids.host) return run.refuse(s, "its ids are not known before the run");
  const int64_t rows = w.dims.d[0] * (tiled ? kTileRows : 1), k = tiled ? w.dims.d[1] * kUnit : w.dims.d[1] * 8 / s.whole[kBits], n = ids.dims.count();
  Array<uint32_t> picked;
  Failure failure = nullptr;
  for (int64_t i = 0; i < n; i++) {
    const int64_t id = ids.whole(i);
    if (id < -rows || id >= rows) failure = run.refuse(s, "an id is beyond the table");
    picked.push(static_cast<uint32_t>(id < 0 ? id + rows : id));
  }
  Dispatch d;
  uint64_t at = 0;
  if (!failure) failure = run.upload(picked.data, picked.count * 4, &d.buffers[2], &at);
  picked.free();
  GPU_TRY(failure);
  GPU_TRY(run.to_gpu(w));
  GPU_TRY(run.to_gpu(scale));
  Dims dims = ids.dims;
  dims.push(k);
  GPU_TRY(run.make(s, 0, dims));
  d.shader = Shader::embed;
  for (int i = 0; i < 5; i++) d.constant(static_cast<uint32_t>(s.whole[i]));
  d.buffers[0] = w.buffer;
  d.buffers[1] = scale.buffer;
  d.buffers[3] = run.out(s, 0).buffer;
  word(&d, n);
  word(&d, k);
  for (uint64_t word : {w.offset / 4, scale.element(), at / 4, run.out(s, 0).element()}) d.word(word);
  spread(&d, n * k);
  return n ? run.record(d) : nullptr;
}

// ---- small matrices -------------------------------------------------------------------------------------------------
Failure set_dense(const Node& node, Step* step) {
  step->whole[0] = node.whole("transB", 0);
  if (node.whole("transA", 0) || node.number("alpha", 1) != 1 || node.number("beta", 1) != 1) return "only a b + c has a shader";
  return nullptr;
}

Failure run_dense(Run& run, const Step& s) {
  Value& b = run.in(s, 1);
  Dims dims = run.in(s, 0).dims;
  if (b.dims.rank == 2 && dims.rank) dims.d[dims.rank - 1] = b.dims.d[s.whole[0] ? 0 : 1];
  GPU_TRY(run.make(s, 0, dims));
  return multiply(run, s, run.in(s, 0), b, run.has(s, 2) ? &run.in(s, 2) : nullptr, s.whole[0], run.out(s, 0));
}

Failure multiply(Run& run, const Step& s, Value& a, Value& b, Value* c, bool turned, const Value& y) {
  if (b.dims.rank != 2 || a.type != kFloat || b.type != kFloat || a.dims.last() != b.dims.d[turned ? 1 : 0])
    return run.refuse(s, "expected float32 a [.., K] and b of two dimensions");
  const int64_t k = a.dims.last(), n = b.dims.d[turned ? 0 : 1], m = n ? y.dims.count() / n : 0;
  if (c && c->dims.count() != n) return run.refuse(s, "expected c [N]");
  for (Value* value : {&a, &b, c})
    if (value) GPU_TRY(run.to_gpu(*value));
  Dispatch d;
  d.shader = Shader::dense;
  d.constant(turned);
  d.buffers[0] = a.buffer;
  d.buffers[1] = b.buffer;
  d.buffers[2] = c ? c->buffer : nullptr;
  d.buffers[3] = y.buffer;
  for (int64_t size : {m, n, k}) word(&d, size);
  for (uint64_t at : {a.element(), b.element(), c ? c->element() : kNeutral, y.element()}) d.word(at);
  d.groups[0] = static_cast<uint32_t>((m * n + kThreads - 1) / kThreads);
  return d.groups[0] ? run.record(d) : nullptr;
}
