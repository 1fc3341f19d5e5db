#pragma once
// The bulk tensor copy engine. PTX ISA: "cp.async.bulk.tensor".

#include "hopper/tensor_map.h"
#include "hopper/thread.cuh"

namespace mfkernels::hopper {

// Brings what the engine has to know of a tensor near it, before the first copy asks.
DEVICE void tma_prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// One box of a [batch, row, head, column] tensor into shared memory; what lies outside the tensor reads as zero, and
// counts among the bytes that reach the barrier.
DEVICE void tma_load(uint32_t destination, const TensorMap& map, uint32_t barrier, int column, int head, int row,
                     int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(destination), "l"(&map), "r"(barrier), "r"(column), "r"(head), "r"(row), "r"(batch)
      : "memory");
}

}  // namespace mfkernels::hopper
