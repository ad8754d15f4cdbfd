// A QEMU TCG plugin that counts the guest instructions of a run and prints "instructions N" when it ends. A guest that
// calls getpgid(kMark + i), which no process answers to, gets a line "mark i instructions N" at that point.
// It declares the few entries of the plugin API it calls (unchanged from version 1 to 4), since distributions ship no
// header for it; EP_PLUGIN_VERSION is the version that the running qemu asks for. Counts repeat, emulated seconds do not.
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define EP_EXPORT extern "C" __attribute__((visibility("default")))

typedef uint64_t PluginId;
struct Block;  // a translated run of guest instructions

extern "C" {
size_t qemu_plugin_tb_n_insns(const Block*);
void qemu_plugin_register_vcpu_tb_trans_cb(PluginId, void (*)(PluginId, Block*));
void qemu_plugin_register_vcpu_tb_exec_cb(Block*, void (*)(unsigned, void*), int, void*);
void qemu_plugin_register_vcpu_syscall_cb(PluginId, void (*)(PluginId, unsigned, int64_t, uint64_t, uint64_t, uint64_t,
                                                            uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));
void qemu_plugin_register_atexit_cb(PluginId, void (*)(PluginId, void*), void*);
void qemu_plugin_outs(const char*);
}

EP_EXPORT int qemu_plugin_version;
int qemu_plugin_version = EP_PLUGIN_VERSION;

static constexpr uint64_t kMark = 0x45500000, kMarks = 0x10000;
static uint64_t g_count;

static void on_run(unsigned, void* instructions) {
  __atomic_fetch_add(&g_count, reinterpret_cast<uintptr_t>(instructions), __ATOMIC_RELAXED);
}

static void on_translate(PluginId, Block* block) {
  void* instructions = reinterpret_cast<void*>(qemu_plugin_tb_n_insns(block));
  qemu_plugin_register_vcpu_tb_exec_cb(block, on_run, 0, instructions);
}

static void say(const char* before, long mark) {
  char text[96];
  const unsigned long long count = __atomic_load_n(&g_count, __ATOMIC_RELAXED);
  if (mark < 0) snprintf(text, sizeof text, "%sinstructions %llu\n", before, count);
  else snprintf(text, sizeof text, "%s%ld instructions %llu\n", before, mark, count);
  qemu_plugin_outs(text);
}

static void on_syscall(PluginId, unsigned, int64_t number, uint64_t pid, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                       uint64_t, uint64_t) {
  constexpr int64_t kGetpgid = 155;  // on aarch64
  if (number == kGetpgid && pid >= kMark && pid < kMark + kMarks) say("mark ", static_cast<long>(pid - kMark));
}

static void on_exit(PluginId, void*) { say("", -1); }

EP_EXPORT int qemu_plugin_install(PluginId id, const void*, int, char**) {
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
  qemu_plugin_register_vcpu_syscall_cb(id, on_syscall);
  qemu_plugin_register_atexit_cb(id, on_exit, nullptr);
  return 0;
}
