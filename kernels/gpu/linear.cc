// The adapted linear, packed weights of kernels/formats.h: one dispatch for few rows, with A x in it wherever the GPU was
// found to do that right; for many a product behind one that computes A x once. Factors that are their neutral number are not read.
#include <string.h>

#include "operators.h"
#include "../formats.h"

namespace {

enum Whole { kFormat, kGroups, kK, kN, kOffsets, kRows };  // kRows and two more: of the groups
enum Input { kX, kW, kScale, kSIn, kFirst };
enum Own { kA, kB, kGate, kSOut, kBias, kPerGroup };
constexpr uint32_t kHalfFlag = 1, kGateNumber = 2, kGateRows = 4, kGateTexts = 6, kSOutNumber = 8, kBiasNumber = 16;  // of a group
constexpr uint32_t kOffsetHalf = kHalfFlag << 15;  // behind those of three groups,
constexpr int kTextRows = 16;                      //   and from this bit on how many rows of x a text has
constexpr uint32_t kProductThreads = 128;
constexpr int kLowWord = 5;  // of a dispatch's: where A x begins
// Up to how many ranks of a linear, and numbers of its A, each workgroup computes A x for itself: measured on an H200.
constexpr int64_t kInsideRank = 16, kInsideNumbers = 1 << 15;

struct Part {
  Value *a, *b, *gate, *s_out, *bias;
  uint32_t rank, flags, each;  // each: rows of x that share gates, where they are of texts
};

// Reads "i4b32_g3" or "i4b32_g3_offset" behind the operator's name.
Failure parse(const char* name, Step* step) {
  for (int f = 0; f < static_cast<int>(Format::count); f++) {
    const char* tag = kFormats[f].tag;
    const size_t length = strlen(tag);
    if (strncmp(name, tag, length) || name[length] != '_') continue;
    const char* end = name + length;
    if (end[1] != 'g' || end[2] < '1' || end[2] > '3') break;
    step->whole[kOffsets] = !strcmp(end + 3, "_offset");
    if (end[3] && !step->whole[kOffsets]) break;
    step->whole[kFormat] = f;
    step->whole[kGroups] = end[2] - '0';
    return nullptr;
  }
  return "its format has no shader";
}

Value* or_neutral(Value& value, float neutral) { return value.holds(neutral) ? nullptr : &value; }

// Reads a group's adapter; `rows` are those of x.
Failure read_part(Run& run, const Step& s, int g, int64_t rows, Part* part) {
  const int at = kFirst + g * kPerGroup;
  *part = {&run.in(s, at + kA), &run.in(s, at + kB), nullptr, nullptr, nullptr, 0, 0, 0};
  const int64_t rank = part->a->dims.rank == 2 ? part->a->dims.d[0] : -1, n = s.whole[kRows + g];
  if (rank < 0 || part->a->dims.d[1] != s.whole[kK] || part->b->type != part->a->type || part->b->dims.d[0] != rank ||
      part->b->dims.d[1] != n || (part->a->type != kHalf && part->a->type != kFloat))
    return run.refuse(s, "expected a [R, K] and b [R, N], both float16 or both float32");
  part->rank = static_cast<uint32_t>(rank);
  part->gate = or_neutral(run.in(s, at + kGate), 1);
  part->s_out = or_neutral(run.in(s, at + kSOut), 1);
  part->bias = or_neutral(run.in(s, at + kBias), 0);
  if (part->a->type == kHalf) part->flags |= kHalfFlag;
  if (part->gate) {
    const int64_t gates = part->gate->dims.last(), count = part->gate->dims.count(), texts = run.in(s, kX).dims.d[0];
    if (count != 1 && gates != rank) return run.refuse(s, "expected a gate for all ranks or one for each");
    if (count == 1) part->flags |= kGateNumber;
    else if (count == rows * rank) part->flags |= kGateRows;
    else if (count != gates) part->flags |= kGateTexts, part->each = static_cast<uint32_t>(rows / texts);
    if (part->each && (part->gate->dims.d[0] != texts || count != texts * rank)) return run.refuse(s, "expected gates for each row of x or each text");
    if (part->each >> (32 - kTextRows)) return run.refuse(s, "a text of so many rows has no shader");
  }
  if (part->s_out && part->s_out->dims.count() == 1) part->flags |= kSOutNumber;
  if (part->bias && part->bias->dims.count() == 1) part->flags |= kBiasNumber;
  return nullptr;
}

uint32_t place(const Value* value) { return value ? static_cast<uint32_t>(value->element()) : kNeutral; }

// Binds the weights' offsets; `blocks` is how many a row has.
Failure read_offsets(Run& run, const Step& s, Dispatch* d, uint32_t* blocks, uint32_t* flags) {
  Value& c = run.in(s, kFirst + static_cast<int>(s.whole[kGroups]) * kPerGroup);
  const int64_t count = c.dims.rank == 2 ? c.dims.d[0] : 0;
  if (c.dims.d[1] != s.whole[kN] || count <= 0 || s.whole[kK] % (count * kUnit) || (c.type != kHalf && c.type != kFloat))
    return run.refuse(s, "expected w_offset [J, N], float16 or float32, K / J a multiple of 32");
  GPU_TRY(run.to_gpu(c));
  d->buffers[8] = c.buffer;
  d->offsets[8] = c.offset;
  *blocks = static_cast<uint32_t>(count);
  if (c.type == kHalf) *flags |= kOffsetHalf;
  return nullptr;
}

// What all three shaders read.
Failure describe(Run& run, const Step& s, int64_t rows, Dispatch* d, uint32_t* ranks, uint32_t* blocks) {
  Part parts[3];
  Value *adapter[6], *factors[7], *biases[3];
  const int groups = static_cast<int>(s.whole[kGroups]);
  Value& x = run.in(s, kX);
  *ranks = 0;
  for (int g = 0; g < groups; g++) {
    Part& part = parts[g];
    GPU_TRY(read_part(run, s, g, rows, &part));
    *ranks += part.rank;
    adapter[2 * g] = part.rank ? part.a : nullptr;
    adapter[2 * g + 1] = part.rank ? part.b : nullptr;
    factors[2 * g] = part.rank ? part.gate : nullptr;
    factors[2 * g + 1] = part.s_out;
    biases[g] = part.bias;
  }
  factors[2 * groups] = or_neutral(run.in(s, kSIn), 1);
  GPU_TRY(run.to_gpu(x));
  GPU_TRY(run.together(adapter, 2 * groups, &d->buffers[4]));
  GPU_TRY(run.together(factors, 2 * groups + 1, &d->buffers[5]));
  GPU_TRY(run.together(biases, groups, &d->buffers[6]));
  const Buffer* low;
  uint64_t low_at = 0;
  GPU_TRY(run.temporary(*ranks * static_cast<uint64_t>(rows) * 4, &low, &low_at));
  d->buffers[0] = run.in(s, kW).buffer;
  d->buffers[1] = run.in(s, kScale).buffer;
  d->offsets[0] = run.in(s, kW).offset;
  d->offsets[1] = run.in(s, kScale).offset;
  d->buffers[2] = x.buffer;
  d->buffers[3] = run.out(s, 0).buffer;
  d->buffers[7] = low;
  uint32_t flags = 0;
  uint32_t text_rows = 0;
  for (int g = 0; g < groups; g++) {
    flags |= parts[g].flags << 5 * g;
    if (parts[g].each) text_rows = parts[g].each;
  }
  flags |= text_rows << kTextRows;
  if (s.whole[kOffsets]) GPU_TRY(read_offsets(run, s, d, blocks, &flags));
  const uint64_t head[] = {static_cast<uint64_t>(s.whole[kK]), static_cast<uint64_t>(rows), static_cast<uint64_t>(s.whole[kN]) / kTileRows,
                           x.element(), place(factors[2 * groups]), low_at / 4, flags, *ranks};
  for (uint64_t word : head) d->word(word);
  for (int g = 0; g < 3; g++) {
    const bool real = g < groups, low_rank = real && parts[g].rank;
    const uint64_t words[] = {real ? static_cast<uint64_t>(s.whole[kRows + g]) : 0, real ? parts[g].rank : 0,
                              low_rank ? parts[g].a->element() : 0, low_rank ? parts[g].b->element() : 0,
                              low_rank ? place(parts[g].gate) : kNeutral, real ? place(parts[g].s_out) : kNeutral,
                              real ? place(parts[g].bias) : kNeutral, real ? run.out(s, g).element() : 0};
    for (uint64_t word : words) d->word(word);
  }
  return nullptr;
}

// How a tile's workgroup is made up; where it is on the CPU, several tiles share what each of them would compute anew.
struct Shape {
  uint32_t threads, tiles;
};
Shape shape_for(const Device& device, int64_t k, uint32_t ranks) {
  uint32_t threads = 64;
  while (threads < device.most_threads() && threads * 2 <= k / 4) threads *= 2;
  return {threads, device.properties.deviceType == vk::kCpu && ranks ? 4u : 1u};
}

// Where few rows have A x from.
Low where_low(const Device& device, const Step& s, uint32_t tiles, uint32_t ranks) {
  const int64_t groups = s.whole[kGroups];
  if (ranks <= kInsideRank * groups && ranks * s.whole[kK] <= kInsideNumbers * groups) return Low::inside;
  if (!(device.features & device.allowed & kBeside) || tiles > kMostTiles || ranks > kMostRanks) return Low::read;
  return device.ranks_last ? Low::behind : Low::beside;
}

void specialise(const FormatInfo& f, uint32_t threads, Low low, uint32_t tiles, uint32_t blocks, Dispatch* d) {
  d->constant_count = 0;
  for (uint32_t value : {threads, static_cast<uint32_t>(f.bits), static_cast<uint32_t>(f.block), uint32_t{f.nf4},
                         uint32_t{f.half_scale}, static_cast<uint32_t>(low), tiles, blocks})
    d->constant(value);
}

}  // namespace

Failure set_linear(const Node& node, Step* step) {
  GPU_TRY(parse(node.op + strlen("AdapterMatMul_"), step));
  step->whole[kK] = node.whole("K", 0);
  step->whole[kN] = node.whole("N", 0);
  const char* const rows[] = {"n0", "n1", "n2"};
  for (int g = 0; g < 3; g++) step->whole[kRows + g] = node.whole(rows[g], 0);
  return columns_fit(kFormats[step->whole[kFormat]], step->whole[kK]) ? nullptr : "its columns do not fill whole blocks";
}

Failure run_linear(Run& run, const Step& s) {
  Dims dims = run.in(s, kX).dims;
  if (dims.last() != s.whole[kK]) return run.refuse(s, "expected x with K columns");
  const int64_t rows = dims.count() / dims.last();
  for (int g = 0; g < s.whole[kGroups]; g++) {
    dims.d[dims.rank - 1] = s.whole[kRows + g];
    GPU_TRY(run.make(s, g, dims));
  }
  const FormatInfo& f = kFormats[s.whole[kFormat]];
  Dispatch d;
  uint32_t ranks, blocks = 0;
  GPU_TRY(describe(run, s, rows, &d, &ranks, &blocks));
  if (rows == 0) return nullptr;
  const uint32_t tiles = static_cast<uint32_t>(s.whole[kN] / kTileRows), m = static_cast<uint32_t>(rows);
  const bool few = rows <= kFewRows;
  const Low low = few ? where_low(run.device, s, tiles, ranks) : Low::read;
  const bool inside = low == Low::inside, beside = low == Low::beside || low == Low::behind;
  const Shape shape = shape_for(run.device, s.whole[kK], inside ? ranks : 0);
  if (ranks && low == Low::read) {
    d.shader = Shader::low;
    specialise(f, shape.threads, Low::read, 1, 0, &d);
    d.groups[0] = ranks;
    d.groups[1] = m;
    GPU_TRY(run.record(d));
  }
  d.shader = few ? Shader::linear : Shader::product;
  if (beside) d.buffers[7] = &run.device.beside, d.words[kLowWord] = kBesideLow;
  if (run.program.float16) d.features |= kFloat16;
  specialise(f, few ? shape.threads : kProductThreads, low, few ? shape.tiles : 1, blocks, &d);
  d.groups[0] = few ? (tiles + shape.tiles - 1) / shape.tiles + (beside ? ranks : 0) : (tiles + 3) / 4;
  d.groups[1] = few ? m : (m + 31) / 32;
  run.products += static_cast<uint64_t>(rows * s.whole[kK] * s.whole[kN]);
  return run.record(d);
}
