#pragma once
// A matrix product that ends in GELU (tanh form), or in its derivative, by cuBLASLt: what the bindings call.

#include <cstddef>
#include <cstdint>
#include <string>

#include "hopper/operand.h"

namespace mfkernels::mlp {

enum class Ending {
  GELU,        // h = x Wᵀ + bias and out = gelu(h), W [N, K]
  DERIVATIVE,  // out = gelu'(h)∘(x W) and bias = its sum over the rows, W [K, N]
};

// Row-major, contiguous, at addresses that 16 divides; K and N are multiples of 8.
struct GeluProduct {
  Ending ending;
  hopper::Element element;
  int64_t M, N, K;
  const void* x;       // [M, K]
  const void* weight;  // [N, K] or [K, N]
  void* h;             // [M, N], written by GELU and read by DERIVATIVE
  void* bias;          // [N], read by GELU and written by DERIVATIVE
  void* out;           // [M, N]
  void* workspace;
  size_t workspace_bytes;
  int device;  // the current one
  void* stream;
};

// `library` is the file name of a cuBLASLt that the process has loaded.
//
// Throws std::invalid_argument for a call that it does not serve, std::runtime_error for what cuBLASLt complains of, for
// a product that it has no kernel for, and where the library is not there.
void gelu_product(const std::string& library, const GeluProduct& call);

}  // namespace mfkernels::mlp
