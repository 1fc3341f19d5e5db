#pragma once
// Barriers in shared memory that count arrivals and bytes. PTX ISA: "mbarrier".

#include "hopper/thread.cuh"

namespace mfkernels::hopper {

DEVICE void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the initialised barriers visible to TMA; a block_sync must follow.
DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and announces bytes that TMA will deliver within this phase.
DEVICE void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// The predicate is inside: a branch between a wgmma and its wait makes ptxas move the wait up to the wgmma.
DEVICE void mbarrier_arrive_if(uint32_t barrier, bool arrives) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %1, 0;\n"
      "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}" ::"r"(barrier), "r"(int(arrives)) : "memory");
}

DEVICE bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

// Returns once the phase of this parity has completed. A new barrier's phase before the first counts as parity 1.
// With MF_WATCHDOG the kernel ends with an error where it would wait for ever: after 2^31 clocks at the earliest, three
// times as many at the latest. A clock to count from takes a register that the kernels do not have (head dim 128
// spills), so what is kept is the place in the code: the clock's highest bit has to change twice. There is no message:
// with a printf in the kernel, ptxas runs the products one at a time.
DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if defined(MF_WATCHDOG)
  if (mbarrier_try_wait(barrier, parity)) return;
#pragma unroll
  for (uint32_t turn = 0; turn < 3; ++turn) {
    while (uint32_t(clock()) >> 31 == turn % 2) {
      if (mbarrier_try_wait(barrier, parity)) return;
    }
  }
  __trap();
#else
  while (!mbarrier_try_wait(barrier, parity)) {
  }
#endif
}

}  // namespace mfkernels::hopper
