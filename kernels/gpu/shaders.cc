#include "shaders.h"

namespace {
#include "shaders.inc"

#define EP_SHADER_CODE(name) {#name, name##_words, sizeof(name##_words) / 4},
const ShaderCode kCode[] = {EP_SHADERS(EP_SHADER_CODE)};
#undef EP_SHADER_CODE
}  // namespace

const ShaderCode& shader_code(Shader shader) { return kCode[static_cast<int>(shader)]; }
