// What a driver says it can is tried before it is used: a small adapted linear and a norm, by the plain shader and by the
// variant; A x inside of each workgroup and beside the others, ranks first and ranks last. Drivers are known that fail to compile what is right, or compute something else.
#include <math.h>
#include <string.h>

#include "shaders.h"
#include "../formats.h"

namespace {

constexpr uint32_t kK = 512, kRank = 8, kThreads = 128, kTiles = 8, kN = kTiles * kTileRows;
constexpr uint64_t kPart = 1 << 15;  // bytes of each part of the buffer
enum Part : uint64_t { kCodes, kScales, kX, kAdapter, kY, kParts };
constexpr float kExact = 1e-5f, kRounded = 4e-3f;  // of the largest number: sums in another order, products of 11 bits

uint32_t bits(float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  return u;
}

void write_inputs(char* memory) {
  uint32_t state = 1;
  const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 8; };
  for (uint32_t i = 0; i < kPart / 4; i++) {
    reinterpret_cast<uint32_t*>(memory + kCodes * kPart)[i] = next() << 8 ^ next();
    reinterpret_cast<uint32_t*>(memory + kScales * kPart)[i] = 0x38002c00;  // 1/2 and 1/16
    for (Part part : {kX, kAdapter})
      reinterpret_cast<float*>(memory + part * kPart)[i] = static_cast<float>(next()) * 0x1p-23f - 1;
  }
}

Dispatch adapted_linear(const Buffer& all, Low low, const Buffer& beside) {
  Dispatch d;
  d.shader = Shader::linear;
  const bool inside = low == Low::inside;
  for (uint32_t constant : {kThreads, 4u, 32u, 0u, 1u, static_cast<uint32_t>(low), 1u, 0u}) d.constant(constant);
  for (const Buffer*& buffer : d.buffers) buffer = &all;
  if (!inside) d.buffers[7] = &beside;
  d.groups[0] = kTiles + (inside ? 0 : kRank);
  d.offsets[1] = kScales * kPart;
  const uint64_t floats = kPart / 4;
  const uint64_t words[] = {kK, 1, kTiles, kX * floats, 0xffffffffu, inside ? 0 : kBesideLow, 0, kRank, kN, kRank, kAdapter * floats,
                            kAdapter * floats + kK * kRank, 0xffffffffu, 0xffffffffu, 0xffffffffu, kY * floats};
  for (uint64_t word : words) d.word(word);
  for (int i = 0; i < 16; i++) d.word(0);
  return d;
}

Dispatch norm(const Buffer& all) {
  Dispatch d;
  d.shader = Shader::norm;
  for (uint32_t constant : {64u, 0u, 1u}) d.constant(constant);
  for (const Buffer*& buffer : d.buffers) buffer = &all;
  const uint64_t floats = kPart / 4;
  for (uint64_t word : {uint64_t{kK}, kX * floats, uint64_t{0}, kY * floats + kN, kY * floats + kN, kAdapter * floats, kAdapter * floats})
    d.word(word);
  d.word(bits(1e-6f));
  return d;
}

constexpr int kNumbers = kN + kK;

Failure compute(Device* device, const Buffer& all, uint32_t features, Low low, float* y) {
  device->features = features;
  memset(all.mapped + kY * kPart, 0xff, kPart);  // which are no numbers
  GPU_TRY(device->begin());
  for (Dispatch d : {adapted_linear(all, low, device->beside), norm(all)}) {
    d.features = ~0u;
    if (Failure failure = device->record(d)) return device->drop(), failure;
  }
  GPU_TRY(device->finish());
  memcpy(y, all.mapped + kY * kPart, kNumbers * 4);
  return nullptr;
}

bool alike(const float* got, const float* want, int count, float allowed) {
  float largest = 0;
  for (int i = 0; i < count; i++) largest = fabsf(want[i]) > largest ? fabsf(want[i]) : largest;
  for (int i = 0; i < count; i++)
    if (!(fabsf(got[i] - want[i]) <= allowed * largest)) return false;
  return true;
}

}  // namespace

bool Device::trial(uint32_t feature) {
  Buffer all;
  if (allocate(kParts * kPart, Memory::download, &all)) return false;
  write_inputs(all.mapped);
  float want[kNumbers], got[kNumbers];
  const uint32_t with = features | feature;
  bool right = !compute(this, all, 0, Low::inside, want);
  const auto as_wanted = [&](Low low) {
    return !compute(this, all, with, low, got) && features == with && alike(got, want, kN, with & kFloat16 ? kRounded : kExact) &&
           alike(got + kN, want + kN, kK, kExact);
  };
  if (feature != kBeside) right = right && as_wanted(Low::inside);
  else for (Low low : {Low::beside, Low::behind, Low::beside}) right = right && as_wanted(low);
  release(&all);
  submits = dispatches = 0;
  return right;
}

void Device::want(Feature feature) {
  if (!(has & feature)) return;
  has &= ~static_cast<uint32_t>(feature);  // so that it is tried once
  const uint32_t before = features;
  features = trial(feature) ? before | feature : before;
}
