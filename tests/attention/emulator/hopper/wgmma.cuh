#pragma once

#include <string>

#include "hopper/thread.cuh"

namespace mfkernels::hopper {

inline void wgmma_fence() { emulator::machine().fence(); }
inline void wgmma_commit() { emulator::machine().commit(); }

template <class X, int N>
void hold(X (&)[N]) {}

template <int PENDING, class... Accumulators>
void wgmma_wait(Accumulators&...) {
  emulator::machine().wait_products(PENDING);
}

// A matrix in shared memory as its descriptor says (PTX ISA, "Strides" and "Canonical layouts"); offsets in bytes.
struct DescribedMatrix {
  uint32_t start, leading, stride, width;

  explicit DescribedMatrix(MatrixDescriptor halves) : DescribedMatrix(uint64_t(halves.high) << 32 | halves.low) {}
  explicit DescribedMatrix(uint64_t descriptor)
      : start(uint32_t(descriptor & 0x3FFF) << 4),
        leading(uint32_t(descriptor >> 16 & 0x3FFF) << 4),
        stride(uint32_t(descriptor >> 32 & 0x3FFF) << 4) {
    static constexpr uint32_t WIDTHS[] = {0, 128, 64, 32};
    width = WIDTHS[descriptor >> 62];
    emulator::machine().require(width != 0, "a descriptor without a swizzle");
  }

  uint16_t at(uint32_t offset) const {
    const uint32_t linear = start + offset;
    const uint32_t address = linear ^ (linear >> 7 & (width / 16 - 1)) << 4;
    emulator::Machine& machine = emulator::machine();
    machine.require(address + 2 <= machine.shared.size(), "a product reads past shared memory");
    uint16_t bits;
    std::memcpy(&bits, &machine.shared[address], 2);
    return bits;
  }
  // element k of row r, elements of a row adjacent
  uint16_t along(int r, int k) const { return at(r / 8 * stride + r % 8 * width + 2 * k); }
  // element n of inner row k: blocks as wide as the swizzle, `leading` apart; groups of eight rows, `stride` apart
  uint16_t across(int k, int n) const {
    const int block = int(width) / 2;
    return at(n / block * leading + k / 8 * stride + k % 8 * width + n % block * 2);
  }
};

template <class T, int N>
struct Wgmma {
  static void rows(float (&d)[N / 2], MatrixDescriptor a, MatrixDescriptor b, bool accumulate) {
    issue("rows " + named(a), b, d, nullptr, accumulate, [a, b](const emulator::Product& product) {
      const DescribedMatrix left(a), right(b);
      static float A[64][16], B[16][N];
      for (int r = 0; r < 64; ++r)
        for (int k = 0; k < 16; ++k) A[r][k] = from_bits(T{}, left.along(r, k));
      for (int n = 0; n < N; ++n)
        for (int k = 0; k < 16; ++k) B[k][n] = from_bits(T{}, right.along(n, k));
      multiply(product, A, B);
    });
  }

  static void columns(float (&d)[N / 2], const uint32_t* a, MatrixDescriptor b) {
    issue("columns", b, d, a, true, [b](const emulator::Product& product) {
      const DescribedMatrix right(b);
      static float A[64][16], B[16][N];
      for (int thread = 0; thread < 128; ++thread) {
        const int warp = thread / 32, quad = thread % 32 / 4, lane = thread % 4;
        for (int i = 0; i < 8; ++i) {  // PTX ISA: register fragment of A of .m64k16
          const int row = 16 * warp + quad + (i / 2 % 2 ? 8 : 0);
          const int column = 2 * lane + i % 2 + (i >= 4 ? 8 : 0);
          A[row][column] = from_bits(T{}, uint16_t(product.a[thread][i / 2] >> 16 * (i % 2)));
        }
      }
      for (int n = 0; n < N; ++n)
        for (int k = 0; k < 16; ++k) B[k][n] = from_bits(T{}, right.across(k, n));
      multiply(product, A, B);
    });
  }

 private:
  static std::string named(MatrixDescriptor x) { return std::to_string(x.low) + '/' + std::to_string(x.high); }

  template <class Run>
  static void issue(const std::string& kind, MatrixDescriptor b, float (&d)[N / 2], const uint32_t* a,
                    bool accumulate, Run run) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256);
    const std::string shape = kind + ' ' + named(b) + ' ' + std::to_string(N) + (accumulate ? "+" : "");
    emulator::machine().product(shape, d, N / 2, a, accumulate, run);
  }

  static void multiply(const emulator::Product& product, const float (&A)[64][16], const float (&B)[16][N]) {
    static float D[64][N];
    for (int r = 0; r < 64; ++r) {
      for (int n = 0; n < N; ++n) D[r][n] = 0;
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < N; ++n) D[r][n] += A[r][k] * B[k][n];
    }
    for (int thread = 0; thread < 128; ++thread) {
      const int warp = thread / 32, quad = thread % 32 / 4, lane = thread % 4;
      for (int i = 0; i < N / 2; ++i) {  // PTX ISA: register fragment of D
        product.d[thread][i] += D[16 * warp + quad + (i % 4 >= 2 ? 8 : 0)][i / 4 * 8 + 2 * lane + i % 2];
      }
    }
  }
};

}  // namespace mfkernels::hopper
