// The parts of the attention kernel on a GPU, one at a time: where the whole kernel is wrong or hangs, this says why.
//
//   tma      tiles of queries, keys and values lie in shared memory where hopper/layout.h says, zeros where there are
//            no keys
//   rows     S = Q K^T, both operands read from shared memory along their rows
//   columns  O = S V, S in registers as 16 bits, V read across its rows (V holds the keys' numbers, in its own layout)
//
// python bench/attention/bringup.py compiles and runs it, on a GPU or in the emulator. One line a dtype, head dim and
// kernel (primal, dual): the parts in order, each printed when it has run, so that the last word names what hangs.
//
// Q and K are integers from -2 to 2. Then S is exact in 16 bits and O in 32, and everything is compared for equality.
//
// Argument: the first case to run. Exit code: 0; 1 if something is wrong; 2 without a GPU of compute capability 9.0;
// 100 + the next case after an error that ends the process's use of the GPU.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "attention/forward_launch.cuh"

#if !defined(MF_HEAD_DIMS)
#define MF_HEAD_DIMS 64, 72, 80, 96, 128
#endif

using namespace mfkernels;
using namespace mfkernels::hopper;

enum Part { TMA, ROWS, COLUMNS };

// ------------------------------------------------------------------------------------------------- CUDA, the emulator

#if defined(__CUDACC__)

DEVICE uint32_t shared_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

// Fills shared memory with NaN before the copy engine writes there.
DEVICE void poison(uint32_t address) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(~0u) : "memory"); }
DEVICE void poisoned() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A copy of a vector in the GPU's memory.
template <class X>
class OnDevice {
 public:
  explicit OnDevice(std::vector<X>& host) : host_(host) {
    check(cudaMalloc(&data_, host.size() * sizeof(X)));
    check(cudaMemcpy(data_, host.data(), host.size() * sizeof(X), cudaMemcpyHostToDevice));
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { cudaFree(data_); }
  X* data() const { return static_cast<X*>(data_); }
  // Waits for the kernel, and throws its errors.
  void fetch() { check(cudaMemcpy(host_.data(), data_, host_.size() * sizeof(X), cudaMemcpyDeviceToHost)); }

 private:
  std::vector<X>& host_;
  void* data_ = nullptr;
};

static bool device_is_usable() { return cudaDeviceSynchronize() == cudaSuccess; }

static bool describe_device() {
  cudaDeviceProp device;
  const cudaError_t error = cudaGetDeviceProperties(&device, 0);
  if (error != cudaSuccess) {
    std::printf("no CUDA device: %s\n", cudaGetErrorString(error));
    return false;
  }
  std::printf("%s, compute capability %d.%d\n", device.name, device.major, device.minor);
  return device.major == 9 && device.minor == 0;
}

#else

DEVICE uint32_t shared_word(uint32_t address) {
  uint32_t word;
  std::memcpy(&word, &emulator::machine().shared[address], 4);
  return word;
}
DEVICE void poison(uint32_t) {}  // it does so itself
DEVICE void poisoned() {}

template <class X>
class OnDevice {
 public:
  explicit OnDevice(std::vector<X>& host) : host_(host) {}
  X* data() const { return host_.data(); }
  void fetch() {}

 private:
  std::vector<X>& host_;
};

static bool device_is_usable() { return true; }

static bool describe_device() {
  std::printf("the emulator of tests/attention/emulator\n");
  return true;
}

#endif

// --------------------------------------------------------------------------------------------------------- the kernel

// Not the first of anything: coordinates in the wrong order show.
constexpr int BATCHES = 3, BATCH = 2, HEADS = 2, HEAD = 1, FIRST_ROW = 16;

template <class K>
struct Parts {
  using QueryTile = typename K::QueryTile;
  using KeyTile = typename K::KeyTile;
  using ValueTile = typename K::ValueTile;
  struct Parameters {
    attention::Maps q, k;
    TensorMap v;
    uint32_t* memory;  // the tiles, as they lie in shared memory
    float* s;          // [BLOCK_M, BLOCK_N]
    float* o;          // [BLOCK_M, D]
    int last;          // part
  };
  static constexpr int THREADS = K::CONSUMERS * K::WARPGROUP;
  static constexpr uint32_t QUERIES = K::CONSUMERS * QueryTile::BYTES;  // a tile a warpgroup
  static constexpr uint32_t TILES = QUERIES + KeyTile::BYTES + ValueTile::BYTES;
  static constexpr int SHARED_BYTES = int(TILES) + 8 + SWIZZLE_ALIGNMENT;

  static DEVICE void block(const Parameters& p) {
    const uint32_t q = round_up(dynamic_shared(), uint32_t(SWIZZLE_ALIGNMENT));
    const uint32_t k = q + QUERIES, v = k + KeyTile::BYTES, barrier = q + TILES;
    for (uint32_t i = 4 * thread_index(); i < TILES; i += 4 * THREADS) poison(q + i);
    poisoned();
    if (thread_index() == 0) {
      mbarrier_init(barrier, 1);
      mbarrier_init_fence();
    }
    block_sync();
    if (thread_index() == 0) {
      constexpr uint32_t QUERY_BYTES = K::CONSUMERS * QueryTile::LOADED_BYTES;
      mbarrier_expect(barrier, QUERY_BYTES + KeyTile::LOADED_BYTES + ValueTile::LOADED_BYTES);
      for (int group = 0; group < K::CONSUMERS; ++group) {
        K::template load<QueryTile>(q + group * QueryTile::BYTES, p.q, barrier, HEAD, FIRST_ROW + group * K::ROWS,
                                    BATCH);
      }
      K::template load<KeyTile>(k, p.k, barrier, HEAD, FIRST_ROW, BATCH);
      K::template load<ValueTile>(v, p.v, barrier, HEAD, FIRST_ROW, BATCH);
    }
    mbarrier_wait(barrier, 0);
    for (uint32_t i = thread_index(); i < TILES / 4; i += THREADS) p.memory[i] = shared_word(q + 4 * i);
    if (p.last == TMA) return;

    const int thread = thread_index() % K::WARPGROUP;
    const int warpgroup = uniform(thread_index() / K::WARPGROUP);
    const int first_row = warpgroup * K::ROWS;
    typename K::Scores s;
    wgmma_fence();
    K::score(s, q + warpgroup * QueryTile::BYTES, k, false);
    wgmma_commit();
    wgmma_wait<0>(s);
#pragma unroll
    for (int i = 0; i < K::BLOCK_N / 2; ++i) {
      const Place at = accumulator_place(thread, i);
      p.s[(first_row + at.row) * K::BLOCK_N + at.column] = s[i];
    }
    if (p.last == ROWS) return;

    typename K::Probabilities packed;
    K::pack_scores(packed, s);
    typename K::Accumulator o = {};
    hold(o);  // zeros in registers before the fence, not after it (C7519)
    hold(packed);
    wgmma_fence();
    K::weigh(o, packed, v);
    wgmma_commit();
    wgmma_wait<0>(o);
#pragma unroll
    for (int i = 0; i < K::Columns::PADDED / 2; ++i) {
      const Place at = accumulator_place(thread, i);
      if (at.column < K::D) p.o[(first_row + at.row) * K::D + at.column] = o[i];
    }
  }
};

// -------------------------------------------------------------------------------------------------------- comparisons

// How many elements differ, and the first three of them.
class Comparison {
 public:
  void element(const char* where, int row, int column, double got, double expected) {
    ++total_;
    if (got == expected) return;
    if (wrong_++ >= 3) return;
    char text[128];
    std::snprintf(text, sizeof(text), "; %s %d, column %d: got %g, expected %g", where, row, column, got, expected);
    first_ += text;
  }
  bool good() const { return wrong_ == 0 && total_ > 0; }
  std::string text() const {
    if (good()) return "ok";
    return "FAIL (" + std::to_string(wrong_) + " of " + std::to_string(total_) + " wrong" + first_ + ")";
  }

 private:
  int wrong_ = 0, total_ = 0;
  std::string first_;
};

// ------------------------------------------------------------------------------------------------------------- a case

// [BATCHES, FIRST_ROW + rows, HEADS, D], of which a part is looked at: `rows` rows of one head.
struct Input {
  int rows, columns;
  std::vector<uint16_t> bits;

  Input(int rows, int columns)
      : rows(rows), columns(columns), bits(size_t(BATCHES) * (FIRST_ROW + rows) * HEADS * columns, 0xFFFF) {}

  uint16_t& at(int row, int column) {
    return bits[((size_t(BATCH) * (FIRST_ROW + rows) + FIRST_ROW + row) * HEADS + HEAD) * columns + column];
  }
  template <class F>
  void fill(F f) {  // f(number of the element)
    for (int row = 0; row < rows; ++row) {
      for (int column = 0; column < columns; ++column) at(row, column) = f(row * columns + column);
    }
  }
  Operand operand(const uint16_t* data) const {
    const int64_t row_stride = int64_t(HEADS) * columns, all_rows = FIRST_ROW + rows;
    return {data, BATCHES, all_rows, HEADS, columns, all_rows * row_stride, row_stride, columns};
  }
};

template <class T>
uint16_t bits_of(int x) {  // from -2 to 2
  constexpr uint16_t ONE = std::is_same_v<T, BFloat16> ? 0x3F80 : 0x3C00, TWO = 0x4000;
  const uint16_t magnitude = x == 0 ? 0 : std::abs(x) == 1 ? ONE : TWO;
  return x < 0 ? 0x8000 | magnitude : magnitude;
}

template <class T>
double value_of(uint16_t bits) {
  for (int x = -2; x <= 2; ++x) {
    if (bits_of<T>(x) == bits) return x;
  }
  return NAN;
}

template <class T, int D, bool DUAL>
class Case {
  using K = attention::ForwardKernel<T, D, DUAL>;
  using QueryTile = typename K::QueryTile;
  using KeyTile = typename K::KeyTile;
  using ValueTile = typename K::ValueTile;
  static constexpr int M = K::BLOCK_M, N = K::BLOCK_N, KEYS = N - 5;  // the last five keys are missing

 public:
  static bool run() {
    std::printf("%s d=%-3d %-6s keys=%-3d", std::is_same_v<T, BFloat16> ? "bfloat16" : "float16 ", D,
                DUAL ? "dual" : "primal", N);
    Case parts;
    bool good = true;
    static constexpr const char* NAMES[] = {"tma", "rows", "columns"};
    for (int part = TMA; part <= COLUMNS; ++part) {
      std::printf("  %s ", NAMES[part]);
      std::fflush(stdout);
      Comparison comparison;
      try {
        parts.launch_until(Part(part));
        comparison = part == TMA ? parts.compare_memory() : part == ROWS ? parts.compare_s() : parts.compare_o();
      } catch (const std::exception& error) {
        std::printf("FAIL (%s)\n", error.what());
        return false;
      }
      std::printf("%s", comparison.text().c_str());
      good = good && comparison.good();
    }
    std::printf("\n");
    return good;
  }

 private:
  Input q_{M, D}, k_{KEYS, D};
  std::vector<uint32_t> memory_ = std::vector<uint32_t>(Parts<K>::TILES / 4);
  std::vector<float> s_ = std::vector<float>(M * N), o_ = std::vector<float>(M * D);

  void launch_until(Part last) {
    if (last == TMA) {  // every element another number
      q_.fill([](int i) { return uint16_t(i + 1); });
      k_.fill([](int i) { return uint16_t(0x4000 + i + 1); });
    } else {
      std::mt19937 random(1);
      q_.fill([&](int) { return bits_of<T>(int(random() % 5) - 2); });
      k_.fill([&](int) { return bits_of<T>(int(random() % 5) - 2); });
    }
    s_.assign(s_.size(), NAN);
    o_.assign(o_.size(), NAN);
    OnDevice<uint16_t> q(q_.bits), k(k_.bits);
    OnDevice<uint32_t> memory(memory_);
    OnDevice<float> s(s_), o(o_);
    const Element element = std::is_same_v<T, BFloat16> ? Element::BFLOAT16 : Element::FLOAT16;
    launch<Parts<K>>(1,
                     {attention::maps_of<QueryTile>(q_.operand(q.data()), element, K::ROWS),
                      attention::maps_of<KeyTile>(k_.operand(k.data()), element, N),
                      tensor_map(k_.operand(k.data()), element, N, ValueTile::WIDTH), memory.data(), s.data(), o.data(),
                      last},
                     nullptr);
    memory.fetch();
    s.fetch();
    o.fetch();
  }

  // Where element (row, column) of a tile lies.
  template <class Tile>
  static uint32_t place_along(uint32_t tile, int row, int column) {
    using Columns = typename Tile::Columns;
    const int tail = column - Columns::MAIN;
    return tail < 0 ? swizzled(tile + column / 64 * Tile::BLOCK_BYTES + row * 128 + column % 64 * ELEMENT_BYTES,
                               Swizzle::BYTES_128)
                    : swizzled(tile + Tile::TAIL_OFFSET + row * Columns::TAIL_BYTES + tail * ELEMENT_BYTES,
                               Columns::TAIL_SWIZZLE);
  }
  static uint32_t place_across(uint32_t tile, int row, int column) {
    return swizzled(tile + column / ValueTile::WIDTH * ValueTile::BLOCK_BYTES + row * ValueTile::ROW_BYTES +
                        column % ValueTile::WIDTH * ELEMENT_BYTES,
                    ValueTile::SWIZZLE);
  }

  using PlaceOf = uint32_t (*)(uint32_t, int, int);
  void compare_tile(Comparison& comparison, const char* name, Input& input, int first_row, int rows, uint32_t tile,
                    PlaceOf place) {
    const auto* elements = reinterpret_cast<const uint16_t*>(memory_.data());
    for (int i = 0; i < rows; ++i) {
      for (int column = 0; column < K::Columns::PADDED; ++column) {
        const int row = first_row + i;
        const int expected = row < input.rows && column < D ? input.at(row, column) : 0;
        comparison.element(name, row, column, elements[place(tile, i, column) / ELEMENT_BYTES], expected);
      }
    }
  }

  Comparison compare_memory() {
    constexpr uint32_t KEYS_AT = Parts<K>::QUERIES;
    Comparison comparison;
    for (int group = 0; group < K::CONSUMERS; ++group) {
      compare_tile(comparison, "query", q_, group * K::ROWS, K::ROWS, group * QueryTile::BYTES, place_along<QueryTile>);
    }
    compare_tile(comparison, "key", k_, 0, N, KEYS_AT, place_along<KeyTile>);
    compare_tile(comparison, "value", k_, 0, N, KEYS_AT + KeyTile::BYTES, place_across);
    return comparison;
  }

  double key(int row, int column) { return row < KEYS ? value_of<T>(k_.at(row, column)) : 0; }

  Comparison compare_s() {
    Comparison comparison;
    for (int row = 0; row < M; ++row) {
      for (int j = 0; j < N; ++j) {
        double expected = 0;
        for (int column = 0; column < D; ++column) expected += value_of<T>(q_.at(row, column)) * key(j, column);
        comparison.element("query", row, j, s_[row * N + j], expected);
      }
    }
    return comparison;
  }

  // From S as it came out, which is an integer that 16 bits hold if it is right.
  Comparison compare_o() {
    Comparison comparison;
    for (int row = 0; row < M; ++row) {
      for (int column = 0; column < D; ++column) {
        double expected = 0;
        for (int j = 0; j < N; ++j) expected += double(s_[row * N + j]) * key(j, column);
        comparison.element("query", row, column, o_[row * D + column], expected);
      }
    }
    return comparison;
  }
};

template <class T, int... D>
void add(std::vector<bool (*)()>& cases) {
  ((cases.push_back(Case<T, D, false>::run), cases.push_back(Case<T, D, true>::run)), ...);
}

int main(int argc, char** argv) {
  const size_t first = argc > 1 ? size_t(std::atoi(argv[1])) : 0;
  if (first == 0 && !describe_device()) {
    std::printf("expected a GPU of compute capability 9.0 (Hopper: H100, H200)\n");
    return 2;
  }
  std::vector<bool (*)()> cases;
  add<BFloat16, MF_HEAD_DIMS>(cases);
  add<Float16, MF_HEAD_DIMS>(cases);
  bool good = true;
  for (size_t i = first; i < cases.size(); ++i) {
    good = cases[i]() && good;
    if (!device_is_usable()) return 100 + int(i) + 1;
  }
  return good ? 0 : 1;
}
