#pragma once

#include <cstdint>

namespace mfkernels::hopper {

enum class Element { BFLOAT16, FLOAT16 };

// A [batch, row, head, column] tensor of 16-bit elements, columns contiguous; sizes and strides count elements.
struct Operand {
  const void* data = nullptr;
  int64_t batches = 0, rows = 0, heads = 0, columns = 0;
  int64_t batch_stride = 0, row_stride = 0, head_stride = 0;
};

}  // namespace mfkernels::hopper
