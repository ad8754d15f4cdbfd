#include "shaders.h"

namespace {
#include "shaders.inc"

#define EP_CODE(name) {#name, name##_words, sizeof(name##_words) / 4}
#define EP_SHADER_CODE(name) EP_CODE(name),
const ShaderCode kPlain[] = {EP_SHADERS(EP_SHADER_CODE)};
#undef EP_SHADER_CODE

// Those that features make into another one.
const struct Variant {
  Shader shader;
  uint32_t features;
  ShaderCode code;
} kVariants[] = {
#define EP_VARIANT(name, tag, features) {Shader::name, features, EP_CODE(name##_##tag)},
    EP_VARIANTS(EP_VARIANT)
#undef EP_VARIANT
};
}  // namespace

const ShaderCode& shader_code(Shader shader, uint32_t* features) {
  const Variant* best = nullptr;
  for (const Variant& v : kVariants)
    if (v.shader == shader && !(v.features & ~*features) && (!best || v.features > best->features)) best = &v;
  *features = best ? best->features : 0;
  return best ? best->code : kPlain[static_cast<int>(shader)];
}
