#pragma once

#include <stdexcept>

#include "hopper/layout.h"
#include "hopper/operand.h"

namespace mfkernels::hopper {

struct TensorMap {
  const uint8_t* data;
  int64_t sizes[4];    // column, head, row, batch
  int64_t strides[4];  // bytes
  int box_rows, box_columns, swizzle_bytes;
};

// The driver's rules for tiled maps.
inline TensorMap tensor_map(const Operand& operand, Element, int box_rows, int box_columns) {
  const TensorMap map = {static_cast<const uint8_t*>(operand.data),
                         {operand.columns, operand.heads, operand.rows, operand.batches},
                         {2, operand.heads > 1 ? 2 * operand.head_stride : 16,
                          operand.rows > 1 ? 2 * operand.row_stride : 16,
                          operand.batches > 1 ? 2 * operand.batch_stride : 16},
                         box_rows,
                         box_columns,
                         2 * box_columns};
  bool legal = reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && box_rows >= 1 && box_rows <= 256;
  legal &= map.swizzle_bytes == 32 || map.swizzle_bytes == 64 || map.swizzle_bytes == 128;
  for (int i = 0; i < 4; ++i) legal &= map.sizes[i] >= 1 && map.sizes[i] <= int64_t(1) << 32;
  for (int i = 1; i < 4; ++i) {
    legal &= map.strides[i] > 0 && map.strides[i] % 16 == 0 && map.strides[i] < int64_t(1) << 40;
  }
  if (!legal) throw std::runtime_error("cuTensorMapEncodeTiled would refuse this tensor");
  return map;
}

}  // namespace mfkernels::hopper
