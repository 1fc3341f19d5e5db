#pragma once
// Asynchronous products of a warpgroup (four warps, 64 rows).
// PTX ISA: "Asynchronous Warpgroup Level Matrix Instructions".
//
// Between a product's issue and its wait its registers belong to the tensor cores. To the compiler an accumulator is
// ready when the instruction has been issued, so `wgmma_wait` takes the accumulators that become readable there and
// forbids it to move any use of them further up.

#include "hopper/thread.cuh"

namespace mfkernels::hopper {

// Orders what the threads wrote to registers before products that read them.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// To the compiler, x is read and written here.
template <int N>
DEVICE void hold(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
DEVICE void hold(uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// Waits until at most PENDING committed groups are unfinished.
template <int PENDING, class... Accumulators>
DEVICE void wgmma_wait(Accumulators&... ready) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  (hold(ready), ...);
}

// d[64, N] = a[64, 16] b[16, N] (+ d), bfloat16 or float16 in, float32 out.
// rows:    a and b in shared memory, both read along their rows (b is the transpose of what is stored)
// columns: a in registers, in the layout of an accumulator; b in shared memory as it is stored
template <class T, int N>
struct Wgmma;

// clang-format off
#define MF_REGISTERS_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define MF_REGISTERS_32 MF_REGISTERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MF_REGISTERS_40 MF_REGISTERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define MF_REGISTERS_48 MF_REGISTERS_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define MF_REGISTERS_64 MF_REGISTERS_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define MF_FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MF_SIXTEEN(d, i) MF_FOUR(d, i), MF_FOUR(d, i + 4), MF_FOUR(d, i + 8), MF_FOUR(d, i + 12)
#define MF_ACCUMULATORS_32(d) MF_SIXTEEN(d, 0), MF_SIXTEEN(d, 16)
#define MF_ACCUMULATORS_40(d) MF_ACCUMULATORS_32(d), MF_FOUR(d, 32), MF_FOUR(d, 36)
#define MF_ACCUMULATORS_48(d) MF_ACCUMULATORS_32(d), MF_SIXTEEN(d, 32)
#define MF_ACCUMULATORS_64(d) MF_ACCUMULATORS_48(d), MF_SIXTEEN(d, 48)
// clang-format on

// R accumulators; the operands after them are numbered from P0 = R on.
#define MF_WGMMA(T, TYPE, N, R, P0, P1, P2, P3, P4, P5)                                                            \
  template <>                                                                                                      \
  struct Wgmma<T, N> {                                                                                             \
    static DEVICE void rows(float (&d)[R], MatrixDescriptor a, MatrixDescriptor b, bool accumulate) {              \
      asm volatile(                                                                                                \
          "{\n"                                                                                                    \
          ".reg .pred p;\n"                                                                                        \
          "setp.ne.b32 p, %" #P2 ", 0;\n"                                                                          \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MF_REGISTERS_##R "}, %" #P0         \
          ", %" #P1 ", p, 1, 1, 0, 0;\n"                                                                           \
          "}"                                                                                                      \
          : MF_ACCUMULATORS_##R(d)                                                                                 \
          : "l"(a.bits()), "l"(b.bits()), "r"(int(accumulate)));                                                   \
    }                                                                                                              \
    static DEVICE void columns(float (&d)[R], const uint32_t* a, MatrixDescriptor b) {                             \
      asm volatile(                                                                                                \
          "{\n"                                                                                                    \
          ".reg .pred p;\n"                                                                                        \
          "setp.eq.u32 p, 0, 0;\n"                                                                                 \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MF_REGISTERS_##R "}, {%" #P0        \
          ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, 1;\n"                                               \
          "}"                                                                                                      \
          : MF_ACCUMULATORS_##R(d)                                                                                 \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()));                                            \
    }                                                                                                              \
  };

// clang-format off
MF_WGMMA(BFloat16, "bf16", 64, 32, 32, 33, 34, 35, 36, 37)
MF_WGMMA(BFloat16, "bf16", 80, 40, 40, 41, 42, 43, 44, 45)
MF_WGMMA(BFloat16, "bf16", 96, 48, 48, 49, 50, 51, 52, 53)
MF_WGMMA(BFloat16, "bf16", 128, 64, 64, 65, 66, 67, 68, 69)
MF_WGMMA(Float16, "f16", 64, 32, 32, 33, 34, 35, 36, 37)
MF_WGMMA(Float16, "f16", 80, 40, 40, 41, 42, 43, 44, 45)
MF_WGMMA(Float16, "f16", 96, 48, 48, 49, 50, 51, 52, 53)
MF_WGMMA(Float16, "f16", 128, 64, 64, 65, 66, 67, 68, 69)
// clang-format on
#undef MF_WGMMA

}  // namespace mfkernels::hopper
