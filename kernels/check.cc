// Proves every row of kernels.inc that this CPU can run against the scalar row of its format, then (--time) times it;
// and those of functions.inc, in check_functions.cc.
//
//   check [--row TEXT] [--time] [--break FAULT]
//
// Passing means: finite where the reference is finite and NaN where it is NaN, |error| <= tolerance * sum|terms|, the
// bytes around y untouched, y complete, and nothing read behind an input's end, where a page without access lies. The
// tolerance is float32's: both sides hold the same integers and scales and differ only in the order of additions. Rows of
// a batch whose gates leave each the ranks of an adapter of its own have the bits that they have alone. --break plants a
// fault in the compared output (value, zero, nan, missing, outside) and must make the program fail: it proves that the
// comparer can see.
#include "adapter_matmul.h"
#include "check.h"

namespace {

constexpr float kTolerance = 3e-7f;  // of the sum of absolute terms; times sqrt(K/1024) beyond that

struct Shape {
  int64_t m, n, k, rank;
  bool half, gated, scaled;     // adapter dtype; gates; s_in and s_out present, and one bias for all outputs
  enum { plain, zero_blocks, nan, inf } x;
  int64_t own = 0;              // ranks that the gate leaves to each row: row m has the m-th of them, and starts anew; 0: all
  int64_t blocks = 0;           // of an offset of the weights, as half as a and b; 0: none
  int64_t each = 1;             // rows that share gates, and what own says of them
};

// Everything one call reads, random, and y with guards.
struct Case {
  Shape s;
  Format format;
  int64_t tiles, y_floats;
  Buffer<uint8_t> w, w_scale;
  Buffer<float> x, bias, s_in, s_out, gate, y;
  Buffer<uint8_t> a, b, offset;

  Case(const Shape& shape, Format f)
      : s(shape), format(f), tiles((s.n + 15) / 16), y_floats(s.m * s.n + 2 * kGuardFloats),
        w(tiles * tile_bytes(info(f), s.k)), w_scale(tiles * tile_scale_bytes(info(f), s.k)), x(s.m * s.k), bias(s.scaled ? 1 : s.n),
        s_in(s.k), s_out(s.n), gate((s.m + s.each - 1) / s.each * s.rank), y(y_floats), a(s.rank * s.k * (s.half ? 2 : 4)),
        b(s.n * s.rank * (s.half ? 2 : 4)), offset(tiles * kTileRows * s.blocks * (s.half ? 2 : 4)) {
    fill_tiles(info(f), tiles, s.k, w.p, w_scale.p, 0.0f);
    for (int64_t i = 0; i < s.m * s.k; i++) x[i] = random_float();
    const int block = info(f).act_block;
    if (s.x == Shape::zero_blocks)
      for (int64_t i = 0; i < s.m * s.k; i++) if (i / block % 3 == 0) x[i] = i / block % 2 ? 0.0f : 1e-33f;
    if (s.x == Shape::nan) x[(s.m - 1) * s.k + s.k / 2] = bits_float(0xffc00001u);
    if (s.x == Shape::inf) x[s.k - 1] = -bits_float(0x7f800000u);
    for (int64_t i = 0; i < (s.scaled ? 1 : s.n); i++) bias[i] = random_float();
    for (int64_t i = 0; i < s.k; i++) s_in[i] = 1.0f + 0.5f * random_float();
    for (int64_t i = 0; i < s.n; i++) s_out[i] = 1.0f + 0.5f * random_float();
    for (int64_t i = 0; i < (s.m + s.each - 1) / s.each * s.rank; i++)
      gate[i] = s.own && i % s.rank / s.own != i / s.rank % (s.rank / s.own) ? 0.0f : random_float();
    fill(a, s.rank * s.k);
    fill(b, s.n * s.rank);
    fill(offset, tiles * kTileRows * s.blocks);
  }
  void fill(Buffer<uint8_t>& to, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
      const float v = 0.1f * random_float();
      if (s.half) reinterpret_cast<uint16_t*>(to.p)[i] = half_of(v);
      else reinterpret_cast<float*>(to.p)[i] = v;
    }
  }
  // Runs one row over the whole case; y lies between guards. keep: y is not reset first (timing).
  double compute(const Row& row, bool keep = false) {
    if (!keep) for (int64_t i = 0; i < y_floats; i++) y[i] = bits_float(kGuard);
    Call call = this->call(row);
    const int64_t bytes_needed = plan(call);
    Buffer<char> scratch(bytes_needed);
    memset(scratch.p, 0xff, static_cast<size_t>(bytes_needed));  // NaN, for whoever reads what nobody wrote
    place(call, scratch.p);
    const double start = cpu_seconds();
    for (int64_t i = 0; i < call.tasks; i++) run(call, i);
    return cpu_seconds() - start;
  }
  Call call(const Row& row) {
    Call call = {};
    call.format = format;
    call.ops = row.ops;
    call.act = row.act;
    call.m = s.m;
    call.k = s.k;
    call.x = x.p;
    call.s_in = s.scaled ? s_in.p : nullptr;
    call.s_in_step = 1;
    call.w = w.p;
    call.w_scale = w_scale.p;
    call.blocks = s.blocks;
    call.offset = offset.p;
    call.offset_half = s.half;
    call.groups = 1;
    call.group[0] = {s.n, s.rank, a.p, b.p, s.half, s.gated ? gate.p : nullptr, s.each, 1, s.scaled ? s_out.p : nullptr, 1,
                     bias.p, s.scaled ? 0 : 1, y.p + kGuardFloats};
    return call;
  }
  // Each row alone, with only the ranks that its gate leaves, must give the bits it has in the batch. Null: it does.
  const char* solo_differs(const Row& row) {
    static char text[80];
    for (int64_t m = 0; m < s.m; m++) {
      Call call = this->call(row);
      Group& g = call.group[0];
      const int64_t r0 = m / s.each % (s.rank / s.own) * s.own, bytes = s.half ? 2 : 4;
      Buffer<float> alone(s.n);
      call.m = 1;
      call.x += m * s.k;
      g.rank = s.own;
      g.a = a.p + r0 * s.k * bytes;
      g.b = b.p + r0 * s.n * bytes;
      g.gate += m / s.each * s.rank + r0;
      g.y = alone.p;
      const int64_t bytes_needed = plan(call);
      Buffer<char> scratch(bytes_needed);
      memset(scratch.p, 0xff, static_cast<size_t>(bytes_needed));  // NaN, for whoever reads what nobody wrote
      place(call, scratch.p);
      for (int64_t i = 0; i < call.tasks; i++) run(call, i);
      if (!memcmp(alone.p, y.p + kGuardFloats + m * s.n, static_cast<size_t>(s.n) * 4)) continue;
      snprintf(text, sizeof(text), "row %lld is not what it is alone", (long long)m);
      return text;
    }
    return nullptr;
  }
};

// Bound on the sum of |terms| of any output: what an error is measured against.
float magnitude(Case& c) {
  const FormatInfo& f = info(c.format);
  const float top_code = f.nf4 ? 1.0f : f.bits == 8 ? 127.0f : 8.0f;
  const float weights = 0.5f * top_code * 0.03f * 1.5f * static_cast<float>(c.s.k);
  const float offsets = 0.05f * 0.5f * 1.5f * static_cast<float>(c.s.blocks ? c.s.k : 0);
  return 1.5f * (weights + offsets + 0.01f * static_cast<float>(c.s.rank) * sqrtf(static_cast<float>(c.s.k))) + 1.0f;
}

void plant(const char* fault, Case& c) {
  float* y = c.y.p + kGuardFloats;
  const int64_t last = c.s.m * c.s.n - 1;
  if (!strcmp(fault, "value")) y[last] += 0.01f * magnitude(c);
  if (!strcmp(fault, "zero")) y[last / 2] = 0.0f;
  if (!strcmp(fault, "nan")) y[0] = bits_float(0x7fc00000u);
  if (!strcmp(fault, "missing")) y[last] = bits_float(kGuard);
  if (!strcmp(fault, "outside")) y[last + 1] = 0.0f;
}

// Null when `got` passes against `want`, else what is wrong.
const char* judge(Case& c, const float* want, float* worst) {
  static char text[160];
  const float limit = kTolerance * fmaxf(1.0f, sqrtf(static_cast<float>(c.s.k) / 1024.0f)) * magnitude(c);
  for (int64_t i = 0; i < c.y_floats; i++) {
    const float got = c.y[i];
    const bool guard = i < kGuardFloats || i >= c.y_floats - kGuardFloats, untouched = float_bits(got) == kGuard;
    const float ref = guard ? 0.0f : want[i];
    const long long at = i - kGuardFloats;
    if (guard && !untouched) snprintf(text, sizeof(text), "wrote outside y, at %lld", at);
    else if (guard) continue;
    else if (untouched) snprintf(text, sizeof(text), "y[%lld,%lld] not written", at / (long long)c.s.n, at % (long long)c.s.n);
    else if (isfinite(ref) ? isfinite(got) && fabsf(got - ref) <= limit : !isfinite(got)) {
      if (isfinite(ref)) *worst = fmaxf(*worst, fabsf(got - ref) / magnitude(c));
      continue;
    } else snprintf(text, sizeof(text), "y[%lld,%lld] = %g, expected %g +- %g", at / (long long)c.s.n, at % (long long)c.s.n, got, ref, limit);
    return text;
  }
  return nullptr;
}

bool prove(const Row& row, const Row& reference, const char* fault) {
  const int64_t step = info(row.format).act_block, big = step > 64 ? step : 64;
  const Shape shapes[] = {
      {1, 16, step, 0, true, false, false, Shape::plain},
      {1, 1, big, 1, true, false, false, Shape::plain},
      {1, 48, 3 * big, 16, true, false, false, Shape::plain},
      {1, 37, 8 * big, 8, false, true, true, Shape::plain},
      {1, 40, 5 * big, 29, true, true, true, Shape::plain},
      {1, 21, 2 * big, 75, false, false, false, Shape::plain},
      {2, 17, 5 * big, 3, true, true, false, Shape::zero_blocks},
      {3, 31, 3 * big, 70, false, false, true, Shape::plain},
      {4, 16, 9 * big, 130, true, true, true, Shape::plain},
      {5, 33, 7 * big, 4, true, false, false, Shape::nan},
      {7, 15, 17 * big, 17, true, true, true, Shape::inf},
      {9, 64, 2048 + 128, 16, true, false, false, Shape::plain},
      {13, 40, 1024, 64, false, true, true, Shape::zero_blocks},
      {23, 16, 3 * big, 129, true, true, true, Shape::plain},
      {64, 32, 1024 + 128, 8, true, true, false, Shape::plain},
      {257, 20, 256, 5, true, true, true, Shape::nan},
      {531, 18, 128, 0, false, false, false, Shape::plain},
      {2, 16, 2 * big, 0, true, false, false, Shape::nan},  // with no adapter, whose A.x would be NaN in any case
      {6, 16, 2 * big, 0, true, false, false, Shape::inf},
      {1, 33, 2 * big, 48, true, true, false, Shape::plain, 16},
      {4, 16, 3 * big, 64, true, true, true, Shape::plain, 16},
      {8, 37, 2 * big, 128, true, true, false, Shape::plain, 16},
      {7, 48, 2 * big, 60, false, true, false, Shape::plain, 12},
      {70, 20, 2 * big, 136, true, true, true, Shape::plain, 8},
      {300, 16, big, 20, false, true, false, Shape::plain, 4},
      {8, 48, 2 * big, 64, true, true, true, Shape::plain, 16, 0, 3},
      {51, 37, 2 * big, 96, true, true, false, Shape::plain, 12, 0, 17},
      {300, 32, big, 144, false, true, true, Shape::zero_blocks, 24, 0, 32},
      {7, 16, 2 * big, 5, true, true, false, Shape::plain, 0, 0, 7},
      {1, 37, 6 * big, 0, true, false, false, Shape::plain, 0, 6},
      {2, 16, 70 * big, 5, false, false, true, Shape::zero_blocks, 0, 70},
      {3, 48, 5 * big, 16, true, true, true, Shape::plain, 0, 5},
      {11, 33, 69 * big, 130, true, false, false, Shape::nan, 0, 69},
      {300, 20, 2 * big, 0, false, false, true, Shape::plain, 0, 1},
      {1, 64, 1024 + 128, 0, true, true, false, Shape::plain},
      {1, 150, 3 * big, 16, true, true, true, Shape::zero_blocks},
      {1, 171, 5 * big, 32, true, true, true, Shape::plain, 16, 5},
  };
  float worst = 0;
  int count = 0;
  for (const Shape& s : shapes) {
    Case c(s, row.format);
    c.compute(reference);
    Buffer<float> want(c.y_floats);
    memcpy(want.p, c.y.p, static_cast<size_t>(c.y_floats) * 4);
    c.compute(row);
    if (fault) plant(fault, c);
    const char* wrong = judge(c, want.p, &worst);
    if (!wrong && !fault && s.own) wrong = c.solo_differs(row);
    if (wrong) {
      printf("FAIL %-24s M=%lld N=%lld K=%lld R=%lld: %s\n", row.name, (long long)s.m, (long long)s.n, (long long)s.k, (long long)s.rank, wrong);
      return false;
    }
    count++;
  }
  printf("ok   %-24s %d shapes, worst %.1e of the sum of |terms|\n", row.name, count, static_cast<double>(worst));
  return true;
}

// Best of several runs in CPU time: what the code can do on a shared machine.
double best_seconds(Case& c, const Row& row) {
  double best = 1e9, total = 0;
  for (int i = 0; i < 3 || (total < 0.4 && i < 2000); i++) {
    const double t = c.compute(row, true);
    total += t;
    if (t < best) best = t;
  }
  return best;
}

void report_time(const Row& row) {
  const int64_t rows[] = {1, 4, 128};
  for (const int64_t m : rows) {
    Case plain({m, 2048, 2048, 0, true, false, false, Shape::plain}, row.format);
    Case c({m, 2048, 2048, 16, true, false, false, Shape::plain}, row.format);
    const double base = best_seconds(plain, row), best = best_seconds(c, row);
    const double bytes = static_cast<double>(c.tiles * (tile_bytes(info(row.format), c.s.k) + tile_scale_bytes(info(row.format), c.s.k)));
    printf("     %-24s M=%-3lld N=K=2048 R=16: %9.1f us  %6.1f GOPS  %5.1f GB/s of weights  %+5.1f %% over R=0\n", row.name, (long long)m,
           best * 1e6, 2e-9 * static_cast<double>(m * c.s.n * c.s.k) / best, 1e-9 * bytes / best, 100 * (best / base - 1));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const char *only = "", *fault = nullptr;
  bool timing = false;
  for (int i = 1; i < argc; i++) {
    if (!strcmp(argv[i], "--time")) timing = true;
    else if (!strcmp(argv[i], "--row") && i + 1 < argc) only = argv[++i];
    else if (!strcmp(argv[i], "--break") && i + 1 < argc) fault = argv[++i];
    else return fprintf(stderr, "check [--row TEXT] [--time] [--break value|zero|nan|missing|outside]\n"), 2;
  }
  int proved = 0, failed = 0;
  for (int i = 0; i < kRowCount; i++) {
    const Row& row = kRows[i];
    if (!strstr(row.name, only)) continue;
    if (!cpu_runs(row.isa)) {
      printf("skip %-24s this CPU lacks %s\n", row.name, isa_name(row.isa));
      continue;
    }
    char name[64];
    snprintf(name, sizeof(name), "%s_%s_scalar", info(row.format).tag, row.act == Act::int8 ? "int8" : "float32");
    (prove(row, *find_row(name), fault) ? proved : failed)++;
    if (timing) report_time(row);
  }
  check_functions(only, fault, timing, &proved, &failed);
  printf("%d rows proved, %d failed\n", proved, failed);
  return failed || !proved;
}
