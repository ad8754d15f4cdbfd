// The table of rows made from kernels.inc, and the choice among them.
#include "adapter_matmul.h"

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

namespace {

// edgepeft_force_kernel's wish, one word so that a change is seen whole: 0 automatic, 1 + isa, or -1 - row index.
int g_forced = 0;
int forced() { return __atomic_load_n(&g_forced, __ATOMIC_RELAXED); }

char g_names[4096];

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
  const int wish = forced();
  const Row* best = nullptr;
  for (int i = 0; i < kRowCount; i++) {
    const Row& row = kRows[i];
    if (row.format != f || row.act != act || !cpu_runs(row.isa)) continue;
    if (wish == -1 - i || wish == 1 + static_cast<int>(row.isa)) return &row;
    if (!best) best = &row;
  }
  return best;
}

#define EP_EXPORT extern "C" __attribute__((visibility("default")))

EP_EXPORT const char* edgepeft_kernels() {
  char* p = g_names;
  for (int i = 0; i < kRowCount; i++) {
    if (!cpu_runs(kRows[i].isa)) continue;
    if (p != g_names) *p++ = ' ';
    for (const char* c = kRows[i].name; *c && p < g_names + sizeof(g_names) - 2; c++) *p++ = *c;
  }
  *p = 0;
  return g_names;
}

// A row's name forces that row, where its format and activation are asked for; an ISA's name all of its rows.
EP_EXPORT int edgepeft_force_kernel(const char* name) {
  int wish = name && *name ? 0x7fffffff : 0;
  for (int i = 0; wish && i < kRowCount; i++) {
    if (!cpu_runs(kRows[i].isa)) continue;
    if (same(kRows[i].name, name)) wish = -1 - i;
    else if (same(isa_name(kRows[i].isa), name)) wish = 1 + static_cast<int>(kRows[i].isa);
    else continue;
    break;
  }
  if (wish == 0x7fffffff) return -1;
  __atomic_store_n(&g_forced, wish, __ATOMIC_RELAXED);
  return 0;
}
