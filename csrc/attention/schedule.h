#pragma once
// Which block of queries and which tiles of keys a thread block works on. Plain arithmetic, shared by the producer, the
// consumers and the tests.

#include "hopper/layout.h"

namespace mfkernels::attention {

using hopper::ceil_div;

struct Shape {
  int batches, N_q, N_kv, H, H_kv;
  bool causal;
};

// One block of BLOCK_M queries of one head.
struct Work {
  int block_m, head, batch;
};

template <int BLOCK_M>
MF_HOST_DEVICE constexpr int64_t works(const Shape& shape) {
  return int64_t(ceil_div(shape.N_q, BLOCK_M)) * shape.H * shape.batches;
}

// Neighbours share keys. Under the causal mask the longest come first, so that no long one is left for the end.
template <int BLOCK_M>
MF_HOST_DEVICE constexpr Work work_at(int index, const Shape& shape) {
  const int blocks_m = ceil_div(shape.N_q, BLOCK_M);
  if (shape.causal) {
    const int heads = shape.H * shape.batches;
    const int head = index % heads;
    return {blocks_m - 1 - index / heads, head % shape.H, head / shape.H};
  }
  const int head = index / blocks_m;
  return {index % blocks_m, head % shape.H, head / shape.H};
}

// Keys that query `row` sees; rows past the last one count as if they were there.
MF_HOST_DEVICE constexpr int visible_keys(int row, const Shape& shape) {
  const int limit = shape.causal ? row + 1 : shape.N_kv;
  return limit < shape.N_kv ? limit : shape.N_kv;
}

// Tiles that at least one row of the block sees: at least one, since key 0 is visible to every query.
template <int BLOCK_M, int BLOCK_N>
MF_HOST_DEVICE constexpr int key_tiles(int block_m, const Shape& shape) {
  return ceil_div(visible_keys((block_m + 1) * BLOCK_M - 1, shape), BLOCK_N);
}

// Leading tiles that every row from `first_row` on sees whole: they need no mask.
template <int BLOCK_N>
MF_HOST_DEVICE constexpr int whole_tiles(int first_row, const Shape& shape) {
  return visible_keys(first_row, shape) / BLOCK_N;
}

}  // namespace mfkernels::attention
