// One dual kernel (float16, D = 72), for ctypes: what test_cuda_emulator.py compiles with mistakes put into it.

#include <cstring>

#include "attention/forward_launch.cuh"
#include "machine.h"

extern "C" __attribute__((visibility("default"))) const char* run(uint16_t* const (&tensors)[6], uint16_t* o,
                                                                  uint16_t* o_dot, float* lse, int B, int N, int D) {
  using namespace mfkernels;
  static char message[4096];
  const auto operand = [&](int i) {
    return hopper::Operand{tensors[i], B, N, 1, D, int64_t(N) * D, D, D};
  };
  const attention::ForwardCall call{hopper::Element::FLOAT16, operand(0), operand(1), operand(2), operand(3),
                                    operand(4),               operand(5), o,          o_dot,      lse,
                                    0.125f,                   false,      0,          nullptr};
  emulator::options.multiprocessors = 1;
  try {
    attention::launch_kernel<attention::ForwardKernel<hopper::Float16, 72, true>>(call, 0, B);
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof(message) - 1);
    return message;
  }
  return nullptr;
}
