// What is counted on the CPU while a run is recorded: shapes, positions, masks, and numbers that come from them alone.
#include <string.h>

#include "operators.h"
#include "../formats.h"

namespace {

enum Op : int64_t { kAdd, kSub, kMul, kDiv, kMin = 100, kMax, kEqual };

// A number of any type: whole ones stay exact.
struct Number {
  bool real;
  int64_t whole;
  double value;

  double as_real() const { return real ? value : static_cast<double>(whole); }
};

Number get(const Value& v, int64_t i) {
  switch (v.type) {
    case kFloat: return {true, 0, reinterpret_cast<const float*>(v.host)[i]};
    case kHalf: return {true, 0, half_float(reinterpret_cast<const uint16_t*>(v.host)[i])};
    case kBool: case kUint8: return {false, reinterpret_cast<const uint8_t*>(v.host)[i], 0};
    default: return {false, v.whole(i), 0};
  }
}

void put(char* host, int type, int64_t i, const Number& n) {
  const int64_t whole = n.real ? static_cast<int64_t>(n.value) : n.whole;
  switch (type) {
    case kFloat: reinterpret_cast<float*>(host)[i] = static_cast<float>(n.as_real()); break;
    case kBool: host[i] = n.as_real() != 0; break;
    case kInt32: reinterpret_cast<int32_t*>(host)[i] = static_cast<int32_t>(whole); break;
    default: reinterpret_cast<int64_t*>(host)[i] = whole;
  }
}

bool counted(int type) { return type == kFloat || type == kInt32 || type == kInt64 || type == kBool; }

Number apply(int64_t op, const Number& a, const Number& b) {
  if (a.real || b.real) {
    const double x = a.as_real(), y = b.as_real();
    const double results[] = {x + y, x - y, x * y, y != 0 ? x / y : x / 0.0};
    if (op <= kDiv) return {true, 0, results[op]};
    return {true, 0, op == kMin ? (x < y ? x : y) : op == kMax ? (x > y ? x : y) : double(x == y)};
  }
  const int64_t x = a.whole, y = b.whole;
  switch (op) {
    case kAdd: return {false, x + y, 0};
    case kSub: return {false, x - y, 0};
    case kMul: return {false, x * y, 0};
    case kDiv: return {false, y ? x / y : 0, 0};
    case kMin: return {false, x < y ? x : y, 0};
    case kMax: return {false, x > y ? x : y, 0};
    default: return {false, x == y, 0};
  }
}

// The shape that all have when each is repeated where it has 1; false where they do not go together.
bool common(const Value* const* some, int count, Dims* dims) {
  *dims = {};
  for (int i = 0; i < count; i++)
    if (some[i]->dims.rank > dims->rank) dims->rank = some[i]->dims.rank;
  for (int i = 0; i < dims->rank; i++) {
    dims->d[i] = 1;
    for (int j = 0; j < count; j++) {
      const int own = i - (dims->rank - some[j]->dims.rank);
      const int64_t size = own < 0 ? 1 : some[j]->dims.d[own];
      if (size != 1 && dims->d[i] != 1 && size != dims->d[i]) return false;
      if (size != 1) dims->d[i] = size;
    }
  }
  return true;
}

// Where element i of `whole` is in a part that is repeated to it.
int64_t repeated(int64_t i, const Dims& whole, const Dims& part) {
  int64_t at = 0, step = 1;
  for (int d = 1; d <= whole.rank; d++) {
    const int64_t size = whole.d[whole.rank - d], own = d <= part.rank ? part.d[part.rank - d] : 1;
    at += own == 1 ? 0 : i % size * step;
    step *= own;
    i /= size;
  }
  return at;
}

Failure check(Run& run, const Step& s, int count) {
  for (int i = 0; i < count; i++)
    if (!run.has(s, i) || !run.in(s, i).host || !counted(run.in(s, i).type))
      return run.refuse(s, "it is computed on the CPU, and an operand is not there");
  return nullptr;
}

}  // namespace

Failure count(Run& run, const Step& s) {
  GPU_TRY(check(run, s, 2));
  const Value &a = run.in(s, 0), &b = run.in(s, 1);
  const Value* both[] = {&a, &b};
  Dims dims;
  if (!common(both, 2, &dims)) return run.refuse(s, "its operands' shapes do not go together");
  const int type = s.whole[0] == kEqual ? static_cast<int>(kBool) : a.type;
  char* y = run.make_host(s, 0, dims, type);
  for (int64_t i = 0; i < dims.count(); i++)
    put(y, type, i, apply(s.whole[0], get(a, repeated(i, dims, a.dims)), get(b, repeated(i, dims, b.dims))));
  return nullptr;
}

Failure set_count(const Node& node, Step* step) {
  const char* const names[] = {"Min", "Max", "Equal"};
  for (int i = 0; i < 3; i++)
    if (!strcmp(node.op, names[i])) step->whole[0] = kMin + i;
  return node.inputs == 2 ? nullptr : "only two operands are counted";
}

Failure run_count(Run& run, const Step& s) { return count(run, s); }

Failure set_shape(const Node& node, Step* step) {
  step->whole[0] = node.whole("start", 0);
  step->whole[1] = node.whole("end", INT64_MAX);
  return nullptr;
}

Failure run_shape(Run& run, const Step& s) {
  const Dims& x = run.in(s, 0).dims;
  int64_t bounds[2];
  for (int i = 0; i < 2; i++) {
    bounds[i] = s.whole[i] < 0 ? s.whole[i] + x.rank : s.whole[i];
    bounds[i] = bounds[i] < 0 ? 0 : bounds[i] > x.rank ? x.rank : bounds[i];
  }
  Dims dims;
  dims.push(bounds[1] > bounds[0] ? bounds[1] - bounds[0] : 0);
  char* y = run.make_host(s, 0, dims, kInt64);
  for (int64_t i = 0; i < dims.d[0]; i++) reinterpret_cast<int64_t*>(y)[i] = x.d[bounds[0] + i];
  return nullptr;
}

Failure set_cast(const Node& node, Step* step) {
  step->whole[0] = node.whole("to", 0);
  return counted(static_cast<int>(step->whole[0])) ? nullptr : "to that type no number is cast";
}

Failure run_cast(Run& run, const Step& s) {
  if (!run.in(s, 0).host || (run.in(s, 0).type != kHalf && !counted(run.in(s, 0).type)))
    return run.refuse(s, "it is computed on the CPU, and its operand is not there");
  const Value x = run.in(s, 0);
  const int type = static_cast<int>(s.whole[0]);
  char* y = run.make_host(s, 0, x.dims, type);
  for (int64_t i = 0; i < x.dims.count(); i++) put(y, type, i, get(x, i));
  return nullptr;
}

Failure set_sum(const Node& node, Step* step) {
  step->whole[0] = node.whole("keepdims", 1);
  return node.inputs == 2 ? nullptr : "only a sum along one axis is counted";
}

Failure run_sum(Run& run, const Step& s) {
  GPU_TRY(check(run, s, 2));
  const Value& x = run.in(s, 0);
  const Value& given = run.in(s, 1);
  if (given.dims.count() != 1) return run.refuse(s, "only a sum along one axis is counted");
  const int64_t axis = given.whole(0) + (given.whole(0) < 0 ? x.dims.rank : 0);
  if (axis < 0 || axis >= x.dims.rank) return run.refuse(s, "an axis is beyond the shape");
  Dims dims;
  int64_t inner = 1;
  for (int i = 0; i < x.dims.rank; i++) {
    if (i != axis) dims.push(x.dims.d[i]);
    else if (s.whole[0]) dims.push(1);
    if (i > axis) inner *= x.dims.d[i];
  }
  char* y = run.make_host(s, 0, dims, x.type);
  for (int64_t i = 0; i < dims.count(); i++) {
    Number sum = {x.type == kFloat, 0, 0};
    for (int64_t j = 0; j < x.dims.d[axis]; j++) sum = apply(kAdd, sum, get(x, (i / inner * x.dims.d[axis] + j) * inner + i % inner));
    put(y, x.type, i, sum);
  }
  return nullptr;
}

Failure run_where(Run& run, const Step& s) {
  GPU_TRY(check(run, s, 3));
  const Value *all[] = {&run.in(s, 0), &run.in(s, 1), &run.in(s, 2)};
  Dims dims;
  if (!common(all, 3, &dims)) return run.refuse(s, "its operands' shapes do not go together");
  const int type = all[1]->type;
  char* y = run.make_host(s, 0, dims, type);
  for (int64_t i = 0; i < dims.count(); i++) {
    const Value& from = *all[get(*all[0], repeated(i, dims, all[0]->dims)).whole ? 1 : 2];
    put(y, type, i, get(from, repeated(i, dims, from.dims)));
  }
  return nullptr;
}

Failure run_range(Run& run, const Step& s) {
  GPU_TRY(check(run, s, 3));
  const int64_t start = run.in(s, 0).whole(0), limit = run.in(s, 1).whole(0), by = run.in(s, 2).whole(0);
  if (by == 0) return run.refuse(s, "its step is 0");
  Dims dims;
  const int64_t n = by > 0 ? (limit - start + by - 1) / by : (start - limit - by - 1) / -by;
  dims.push(n > 0 ? n : 0);
  char* y = run.make_host(s, 0, dims, kInt64);
  for (int64_t i = 0; i < dims.d[0]; i++) reinterpret_cast<int64_t*>(y)[i] = start + i * by;
  return nullptr;
}

Failure set_concat(const Node& node, Step* step) {
  step->whole[0] = node.whole("axis", 0);
  return nullptr;
}

Failure run_concat(Run& run, const Step& s) {
  GPU_TRY(check(run, s, s.inputs));
  const Value& first = run.in(s, 0);
  const int64_t axis = s.whole[0] + (s.whole[0] < 0 ? first.dims.rank : 0);
  Dims dims = first.dims;
  if (axis < 0 || axis >= dims.rank) return run.refuse(s, "its axis is beyond the shape");
  for (int i = 1; i < s.inputs; i++) {
    const Dims& other = run.in(s, i).dims;
    for (int d = 0; d < dims.rank; d++)
      if (other.rank != dims.rank || (d != axis && other.d[d] != dims.d[d])) return run.refuse(s, "its operands' shapes do not go together");
    dims.d[axis] += other.d[axis];
  }
  int64_t inner = 1, before = 0;
  for (int i = static_cast<int>(axis) + 1; i < dims.rank; i++) inner *= dims.d[i];
  char* y = run.make_host(s, 0, dims, first.type);
  for (int i = 0; i < s.inputs; i++) {
    const Value& x = run.in(s, i);
    const int64_t own = x.dims.d[axis] * inner;
    for (int64_t j = 0; j < x.dims.count(); j++) put(y, first.type, j / own * dims.d[axis] * inner + before + j % own, get(x, j));
    before += own;
  }
  return nullptr;
}

Failure set_pad(const Node& node, Step* step) {
  (void)step;
  return node.inputs == 3 && node.is("mode", "constant", true) ? nullptr : "only a constant before and behind each axis is put there";
}

Failure run_pad(Run& run, const Step& s) {
  GPU_TRY(check(run, s, 3));
  const Value &x = run.in(s, 0), &pads = run.in(s, 1), &fill = run.in(s, 2);
  Dims dims = x.dims;
  if (pads.dims.count() != 2 * dims.rank) return run.refuse(s, "expected two numbers for each axis");
  for (int i = 0; i < dims.rank; i++) {
    dims.d[i] += pads.whole(i) + pads.whole(i + dims.rank);
    if (pads.whole(i) < 0 || pads.whole(i + dims.rank) < 0) return run.refuse(s, "nothing is cut off");
  }
  char* y = run.make_host(s, 0, dims, x.type);
  for (int64_t i = 0; i < dims.count(); i++) put(y, x.type, i, get(fill, 0));
  for (int64_t i = 0; i < x.dims.count(); i++) {
    int64_t at = 0, step = 1, rest = i;
    for (int d = dims.rank - 1; d >= 0; d--) {
      at += (rest % x.dims.d[d] + pads.whole(d)) * step;
      rest /= x.dims.d[d];
      step *= dims.d[d];
    }
    put(y, x.type, at, get(x, i));
  }
  return nullptr;
}
