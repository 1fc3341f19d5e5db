#include "machine.h"

// For ctypes: the options are one variable of the library that the kernels run in.
extern "C" __attribute__((visibility("default"))) void configure(bool eager_copies, bool eager_products,
                                                                 int multiprocessors, unsigned seed) {
  emulator::options = {eager_copies, eager_products, multiprocessors, seed};
}
