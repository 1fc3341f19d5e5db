#pragma once
// The little of cuBLASLt that gelu_product.cpp needs, by the names and numbers of NVIDIA's cublasLt.h (13.10, the same
// since 11.6). Declared here so that neither its headers nor its library are needed to build: PyTorch brings the library.

#include <cstddef>
#include <cstdint>

namespace mfkernels::cublaslt {

using Handle = struct HandleOpaque*;
using Desc = struct DescOpaque*;
using Layout = struct LayoutOpaque*;
using Preference = struct PreferenceOpaque*;
using Status = int;  // 0: success

constexpr int CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14;
constexpr int COMPUTE_32F = 68;
constexpr int32_t OP_T = 1;

constexpr int DESC_TRANSA = 3, DESC_EPILOGUE = 7, DESC_BIAS_POINTER = 8;
constexpr int DESC_EPILOGUE_AUX_POINTER = 11, DESC_EPILOGUE_AUX_LD = 12;
constexpr int PREF_MAX_WORKSPACE_BYTES = 1, PREF_MIN_ALIGNMENT_A_BYTES = 5;  // then of B, C and D

constexpr uint32_t EPILOGUE_GELU_AUX_BIAS = 32 | 128 | 4;
constexpr uint32_t EPILOGUE_DGELU_BGRAD = 64 | 128 | 16;

struct Algo {
  uint64_t data[8];
};

struct HeuristicResult {
  Algo algo;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

// Functions of the C interface by their names there.
#define MF_CUBLASLT_FUNCTIONS(f)                                                                                     \
  f(cublasLtCreate, (Handle*))                                                                                       \
  f(cublasLtMatmulDescCreate, (Desc*, int compute_type, int scale_type))                                             \
  f(cublasLtMatmulDescDestroy, (Desc))                                                                               \
  f(cublasLtMatmulDescSetAttribute, (Desc, int, const void*, size_t))                                                \
  f(cublasLtMatrixLayoutCreate, (Layout*, int type, uint64_t rows, uint64_t cols, int64_t ld))                       \
  f(cublasLtMatrixLayoutDestroy, (Layout))                                                                           \
  f(cublasLtMatmulPreferenceCreate, (Preference*))                                                                   \
  f(cublasLtMatmulPreferenceDestroy, (Preference))                                                                   \
  f(cublasLtMatmulPreferenceSetAttribute, (Preference, int, const void*, size_t))                                    \
  f(cublasLtMatmulAlgoGetHeuristic,                                                                                  \
    (Handle, Desc, Layout a, Layout b, Layout c, Layout d, Preference, int asked, HeuristicResult*, int* found))     \
  f(cublasLtMatmul, (Handle, Desc, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta, \
                     const void* c, Layout, void* d, Layout, const Algo*, void* workspace, size_t, void* stream))

}  // namespace mfkernels::cublaslt
