// Proves every row of functions.inc that this CPU can run against the scalar row of its function.
//
// Passing means: |error| <= tolerance * |reference| and a few units of the smallest float beside it; NaN where the
// reference is NaN, Inf where it is that Inf; the bytes around the outputs untouched, the outputs complete. Embeddings and
// x + skip are exact. What a fault is, see check.cc.
#include "check.h"
#include "functions.h"

namespace {

constexpr float kTolerance = 5.0f / 16777216.0f;  // of the reference: 5 units of 2^-24
constexpr int64_t kTiles = 3;                     // of a weight

enum class Values { plain, wide, special };

struct Case {
  Function function;
  bool skip;  // rms_norm; else a second output is not there
  Values values;
  int64_t rows, columns;
  Format format;
};

// Everything one call reads, and its outputs between guards: y, guard, sum.
struct Data {
  Case c;
  int64_t count, floats;
  Buffer<float> x, other, weight, out;
  Buffer<int64_t> ids;
  Buffer<uint8_t> w, w_scale;

  explicit Data(const Case& from)
      : c(from), count(c.rows * c.columns), floats(2 * count + 3 * kGuardFloats), x(count), other(count), weight(c.columns),
        out(floats), ids(c.rows), w(kTiles * tile_bytes(info(c.format), c.columns)),
        w_scale(kTiles * tile_scale_bytes(info(c.format), c.columns)) {
    for (int64_t i = 0; i < count; i++) x[i] = value(i), other[i] = c.values == Values::wide ? 1.0f : 2 * random_float();
    for (int64_t i = 0; i < c.columns; i++) weight[i] = 1.0f + random_float();
    for (int64_t i = 0; i < c.rows; i++) ids[i] = i ? random_bits() % (kTiles * kTileRows) : kTiles * kTileRows - 1;
    if (c.function == Function::packed_embedding) fill_tiles(info(c.format), kTiles, c.columns, w.p, w_scale.p, 0.5f);
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
    job.rows = c.rows;
    job.columns = c.columns;
    job.y = out.p + kGuardFloats;
    job.x = x.p;
    if (c.function != Function::rms_norm || c.skip) job.other = other.p;
    job.weight = weight.p;
    job.epsilon = 1e-6f;
    if (c.skip) job.sum = job.y + count + kGuardFloats;
    job.ids = ids.p;
    job.format = c.format;
    job.w = w.p;
    job.w_scale = w_scale.p;
    return job;
  }
  void compute(const FunctionRow& row) {
    for (int64_t i = 0; i < floats; i++) out[i] = bits_float(kGuard);
    for (int64_t task = 0; task < function_tasks(job()); task++) row.ops->run(function_task(job(), task));
  }
  bool is_output(int64_t i) const {
    const int64_t at = i - kGuardFloats, in_sum = at - count - kGuardFloats;
    return (at >= 0 && at < count) || (c.skip && in_sum >= 0 && in_sum < count);
  }
  bool is_exact(int64_t i) const { return c.function == Function::packed_embedding || i >= kGuardFloats + count; }
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
  return isfinite(got) && fabsf(got - want) <= kTolerance * fabsf(want) + 6e-45f;
}

// Null when the outputs pass against `want`, else what is wrong.
const char* judge(Data& d, const float* want, float* worst) {
  static char text[160];
  for (int64_t i = 0; i < d.floats; i++) {
    const bool output = d.is_output(i), untouched = float_bits(d.out[i]) == kGuard;
    const long long at = i - kGuardFloats, columns = d.c.columns;
    if (!output && untouched) continue;
    if (output && !untouched && agree(d, i, d.out[i], want[i])) {
      if (fabsf(want[i]) > 1e-30f && isfinite(want[i])) *worst = fmaxf(*worst, fabsf(d.out[i] - want[i]) / fabsf(want[i]));
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

bool prove(const FunctionRow& row, const char* fault) {
  const bool norm = row.function == Function::rms_norm, embedding = row.function == Function::packed_embedding;
  const int64_t shapes[][2] = {{1, 1}, {1, 7}, {2, 16}, {3, 33}, {5, 63}, {1, 2048}, {7, 96}, {4, 1029}, {67, 896}, {300, 130}};
  float worst = 0;
  int count = 0;
  for (const auto& shape : shapes)
    for (int variant = 0; variant < (embedding ? static_cast<int>(Format::count) : norm ? 6 : 3); variant++) {
      Case c = {row.function, norm && variant >= 3, static_cast<Values>(variant % 3), shape[0], shape[1], Format::i8c};
      if (embedding) {
        c.format = static_cast<Format>(variant);
        c.columns = (c.columns + 127) & ~int64_t{127};
      }
      if (!passes(row, c, fault, &worst)) return false;
      count++;
    }
  printf("ok   %-24s %d cases, worst %.1e of the reference\n", row.name, count, static_cast<double>(worst));
  return true;
}

void report_time(const FunctionRow& row) {
  const int64_t some[] = {1, 128};
  for (const int64_t rows : some) {
    Data d({row.function, row.function == Function::rms_norm, Values::plain, rows, 2048, Format::i4b32});
    double best = 1e9, total = 0;
    for (int i = 0; i < 3 || (total < 0.2 && i < 20000); i++) {
      const double start = cpu_seconds();
      row.ops->run(d.job());
      const double t = cpu_seconds() - start;
      total += t;
      if (t < best) best = t;
    }
    printf("     %-24s %3lld x 2048: %9.2f us\n", row.name, (long long)rows, best * 1e6);
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
