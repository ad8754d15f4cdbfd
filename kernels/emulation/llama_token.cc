// What llama.cpp needs for one generated token: a guest program that reads a prompt, then writes tokens between two marks
// (see count.cc), with no adapter if none is given. It needs llama.cpp's headers and static libraries, built for the CPU,
// for example by CMake with `zig cc` and `zig c++ -target aarch64-linux-musl -mcpu=cortex_a76` as compilers and
// -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DBUILD_SHARED_LIBS=OFF:
//     c++ llama_token.cc -I llama.cpp/include -I llama.cpp/ggml/include libllama.a libggml.a libggml-cpu.a libggml-base.a
//     llama_token model.gguf PROMPT TOKENS MARK [lora.gguf]
#include <stdlib.h>
#include <unistd.h>

#include <vector>

#include "llama.h"

static bool decode(llama_context* context, llama_token first, int count) {
  std::vector<llama_token> ids(count);
  for (int i = 0; i < count; ++i) ids[i] = (first + i) * 7919 % 32000;
  return llama_decode(context, llama_batch_get_one(ids.data(), count)) == 0 && llama_get_logits_ith(context, -1);
}

int main(int argc, char** argv) {
  if (argc < 5) return 2;
  const int prompt = atoi(argv[2]), tokens = atoi(argv[3]), mark = atoi(argv[4]);
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (!model) return 3;
  llama_context_params asked = llama_context_default_params();
  asked.n_ctx = 256;
  asked.n_threads = asked.n_threads_batch = 1;
  llama_context* context = llama_init_from_model(model, asked);
  if (!context) return 4;
  if (argc > 5) {
    llama_adapter_lora* adapter = llama_adapter_lora_init(model, argv[5]);
    float scale = 1;
    if (!adapter || llama_set_adapters_lora(context, &adapter, 1, &scale)) return 5;
  }
  if (!decode(context, 1, prompt) || !decode(context, 2, 1)) return 6;
  getpgid(mark);
  for (int i = 0; i < tokens; ++i)
    if (!decode(context, 3 + i, 1)) return 7;
  getpgid(mark + 1);
  return 0;
}
