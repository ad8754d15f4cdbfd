// The tables of rows made from kernels.inc and functions.inc, and the choice among them.
#include "functions.h"

#define EP_ROW(op, format, act, tile_m, isa) EP_WHEN(EP_HAVE_##isa, extern const RowOps EP_ROW_SYMBOL(op, format, act, isa);)
#include "kernels.inc"
#undef EP_ROW

#define EP_ROW(op, format, act, tile_m, isa) \
  EP_WHEN(EP_HAVE_##isa, {#format "_" #act "_" #isa, Isa::isa, Format::format, Act::act, &EP_ROW_SYMBOL(op, format, act, isa)}, )
extern const Row kRows[] = {
#include "kernels.inc"
};
#undef EP_ROW
extern const int kRowCount = sizeof(kRows) / sizeof(kRows[0]);

#define EP_FUNCTION(function, isa) EP_WHEN(EP_HAVE_##isa, extern const FunctionOps EP_FUNCTION_SYMBOL(function, isa);)
#include "functions.inc"
#undef EP_FUNCTION

#define EP_FUNCTION(function, isa) \
  EP_WHEN(EP_HAVE_##isa, {#function "_" #isa, Isa::isa, Function::function, &EP_FUNCTION_SYMBOL(function, isa)}, )
extern const FunctionRow kFunctionRows[] = {
#include "functions.inc"
};
#undef EP_FUNCTION
extern const int kFunctionRowCount = sizeof(kFunctionRows) / sizeof(kFunctionRows[0]);

namespace {

// edgepeft_force_kernel's wish, one word so that a change is seen whole: 0 automatic, 1 + isa, or -1 - row index, where
// the rows of functions.inc go on after those of kernels.inc.
int g_forced = 0;
int forced() { return __atomic_load_n(&g_forced, __ATOMIC_RELAXED); }

char g_names[4096];

// The best row that fits and runs here, or the one that was wished for; `first` is the index of rows[0].
template <class R, class Fits>
const R* select(const R* rows, int count, int first, Fits fits) {
  const int wish = forced();
  const R* best = nullptr;
  for (int i = 0; i < count; i++) {
    if (!fits(rows[i]) || !cpu_runs(rows[i].isa)) continue;
    if (wish == -1 - first - i || wish == 1 + static_cast<int>(rows[i].isa)) return &rows[i];
    if (!best) best = &rows[i];
  }
  return best;
}

template <class R>
char* list(const R* rows, int count, char* p) {
  for (int i = 0; i < count; i++) {
    if (!cpu_runs(rows[i].isa)) continue;
    if (p != g_names) *p++ = ' ';
    for (const char* c = rows[i].name; *c && p < g_names + sizeof(g_names) - 2; c++) *p++ = *c;
  }
  return p;
}

// What a row's name or an ISA's wishes for; 0 where no row of this CPU is called so.
template <class R>
int wish_of(const R* rows, int count, int first, const char* name) {
  for (int i = 0; i < count; i++) {
    if (!cpu_runs(rows[i].isa)) continue;
    if (same(rows[i].name, name)) return -1 - first - i;
    if (same(isa_name(rows[i].isa), name)) return 1 + static_cast<int>(rows[i].isa);
  }
  return 0;
}

}  // namespace

bool same(const char* a, const char* b) {
  while (*a && *a == *b) a++, b++;
  return *a == *b;
}

const char* isa_name(Isa isa) {
  static const char* const names[] = {
#define EP_ISA(isa) #isa,
      EP_ISAS(EP_ISA)
#undef EP_ISA
  };
  return names[static_cast<int>(isa)];
}

const FormatInfo* find_format(const char* tag, Format* f) {
  for (int i = 0; i < static_cast<int>(Format::count); i++)
    if (same(kFormats[i].tag, tag)) {
      *f = static_cast<Format>(i);
      return &kFormats[i];
    }
  return nullptr;
}

const Row* find_row(const char* name) {
  for (int i = 0; i < kRowCount; i++)
    if (same(kRows[i].name, name)) return &kRows[i];
  return nullptr;
}

const Row* select_row(Format f, Act act) {
  return select(kRows, kRowCount, 0, [=](const Row& row) { return row.format == f && row.act == act; });
}

const FunctionRow* select_function(Function f) {
  return select(kFunctionRows, kFunctionRowCount, kRowCount, [=](const FunctionRow& row) { return row.function == f; });
}

#define EP_EXPORT extern "C" __attribute__((visibility("default")))

EP_EXPORT const char* edgepeft_kernels() {
  char* p = list(kRows, kRowCount, g_names);
  *list(kFunctionRows, kFunctionRowCount, p) = 0;
  return g_names;
}

// A row's name forces that row, where what it computes is asked for; an ISA's name all of its rows.
EP_EXPORT int edgepeft_force_kernel(const char* name) {
  int wish = 0;
  if (name && *name) {
    wish = wish_of(kRows, kRowCount, 0, name);
    if (!wish) wish = wish_of(kFunctionRows, kFunctionRowCount, kRowCount, name);
    if (!wish) return -1;
  }
  __atomic_store_n(&g_forced, wish, __ATOMIC_RELAXED);
  return 0;
}
