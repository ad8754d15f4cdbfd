// The plain C face of the library, for ctypes: training's dequantization, tests, fuzzing. See registry.cc for the two
// functions that list and force kernels.
#include "functions.h"

#define EP_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__ANDROID__)
#define EP_OS "android"
#elif defined(__linux__)
#define EP_OS "linux"
#elif defined(__APPLE__)
#define EP_OS "macos"
#else
#define EP_OS "other"
#endif
#if defined(__x86_64__)
#define EP_ARCH "x86_64"
#elif defined(__aarch64__)
#define EP_ARCH "aarch64"
#elif defined(__arm__)
#define EP_ARCH "arm"
#else
#define EP_ARCH "other"
#endif

EP_EXPORT int edgepeft_abi() { return 3; }  // OP_ABI of the package
EP_EXPORT const char* edgepeft_build() { return "edgepeft 0.1.0 abi=3 " EP_OS "-" EP_ARCH; }

// out[n,k] row-major, float or bfloat16, by the kernel that picks an embedding's rows. -1: unknown format, or a K that does
// not fit it.
EP_EXPORT int edgepeft_dequantize(const char* format, int bfloat16, const uint8_t* w, const void* scale, int64_t n, int64_t k,
                                  void* out_nk) {
  FunctionJob job = {};
  const FormatInfo* f = find_format(format, &job.format);
  if (!f || n < 0 || !columns_fit(*f, k)) return -1;
  int64_t ids[kTileRows];
  job.columns = k;
  job.rounded = bfloat16;
  job.ids = ids;
  job.w = w;
  job.w_scale = scale;
  const FunctionRow* row = select_function(Function::packed_embedding);
  for (int64_t first = 0; first < n; first += kTileRows) {
    job.rows = n - first < kTileRows ? n - first : kTileRows;
    job.y = static_cast<float*>(out_nk) + first * k / (bfloat16 ? 2 : 1);
    for (int64_t i = 0; i < job.rows; i++) ids[i] = first + i;
    row->ops->run(job);
  }
  return 0;
}

// y[m,n] = x[m,k] . W^T on the calling thread. kernel: a row's name, or null for the one the op would take.
// -1: unknown format or kernel, a kernel of another format or not for this CPU, a K that does not fit, no memory.
EP_EXPORT int edgepeft_matmul(const char* format, const char* kernel, int activation_int8, const uint8_t* w, const void* scale,
                              int64_t n, int64_t k, const float* x, int64_t m, float* y_mn) {
  Call call = {};
  const FormatInfo* f = find_format(format, &call.format);
  if (!f || n < 1 || m < 0 || !columns_fit(*f, k)) return -1;
  call.act = activation_int8 ? Act::int8 : Act::float32;
  const Row* row = kernel && *kernel ? find_row(kernel) : select_row(call.format, call.act);
  if (!row || row->format != call.format || row->act != call.act || !cpu_runs(row->isa)) return -1;
  if (m == 0) return 0;
  call.ops = row->ops;
  call.m = m;
  call.k = k;
  call.x = x;
  call.w = w;
  call.w_scale = scale;
  call.groups = 1;
  call.group[0].n = n;
  call.group[0].y = y_mn;
  const size_t bytes = static_cast<size_t>(plan(call)) + 64;
  void* scratch = map_pages(bytes);
  if (!scratch) return -1;
  place(call, scratch);
  for (int64_t i = 0; i < call.tasks; i++) run(call, i);
  unmap_pages(scratch, bytes);
  return 0;
}
