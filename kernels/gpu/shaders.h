// The shaders, as SPIR-V words in shaders.inc, which edgepeft.deploy.shaders writes from shaders/*.comp.
#pragma once
#include "device.h"

struct ShaderCode {
  const char* name;
  const uint32_t* code;
  size_t words;
};

// X(name)
#define EP_SHADERS(X) X(linear) X(product) X(low) X(norm) X(rotate) X(attend) X(each) X(rows) X(embed) X(dense) X(share)

enum class Shader : int {
#define EP_SHADER_NAME(name) name,
  EP_SHADERS(EP_SHADER_NAME)
#undef EP_SHADER_NAME
  count
};

// The shader for a device with those features; of them it uses the ones it leaves in `features`.
const ShaderCode& shader_code(Shader shader, uint32_t* features);
