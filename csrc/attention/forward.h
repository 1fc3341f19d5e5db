#pragma once
// Attention and its tangent: what the bindings call.

#include <array>
#include <cstdint>
#include <string>

#include "hopper/operand.h"

namespace mfkernels::attention {

constexpr std::array<int, 5> HEAD_DIMS = {64, 72, 80, 96, 128};

struct ForwardCall {
  hopper::Element element;
  hopper::Operand q;                    // [B, N_q, H, D]
  hopper::Operand k, v;                 // [B, N_kv, H_kv, D]
  hopper::Operand q_dot, k_dot, v_dot;  // the first B_t <= B batch rows of each; B_t = 0: no tangent
  uint16_t* o;                          // [B, N_q, H, D] contiguous
  uint16_t* o_dot;                      // [B_t, N_q, H, D] contiguous
  float* lse;                           // [B, H, N_q] contiguous
  float scale;
  bool causal;
  int device;
  void* stream;
};

struct TileSizes {
  int block_m, block_n, stages, threads, shared_bytes;
};

// Throws std::invalid_argument for a call that it does not serve, std::runtime_error for what CUDA complains of; both
// messages have the call's shapes.
void forward(const ForwardCall& call);

// Throws std::invalid_argument.
TileSizes forward_tile(int head_dim, bool dual);

// One for each head dim, in a file of its own so that they compile in parallel.
template <int D>
void launch_forward(const ForwardCall& call);
template <int D>
TileSizes tile_of(bool dual);

}  // namespace mfkernels::attention
