#pragma once

#include "hopper/thread.cuh"

namespace mfkernels::hopper {

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) { emulator::machine().barrier_init(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_expect(uint32_t barrier, uint32_t bytes) { emulator::machine().arrive(barrier, bytes); }
inline void mbarrier_arrive_if(uint32_t barrier, bool arrives) {
  if (arrives) emulator::machine().arrive(barrier, 0);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) { emulator::machine().barrier_wait(barrier, parity); }

}  // namespace mfkernels::hopper
