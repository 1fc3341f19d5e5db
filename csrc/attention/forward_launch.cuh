#pragma once

#include <algorithm>

#include "attention/forward.h"
#include "attention/forward_kernel.cuh"
#include "hopper/launch.cuh"

namespace mfkernels::attention {

template <class Tile>
Maps maps_of(const hopper::Operand& operand, hopper::Element element, int rows) {
  Maps maps;
  maps.main = hopper::tensor_map(operand, element, rows, 64);
  if constexpr (Tile::Columns::TAIL > 0) {
    maps.tail = hopper::tensor_map(operand, element, rows, Tile::Columns::TAIL);
  } else {
    maps.tail = maps.main;  // not read
  }
  return maps;
}

template <class Kernel>
void launch_kernel(const ForwardCall& call, int first_batch, int batches) {
  if (batches == 0) return;
  using QueryTile = typename Kernel::QueryTile;
  using KeyTile = typename Kernel::KeyTile;
  using ValueTile = typename Kernel::ValueTile;
  typename Kernel::Parameters p;
  const auto element = call.element;
  p.q = maps_of<QueryTile>(call.q, element, Kernel::ROWS);
  p.k = maps_of<KeyTile>(call.k, element, Kernel::BLOCK_N);
  p.v = hopper::tensor_map(call.v, element, Kernel::BLOCK_N, ValueTile::WIDTH);
  p.q_dot = Kernel::DUAL ? maps_of<QueryTile>(call.q_dot, element, Kernel::ROWS) : p.q;
  p.k_dot = Kernel::DUAL ? maps_of<KeyTile>(call.k_dot, element, Kernel::BLOCK_N) : p.k;
  p.v_dot = Kernel::DUAL ? hopper::tensor_map(call.v_dot, element, Kernel::BLOCK_N, ValueTile::WIDTH) : p.v;
  p.o = call.o;
  p.o_dot = call.o_dot;
  p.lse = call.lse;
  p.scale = call.scale;
  p.scale_log2 = call.scale * 1.4426950408889634f;
  p.first_batch = first_batch;
  p.shape = {batches,          int(call.q.rows),  int(call.k.rows),
             int(call.q.heads), int(call.k.heads), call.causal};
  p.works = int(works<Kernel::BLOCK_M>(p.shape));  // forward.cpp has checked that it fits
  const int blocks = std::min(p.works, hopper::multiprocessors(call.device));
  hopper::launch<Kernel>(blocks, p, static_cast<hopper::Stream>(call.stream));
}

// Batch rows with a tangent, then those without.
template <class T, int D>
void launch_both(const ForwardCall& call) {
  const int dual = int(call.q_dot.batches);
  launch_kernel<ForwardKernel<T, D, true>>(call, 0, dual);
  launch_kernel<ForwardKernel<T, D, false>>(call, dual, int(call.q.batches) - dual);
}

template <int D>
void launch_forward(const ForwardCall& call) {
  hopper::set_device(call.device);
  if (call.element == hopper::Element::BFLOAT16) {
    launch_both<hopper::BFloat16, D>(call);
  } else {
    launch_both<hopper::Float16, D>(call);
  }
}

template <int D>
TileSizes tile_of(bool dual) {
  const auto describe = [](auto kernel) {
    using Kernel = decltype(kernel);
    return TileSizes{Kernel::BLOCK_M, Kernel::BLOCK_N, Kernel::STAGES, Kernel::THREADS, Kernel::SHARED_BYTES};
  };
  return dual ? describe(ForwardKernel<hopper::BFloat16, D, true>{})
              : describe(ForwardKernel<hopper::BFloat16, D, false>{});
}

}  // namespace mfkernels::attention

#define MF_INSTANTIATE_FORWARD(D)                                          \
  template void mfkernels::attention::launch_forward<D>(const ForwardCall&); \
  template mfkernels::attention::TileSizes mfkernels::attention::tile_of<D>(bool);
