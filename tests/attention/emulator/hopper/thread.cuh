#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "hopper/layout.h"
#include "machine.h"

#define DEVICE inline

struct uint4 {
  uint32_t x, y, z, w;
};

namespace mfkernels::hopper {

struct BFloat16 {};
struct Float16 {};

inline int thread_index() { return emulator::machine().thread(); }
inline int thread_index_anew() { return emulator::machine().thread(); }
inline int anew(int x) { return x; }
inline int block_index() { return emulator::machine().block; }
inline int grid_size() { return emulator::machine().blocks; }
inline void block_sync() { emulator::machine().block_sync(); }
inline uint32_t dynamic_shared() { return emulator::SHARED_BASE; }

template <int N>
void keep_registers() {}
template <int N>
void take_registers() {}

template <class X>
X shuffle_xor(X x, int lanes) {
  static_assert(sizeof(X) == 4);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = emulator::machine().exchange(bits, lanes);
  std::memcpy(&x, &bits, 4);
  return x;
}

inline int uniform(int x) {
  for (int lanes = 1; lanes < emulator::WARP; lanes *= 2) {
    emulator::machine().require(shuffle_xor(x, lanes) == x, "a value called uniform differs among lanes");
  }
  return x;
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float divide_approx(float a, float b) { return a / b; }

inline uint16_t bfloat16_bits(float x) {
  if (std::isnan(x)) return 0x7FFF;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float from_bits(BFloat16, uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

inline float from_bits(Float16, uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(float(fraction), -24)
                                          : std::ldexp(float(fraction + 1024), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Rounds to nearest even.
inline uint16_t float16_bits(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7FFF;
  if (magnitude >= 65520.f) return sign | 0x7C00;
  if (magnitude < 6.103515625e-5f) return uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(magnitude, 24))));
  int exponent;
  const float fraction = std::frexp(magnitude, &exponent);  // in [1/2, 1)
  const uint32_t rounded = uint32_t(std::nearbyint(std::ldexp(fraction, 11)));  // 1024 .. 2048
  return uint16_t(sign + (uint32_t(exponent + 14) << 10) + (rounded - 1024));
}

template <class T>
uint32_t pack(float low, float high);
template <>
inline uint32_t pack<BFloat16>(float low, float high) {
  return bfloat16_bits(low) | uint32_t(bfloat16_bits(high)) << 16;
}
template <>
inline uint32_t pack<Float16>(float low, float high) {
  return float16_bits(low) | uint32_t(float16_bits(high)) << 16;
}

}  // namespace mfkernels::hopper
