#include "hopper/tensor_map.h"

#include <cuda_runtime.h>
#include <cudaTypedefs.h>

#include <stdexcept>
#include <string>

namespace mfkernels::hopper {
namespace {

// Asked of the driver at the first call: a library that names libcuda does not load where there is no driver.
PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0");
  }
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

CUtensorMapSwizzle swizzle_code(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::BYTES_128: return CU_TENSOR_MAP_SWIZZLE_128B;
    case Swizzle::BYTES_64: return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::BYTES_32: return CU_TENSOR_MAP_SWIZZLE_32B;
  }
  throw std::logic_error("no such swizzle");
}

}  // namespace

TensorMap tensor_map(const Operand& operand, Element element, int box_rows, int box_columns) {
  const cuuint64_t sizes[] = {cuuint64_t(operand.columns), cuuint64_t(operand.heads), cuuint64_t(operand.rows),
                              cuuint64_t(operand.batches)};
  cuuint64_t strides[] = {cuuint64_t(operand.head_stride), cuuint64_t(operand.row_stride),
                          cuuint64_t(operand.batch_stride)};
  for (cuuint64_t& stride : strides) stride *= ELEMENT_BYTES;
  // a dimension of one has a stride that nobody uses, and that must be a legal one: as if there were no gaps
  if (operand.heads == 1) strides[0] = sizes[0] * ELEMENT_BYTES;
  if (operand.rows == 1) strides[1] = sizes[1] * strides[0];
  if (operand.batches == 1) strides[2] = sizes[2] * strides[1];
  const cuuint32_t box[] = {cuuint32_t(box_columns), 1, cuuint32_t(box_rows), 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  TensorMap map;
  static const auto encode = encode_function();
  const CUresult result = encode(
      &map, element == Element::BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<void*>(operand.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle_code(swizzle_of(box_columns)), CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with CUDA error " + std::to_string(int(result)));
  }
  return map;
}

}  // namespace mfkernels::hopper
