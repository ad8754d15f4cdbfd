// Proves every row of functions.inc that this CPU can run against the scalar row of its function.
//
// Passing means: |error| <= tolerance * |reference| and a few units of the smallest float beside it; NaN where the
// reference is NaN, Inf where it is that Inf; the bytes around the outputs untouched, the outputs complete. What biases are
// added to, or weights average, is taken for the reference where it is larger. Embeddings and x + skip are exact. What a
// fault is, see check.cc.
#include "check.h"
#include "functions.h"

namespace {

constexpr float kUnit24 = 1.0f / 16777216.0f;
constexpr int64_t kTexts = 2, kHeads = 3, kMoreKeys = 5;  // of attention
constexpr int64_t kGroup = 3, kWindow = 6, kMostTokens = 70;  // of attention on a cache, with
constexpr int64_t kManyKeys = 400;  //   before a single token
constexpr int64_t kTiles = 3;  // of a weight

enum class Values { plain, wide, special };

struct Case {
  Function function;
  bool skip;  // rms_norm; else a second output is not there
  Values values;
  int64_t rows, columns;
  Format format;
  bool rounded;  // packed_embedding
  int variant;

  bool is(Function f) const { return function == f; }
  bool caches() const { return is(Function::extend_cache) || is(Function::cached_attention); }
  // Of y; and what an attention reads of keys and of values.
  int64_t count() const {
    if (is(Function::extend_cache)) return cache();
    return is(Function::attention) ? kTexts * rows * kHeads * columns
         : caches() ? kTexts * rows * kHeads * kGroup * columns : rows * columns / (rounded ? 2 : 1);
  }
  int64_t keys() const { return rows + (caches() && rows == 1 ? kManyKeys : kMoreKeys); }
  int64_t cache() const { return kTexts * kHeads * keys() * columns; }
  int64_t others() const { return is(Function::attention) || caches() ? cache() : rows * columns; }
};

// Everything one call reads, and its outputs between guards: y, guard, sum. Attention: queries are the rows of a case.
// Keys and values that a cache takes are other and values, those that it has past_key and past_value; its outputs are y
// and sum. The second of its texts has two tokens less than the first.
struct Data {
  Case c;
  bool attends;
  int64_t keys, others, count, floats;
  Buffer<float> x, other, values, past_key, past_value, angles, shares, weight, bias, out;
  Buffer<int64_t> ids, mask;
  Buffer<int32_t> last, left;
  Buffer<uint8_t> w, w_scale;
  CachedCall call = {};

  explicit Data(const Case& from)
      : c(from), attends(c.is(Function::attention)), keys(c.keys()), others(c.others()), count(c.count()),
        floats(2 * count + 3 * kGuardFloats), x(count), other(others), values(others), past_key(others), past_value(others),
        angles(keys * c.columns), shares(others), weight(c.columns), bias(c.columns), out(floats), ids(c.rows), mask(kTexts * keys), last(kTexts), left(kTexts * kHeads),
        w(kTiles * tile_bytes(info(c.format), c.columns)), w_scale(kTiles * tile_scale_bytes(info(Format::i4b32), c.columns)) {
    for (int64_t i = 0; i < others; i++) past_key[i] = 2 * random_float(), past_value[i] = random_float();
    for (int64_t i = 0; i < keys * c.columns; i++) angles[i] = random_float();
    for (int64_t i = 0; i < kTexts; i++) last[i] = static_cast<int32_t>(keys - 1 - 2 * i);
    for (int64_t i = 0; i < count; i++) x[i] = value(i);
    for (int64_t i = 0; i < others; i++) other[i] = c.values == Values::wide ? 1.0f : 2 * random_float(), values[i] = random_float();
    for (int64_t i = 0; i < c.columns; i++) weight[i] = 1.0f + random_float(), bias[i] = random_float();
    for (int64_t i = 0; i < c.rows; i++) ids[i] = i ? random_bits() % (kTiles * kTileRows) : kTiles * kTileRows - 1;
    for (int64_t i = 0; i < kTexts * keys; i++) mask[i] = i < keys ? i < c.rows : i % 3 != 0;
    if (is_embedding()) fill_tiles(info(c.format), kTiles, c.columns, w.p, w_scale.p, 0.5f);
    if (c.function == Function::row_embedding) fill_tiles(info(Format::i4b32), kTiles, c.columns, w.p, w_scale.p, 0.5f);
  }
  float value(int64_t i) const {
    static const float special[] = {bits_float(0x7fc00000u), bits_float(0x7f800000u), bits_float(0xff800000u), -0.0f, 0.0f,
                                    1e-42f, -1e-42f, 3e38f, -3e38f, 1e20f, -1e20f, 90.0f, -90.0f, -103.5f, 13.4f, -13.6f};
    if (c.values == Values::plain) return 3 * random_float();
    if (c.values == Values::wide) return -130.0f + 200.0f * static_cast<float>(i) / static_cast<float>(count);
    return i % 3 ? random_float() : special[i / 3 % 16];
  }
  FunctionJob job() {
    FunctionJob job = {};
    job.rows = attends ? kTexts * kHeads : c.rows;
    job.columns = c.columns;
    job.y = out.p + kGuardFloats;
    job.x = x.p;
    if (c.function != Function::rms_norm || c.skip) job.other = other.p;
    job.weight = weight.p;
    job.bias = bias.p;
    job.epsilon = 1e-6f;
    if (c.skip) job.sum = job.y + count + kGuardFloats;
    job.ids = ids.p;
    job.format = c.format;
    job.rounded = c.rounded;
    job.bits = info(c.format).bits;
    job.w = w.p;
    job.w_scale = w_scale.p;
    if (c.caches()) return cached(job);
    if (!attends) return job;
    job.heads = kHeads;
    job.queries = c.rows;
    job.keys = keys;
    job.q = x.p;
    job.k = other.p;
    job.v = values.p;
    job.mask = mask.p;
    job.cost = attention_cost(job.queries, job.keys, job.columns);
    return job;
  }
  // Extending has another memory behind it, so that it moves all; attention has one that is extended.
  FunctionJob cached(FunctionJob job) {
    call = {kTexts, c.rows, kHeads * kGroup, kHeads, c.columns, x.p, other.p, values.p, kHeads * kGroup * c.columns,
            kHeads * c.columns, angles.p, angles.p + keys * c.columns / 2, c.columns / 2, false, last.p, past_key.p,
            past_value.p, past_key.p, past_value.p, keys, keys, keys, c.variant == 1 ? kWindow : int64_t{1} << 60,
            1 / sqrtf(static_cast<float>(c.columns)), c.variant == 2 ? 2.0f : 0.0f, job.y, shares.p, left.p};
    for (int64_t i = 0; i < kTexts * kHeads; i++) left[i] = static_cast<int32_t>(call.parts());
    if (c.is(Function::extend_cache)) call.key = job.y, call.value = job.sum;
    if (c.variant == 1) call.half = 8;  // not all columns are rotated
    job.call = &call;
    job.rows = kTexts * kHeads * (c.is(Function::extend_cache) ? 1 : call.blocks() * call.parts());
    job.cost = 1 + 20 * c.columns;
    return job;
  }
  void compute(const FunctionRow& row) {
    for (int64_t i = 0; i < floats; i++) out[i] = bits_float(kGuard);
    const FunctionJob whole = job();
    for (int64_t task = 0; task < function_tasks(whole); task++) row.ops->run(function_task(whole, task));
  }
  bool is_output(int64_t i) const {
    const int64_t at = i - kGuardFloats, in_sum = at - count - kGuardFloats;
    return (at >= 0 && at < count) || (c.skip && in_sum >= 0 && in_sum < count);
  }
  bool is_embedding() const { return c.function == Function::packed_embedding || c.function == Function::row_embedding; }
  bool is_exact(int64_t i) const { return is_embedding() || i >= kGuardFloats + count; }  // values are copied
  float allowed(int64_t i, float want) const {
    if (attends || c.is(Function::cached_attention)) return 64 * kUnit24;
    if (c.is(Function::extend_cache)) return 8 * kUnit24;
    if (c.function == Function::layer_norm) return 5 * kUnit24 * (fabsf(want) + 2 * fabsf(bias.p[(i - kGuardFloats) % c.columns]));
    return (c.function == Function::gelu ? 8 : 5) * kUnit24 * fabsf(want);
  }
};

void plant(const char* fault, Data& d) {
  float* y = d.out.p + kGuardFloats;
  const int64_t last = d.count - 1;
  if (!strcmp(fault, "value")) y[last] += 1e-5f * (1.0f + fabsf(y[last]));
  if (!strcmp(fault, "zero")) y[last / 2] = 0.0f;
  if (!strcmp(fault, "nan")) y[0] = bits_float(0x7fc00000u);
  if (!strcmp(fault, "missing")) y[last] = bits_float(kGuard);
  if (!strcmp(fault, "outside")) y[last + 1] = 0.0f;
}

bool agree(const Data& d, int64_t i, float got, float want) {
  if (isnan(want)) return isnan(got);
  if (!isfinite(want) || d.is_exact(i)) return got == want;
  return isfinite(got) && fabsf(got - want) <= d.allowed(i, want) + 6e-45f;
}

// Null when the outputs pass against `want`, else what is wrong.
const char* judge(Data& d, const float* want, float* worst) {
  static char text[160];
  for (int64_t i = 0; i < d.floats; i++) {
    const bool output = d.is_output(i), untouched = float_bits(d.out[i]) == kGuard;
    const long long at = i - kGuardFloats, columns = d.c.columns;
    if (!output && untouched) continue;
    if (output && !untouched && agree(d, i, d.out[i], want[i])) {
      if (!d.is_exact(i) && fabsf(want[i]) > 1e-30f && isfinite(want[i]))
        *worst = fmaxf(*worst, fabsf(d.out[i] - want[i]) / d.allowed(i, want[i]));
      continue;
    }
    if (!output) snprintf(text, sizeof(text), "wrote outside y, at %lld", at);
    else if (untouched) snprintf(text, sizeof(text), "y[%lld,%lld] not written", at / columns, at % columns);
    else snprintf(text, sizeof(text), "y[%lld,%lld] = %.9g, expected %.9g", at / columns, at % columns, d.out[i], want[i]);
    return text;
  }
  return nullptr;
}

const FunctionRow& reference_of(Function f) {
  for (int i = kFunctionRowCount - 1;; i--)
    if (kFunctionRows[i].function == f && kFunctionRows[i].isa == Isa::scalar) return kFunctionRows[i];
}

bool passes(const FunctionRow& row, const Case& c, const char* fault, float* worst) {
  Data d(c);
  d.compute(reference_of(row.function));
  Buffer<float> want(d.floats);
  memcpy(want.p, d.out.p, static_cast<size_t>(d.floats) * 4);
  d.compute(row);
  if (fault) plant(fault, d);
  const char* wrong = judge(d, want.p, worst);
  if (wrong) printf("FAIL %-24s %lld x %lld: %s\n", row.name, (long long)c.rows, (long long)c.columns, wrong);
  return !wrong;
}

int variants(Function f) {
  if (f == Function::packed_embedding) return 2 * static_cast<int>(Format::count);
  return f == Function::rms_norm ? 6 : f == Function::row_embedding ? 2 : f == Function::attention ? 1 : 3;
}

Case make_case(Function f, const int64_t (&shape)[2], int variant) {
  Case c = {f, f == Function::rms_norm && variant >= 3, static_cast<Values>(variant % 3), shape[0], shape[1], Format::i8c, false, variant};
  if (f == Function::packed_embedding || f == Function::row_embedding) {
    c.format = static_cast<Format>(variant % static_cast<int>(Format::count));  // in rows: 8 bits and 4
    c.rounded = variant >= static_cast<int>(Format::count);
    c.columns = (c.columns + 127) & ~int64_t{127};
  }
  if (c.caches()) {
    c.values = Values::plain;
    c.skip = f == Function::extend_cache;
    c.rows = c.rows < kMostTokens ? c.rows : kMostTokens;
    c.columns = (c.columns + 15) & ~int64_t{15};
  }
  if ((c.caches() || f == Function::attention) && c.columns > kHeadColumns) c.columns = kHeadColumns;
  return c;
}

bool prove(const FunctionRow& row, const char* fault) {
  const int64_t shapes[][2] = {{1, 1}, {1, 7}, {2, 16}, {3, 33}, {5, 63}, {1, 2048}, {7, 96}, {4, 1029}, {67, 896}, {300, 130}};
  float worst = 0;
  int count = 0;
  for (const auto& shape : shapes)
    for (int variant = 0; variant < variants(row.function); variant++, count++)
      if (!passes(row, make_case(row.function, shape, variant), fault, &worst)) return false;
  printf("ok   %-24s %d cases, worst %.2f of what is allowed\n", row.name, count, static_cast<double>(worst));
  return true;
}

void report_time(const FunctionRow& row) {
  const int64_t some[] = {1, 128};
  for (const int64_t rows : some) {
    const Function f = row.function;
    const int64_t columns = f == Function::attention ? 32 : f == Function::cached_attention || f == Function::extend_cache ? 64 : 2048;
    Data d({f, f == Function::rms_norm || f == Function::extend_cache, Values::plain, rows, columns, Format::i4b32, false, 0});
    double best = 1e9, total = 0;
    for (int i = 0; i < 3 || (total < 0.2 && i < 20000); i++) {
      const double start = cpu_seconds();
      row.ops->run(d.job());
      const double t = cpu_seconds() - start;
      total += t;
      if (t < best) best = t;
    }
    printf("     %-24s %3lld x %lld: %9.2f us\n", row.name, (long long)rows, (long long)columns, best * 1e6);
  }
}

}  // namespace

void check_functions(const char* only, const char* fault, bool timing, int* proved, int* failed) {
  for (int i = 0; i < kFunctionRowCount; i++) {
    const FunctionRow& row = kFunctionRows[i];
    if (!strstr(row.name, only)) continue;
    if (!cpu_runs(row.isa)) {
      printf("skip %-24s this CPU lacks %s\n", row.name, isa_name(row.isa));
      continue;
    }
    (*(prove(row, fault) ? proved : failed))++;
    if (timing) report_time(row);
  }
}
