// What the library needs of the machine, without a libc: CPU features, pages, and the two functions that compilers
// call on their own. A file that depends on no libc loads under glibc, musl and bionic alike.
#include "adapter_matmul.h"

namespace {

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
#if defined(__x86_64__)
enum Syscall : long { kRead = 0, kClose = 3, kMmap = 9, kMunmap = 11, kYield = 24, kArchPrctl = 158, kOpenat = 257 };
long syscall6(long n, long a, long b, long c, long d, long e, long f) {
  register long r10 asm("r10") = d;
  register long r8 asm("r8") = e;
  register long r9 asm("r9") = f;
  long result;
  asm volatile("syscall" : "=a"(result) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
  return result;
}
#else
enum Syscall : long { kRead = 63, kClose = 57, kMmap = 222, kMunmap = 215, kYield = 124, kOpenat = 56 };
long syscall6(long n, long a, long b, long c, long d, long e, long f) {
  register long x8 asm("x8") = n;
  register long x0 asm("x0") = a;
  register long x1 asm("x1") = b;
  register long x2 asm("x2") = c;
  register long x3 asm("x3") = d;
  register long x4 asm("x4") = e;
  register long x5 asm("x5") = f;
  asm volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
  return x0;
}
#endif
#define EP_SYSCALLS 1
#endif

#if defined(__aarch64__) && defined(EP_SYSCALLS)
extern "C" __attribute__((weak)) unsigned long getauxval(unsigned long);

// The kernel's word on the CPU. Some Android processes may not read /proc/self/auxv, so libc is asked first where
// there is one in the process.
unsigned long hwcap(unsigned long key) {
  if (getauxval) return getauxval(key);
  const long fd = syscall6(kOpenat, -100, reinterpret_cast<long>("/proc/self/auxv"), 0, 0, 0, 0);
  if (fd < 0) return 0;
  unsigned long entry[2] = {1, 0}, value = 0;
  while (entry[0] && syscall6(kRead, fd, reinterpret_cast<long>(entry), sizeof(entry), 0, 0, 0) == sizeof(entry))
    if (entry[0] == key) value = entry[1];
  syscall6(kClose, fd, 0, 0, 0, 0, 0);
  return value;
}
bool detect(Isa isa) {
  constexpr unsigned long kHwcap = 16, kHwcap2 = 26, kAsimd = 1ul << 1, kDotprod = 1ul << 20, kI8mm = 1ul << 13;
  if (isa == Isa::neon) return hwcap(kHwcap) & kAsimd;
  if (isa == Isa::dotprod) return hwcap(kHwcap) & kDotprod;
  return isa == Isa::i8mm && (hwcap(kHwcap) & kDotprod) && (hwcap(kHwcap2) & kI8mm);
}
#elif defined(__x86_64__)
struct Registers {
  unsigned a, b, c, d;
};
Registers cpuid(unsigned leaf) {
  Registers r;
  asm volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(0));
  return r;
}
bool has(unsigned word, unsigned bits) { return (word & bits) == bits; }

// Linux saves tiles only for a process that has asked for them.
bool detect_amx(unsigned saved, unsigned features) {
#if defined(EP_SYSCALLS)
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has(saved, 0x60000) && has(features, kTile | kInt8) && !syscall6(kArchPrctl, kRequestPermission, kTileData, 0, 0, 0, 0);
#else
  return false;
#endif
}

// A feature counts when the CPU has it and the system saves its registers.
bool detect(Isa isa) {
  if (cpuid(0).a < 7) return false;
  const Registers one = cpuid(1), seven = cpuid(7);
  constexpr unsigned kFma = 1u << 12, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  if (!has(one.c, kFma | kOsxsave | kAvx | kF16c)) return false;
  unsigned saved, high;
  asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (isa == Isa::avx2) return has(saved, 0x6) && has(seven.b, 1u << 5);
#if defined(EP_SIMDE)
  return isa == Isa::avx512vnni;  // tests run the row through SIMDe on any CPU
#endif
  constexpr unsigned kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31, kVnni = 1u << 11;
  if (!has(saved, 0xe6) || !has(seven.b, kF | kDq | kBw | kVl) || !has(seven.c, kVnni)) return false;
  return isa == Isa::avx512vnni || (isa == Isa::amx && detect_amx(saved, seven.d));
}
#else
bool detect(Isa) { return false; }
#endif

}  // namespace

bool cpu_runs(Isa isa) {
  if (isa == Isa::scalar) return true;
  static signed char known[static_cast<int>(Isa::count)];  // 0 not asked yet, 1 yes, -1 no; racing threads agree
  signed char& k = known[static_cast<int>(isa)];
  signed char v = __atomic_load_n(&k, __ATOMIC_RELAXED);
  if (!v) __atomic_store_n(&k, v = detect(isa) ? 1 : -1, __ATOMIC_RELAXED);
  return v > 0;
}

#if defined(EP_SYSCALLS)
void* map_pages(size_t bytes) {
  constexpr long kReadWrite = 3, kPrivateAnonymous = 0x22;
  const long p = syscall6(kMmap, 0, static_cast<long>(bytes), kReadWrite, kPrivateAnonymous, -1, 0);
  return p < 0 && p > -4096 ? nullptr : reinterpret_cast<void*>(p);
}
void unmap_pages(void* p, size_t bytes) { syscall6(kMunmap, reinterpret_cast<long>(p), static_cast<long>(bytes), 0, 0, 0, 0); }
void yield_cpu() { syscall6(kYield, 0, 0, 0, 0, 0, 0); }
#else
extern "C" void* malloc(size_t);
extern "C" void free(void*);
void* map_pages(size_t bytes) { return malloc(bytes); }
void unmap_pages(void* p, size_t) { free(p); }
void yield_cpu() {}
#endif

#if defined(EP_FREESTANDING)
// The empty asm keeps the loops from being recognised as the very functions they define.
#define EP_HIDDEN extern "C" __attribute__((visibility("hidden"), used))
EP_HIDDEN void* memcpy(void* to, const void* from, size_t n) {
  char* d = static_cast<char*>(to);
  const char* s = static_cast<const char*>(from);
  for (; n >= 8; n -= 8, d += 8, s += 8) {
    uint64_t word;
    __builtin_memcpy(&word, s, 8);
    __builtin_memcpy(d, &word, 8);
    asm volatile("" ::: "memory");
  }
  for (; n; n--) {
    *d++ = *s++;
    asm volatile("" ::: "memory");
  }
  return to;
}
EP_HIDDEN void* memset(void* to, int value, size_t n) {
  char* d = static_cast<char*>(to);
  const uint64_t word = 0x0101010101010101ull * static_cast<unsigned char>(value);
  for (; n >= 8; n -= 8, d += 8) {
    __builtin_memcpy(d, &word, 8);
    asm volatile("" ::: "memory");
  }
  for (; n; n--) {
    *d++ = static_cast<char>(value);
    asm volatile("" ::: "memory");
  }
  return to;
}
#endif
