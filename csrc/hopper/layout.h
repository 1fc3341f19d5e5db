#pragma once
// Where a tile of 16-bit elements lies in shared memory: TMA writes it so, wgmma reads it so. Plain arithmetic, so that
// the tests compute it on the host.
// PTX ISA: "Swizzling modes" (tensors), "Shared memory matrix layout" and "Matrix descriptor" (wgmma).

#include <cstdint>

#if defined(__CUDACC__)
#define MF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MF_HOST_DEVICE inline
#endif

namespace mfkernels::hopper {

template <class Int>
MF_HOST_DEVICE constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

template <class Int>
MF_HOST_DEVICE constexpr Int round_up(Int a, Int b) {
  return ceil_div(a, b) * b;
}

constexpr int ELEMENT_BYTES = 2;
constexpr int SWIZZLE_ALIGNMENT = 1024;  // the widest pattern repeats every 8 rows of 128 bytes

// The values are those of a matrix descriptor's layout field.
enum class Swizzle : uint32_t { BYTES_128 = 1, BYTES_64 = 2, BYTES_32 = 3 };

// A block of columns is as wide as its swizzle: 64, 32 or 16 elements.
MF_HOST_DEVICE constexpr Swizzle swizzle_of(int columns) {
  return columns == 64 ? Swizzle::BYTES_128 : columns == 32 ? Swizzle::BYTES_64 : Swizzle::BYTES_32;
}

MF_HOST_DEVICE constexpr uint32_t swizzle_bytes(Swizzle swizzle) { return 256u >> uint32_t(swizzle); }

// The address that the swizzle puts in the place of `address`: 16-byte chunks trade places within 128 bytes, by the
// address's own bits 7 to 9.
MF_HOST_DEVICE constexpr uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  return address ^ ((address >> 3) & (swizzle_bytes(swizzle) - 16));
}

// One head's columns: `MAIN` of them in blocks of 64, and a narrower block for the rest, padded to the 16 that a matrix
// product takes in its inner dimension and that the narrowest swizzle is wide. TMA fills the padding with zeros.
template <int D>
struct HeadColumns {
  static constexpr int MAIN = D / 64 * 64;
  static constexpr int MAIN_BLOCKS = D / 64;
  static constexpr int TAIL = round_up(D - MAIN, 16);
  static constexpr int TAIL_BYTES = TAIL * ELEMENT_BYTES;
  static constexpr Swizzle TAIL_SWIZZLE = swizzle_of(TAIL);
  static constexpr int PADDED = MAIN + TAIL;
  static_assert(MAIN_BLOCKS >= 1 && D % 8 == 0 && (TAIL == 0 || TAIL == 16 || TAIL == 32));
};

// ROWS rows of a head for products along them: block after block of 64 columns, then the tail.
template <int ROWS, int D>
struct Tile : HeadColumns<D> {
  using Columns = HeadColumns<D>;
  static constexpr uint32_t BLOCK_BYTES = ROWS * 128;
  static constexpr uint32_t TAIL_OFFSET = Columns::MAIN_BLOCKS * BLOCK_BYTES;
  static constexpr uint32_t LOADED_BYTES = TAIL_OFFSET + ROWS * Columns::TAIL_BYTES;  // padding and missing rows too
  static constexpr uint32_t BYTES = round_up(LOADED_BYTES, uint32_t(SWIZZLE_ALIGNMENT));
  static_assert(ROWS % 8 == 0 && ROWS <= 256);  // whole swizzle patterns; a TMA box has at most 256 rows
};

// The same for a product across them, which takes all columns at once: so all blocks are as wide as the narrowest.
template <int ROWS, int D>
struct AcrossTile {
  using Columns = HeadColumns<D>;
  static constexpr int WIDTH = Columns::TAIL > 0 ? Columns::TAIL : 64;
  static constexpr int BLOCKS = Columns::PADDED / WIDTH;
  static constexpr Swizzle SWIZZLE = swizzle_of(WIDTH);
  static constexpr uint32_t ROW_BYTES = WIDTH * ELEMENT_BYTES;  // of a block
  static constexpr uint32_t BLOCK_BYTES = ROWS * ROW_BYTES;
  static constexpr uint32_t LOADED_BYTES = BLOCKS * BLOCK_BYTES;
  static constexpr uint32_t BYTES = round_up(LOADED_BYTES, uint32_t(SWIZZLE_ALIGNMENT));
  static_assert(Columns::PADDED % WIDTH == 0 && ROWS % 8 == 0 && ROWS <= 256);
};

// `stride`: bytes between groups of 8 rows (a product that reads along the rows), or of 8 rows of the inner dimension
// (one that reads across them). `leading`: bytes between blocks of columns, in the second case only.
struct MatrixDescriptor {
  uint32_t low, high;

  // Of the same matrix so many bytes further on. Nothing carries over: shared memory ends before 2^18 bytes.
  MF_HOST_DEVICE constexpr MatrixDescriptor operator+(uint32_t bytes) const { return {low + (bytes >> 4), high}; }
  MF_HOST_DEVICE constexpr uint64_t bits() const { return uint64_t(high) << 32 | low; }
};

MF_HOST_DEVICE constexpr MatrixDescriptor matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride,
                                                            Swizzle swizzle) {
  return {(address & 0x3FFFF) >> 4 | leading >> 4 << 16, stride >> 4 | uint32_t(swizzle) << 30};
}

MF_HOST_DEVICE constexpr MatrixDescriptor row_descriptor(uint32_t address, Swizzle swizzle) {
  return matrix_descriptor(address, 16, 8 * swizzle_bytes(swizzle), swizzle);
}

MF_HOST_DEVICE constexpr MatrixDescriptor column_descriptor(uint32_t address, uint32_t block_bytes, Swizzle swizzle) {
  return matrix_descriptor(address, block_bytes, 8 * swizzle_bytes(swizzle), swizzle);
}

// Element i of a thread's accumulators of a 64-row product: rows r and r + 8 of its warp's 16, pairs of columns.
struct Place {
  int row, column;
};

MF_HOST_DEVICE constexpr Place accumulator_place(int thread, int i) {
  return {thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + thread % 4 * 2 + i % 2};
}

}  // namespace mfkernels::hopper
