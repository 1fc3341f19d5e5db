#pragma once

#include "hopper/tensor_map.h"
#include "hopper/thread.cuh"

namespace mfkernels::hopper {

inline void tma_prefetch(const TensorMap&) {}

inline void tma_load(uint32_t destination, const TensorMap& map, uint32_t barrier, int column, int head, int row,
                     int batch) {
  emulator::Machine& machine = emulator::machine();
  const int width = map.swizzle_bytes;
  machine.require(destination % (8 * width) == 0, "a copy's destination does not start with a swizzle pattern");
  const auto run = [=, &machine] {
    for (int r = 0; r < map.box_rows; ++r) {
      for (int c = 0; c < map.box_columns; ++c) {
        const int64_t at[4] = {column + c, head, row + r, batch};
        bool inside = true;
        int64_t offset = 0;
        for (int i = 0; i < 4; ++i) {
          inside &= at[i] >= 0 && at[i] < map.sizes[i];
          offset += at[i] * map.strides[i];
        }
        uint16_t element = 0;
        if (inside) std::memcpy(&element, map.data + offset, 2);
        // chunk n of 16 bytes of row r goes where chunk n ^ (line of 128 bytes, modulo chunks of a row) was
        const int linear = r * width + 2 * c;
        const int chunk = linear / 16 % (width / 16) ^ linear / 128 % (width / 16);
        std::memcpy(&machine.shared[destination + r * width + 16 * chunk + linear % 16], &element, 2);
      }
    }
  };
  machine.copy({destination, uint32_t(map.box_rows * width), barrier, run});
}

}  // namespace mfkernels::hopper
