#pragma once
// What TMA has to know about a tensor in global memory. CUDA driver API: "Tensor map object management".

#include <cuda.h>

#include "hopper/layout.h"
#include "hopper/operand.h"

namespace mfkernels::hopper {

using TensorMap = CUtensorMap;

// For boxes of `box_rows` rows and one block of columns of one head. Throws std::runtime_error.
TensorMap tensor_map(const Operand& operand, Element element, int box_rows, int box_columns);

}  // namespace mfkernels::hopper
