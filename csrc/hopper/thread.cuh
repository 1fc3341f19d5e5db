#pragma once
// What one thread can ask and do on its own or with its warp.

#include <cstdint>

#include "hopper/layout.h"

#define DEVICE __device__ __forceinline__

namespace mfkernels::hopper {

struct BFloat16 {};
struct Float16 {};

DEVICE int thread_index() { return int(threadIdx.x); }
// Not kept in a register since it was last read.
DEVICE int thread_index_anew() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
// x, as if it were a new number: the compiler works out anew what follows from it, and need not keep it in registers.
DEVICE int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
DEVICE int block_index() { return int(blockIdx.x); }
DEVICE int grid_size() { return int(gridDim.x); }
DEVICE void block_sync() { __syncthreads(); }

// The block's dynamic shared memory, as an address of the shared window.
DEVICE uint32_t dynamic_shared() {
  extern __shared__ uint8_t memory[];
  return uint32_t(__cvta_generic_to_shared(memory));
}

// PTX ISA: "setmaxnreg". All four warps of a warpgroup call it.
template <int N>
DEVICE void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <class X>
DEVICE X shuffle_xor(X x, int lanes) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
}

// Tells the compiler that all lanes have the same x.
DEVICE int uniform(int x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }

DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Within 2 ulp where |b| is between 2^-126 and 2^126.
DEVICE float divide_approx(float a, float b) {
  float c;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// Two floats rounded to 16 bits, `low` in the low half.
template <class T>
DEVICE uint32_t pack(float low, float high);
template <>
DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

}  // namespace mfkernels::hopper
