#pragma once

#include "hopper/thread.cuh"
#include "machine.h"

namespace mfkernels::hopper {

using Stream = void*;

inline int multiprocessors(int) { return emulator::options.multiprocessors; }
inline void set_device(int) {}

template <class Kernel>
void launch(int blocks, const typename Kernel::Parameters& parameters, Stream) {
  for (int block = 0; block < blocks; ++block) {
    emulator::Machine machine(Kernel::THREADS, block, blocks, Kernel::SHARED_BYTES);
    machine.run([&] { Kernel::block(parameters); });
  }
}

}  // namespace mfkernels::hopper
