#pragma once
// One thread block of a Hopper GPU, on one thread of the host: every CUDA thread is a coroutine, and the parts of the
// chip that work on their own (the copy engine, the tensor cores) do so as late as the rules allow, or as early.
//
// It is written from the PTX ISA and shares no arithmetic with csrc/: a kernel that runs here uses its barriers,
// layouts and registers as the ISA says. Whatever is not yet there is NaN: a buffer from the moment a copy into it is
// issued, an accumulator from the moment a product is issued, until the wait that makes it readable.

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

constexpr int WARP = 32, WARPGROUP = 128;
constexpr uint32_t SHARED_BASE = 1024 + 16;  // not aligned: a kernel has to align it itself
constexpr size_t STACK_BYTES = 96 * 1024;

// What a run may differ in without the result's changing.
struct Options {
  bool eager_copies = false;    // copies complete at once, else as late as possible and out of order
  bool eager_products = false;  // products run when all threads have issued them, else at the wait
  int multiprocessors = 3;
  unsigned seed = 0;
};

inline Options options;

struct Barrier {
  uint32_t arrivals = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
};

struct Product {
  int rows = 0;  // of accumulators of a thread
  std::function<void(const Product&)> run;
  std::vector<float*> d = std::vector<float*>(WARPGROUP, nullptr);
  std::vector<const uint32_t*> a = std::vector<const uint32_t*>(WARPGROUP, nullptr);
  std::string shape;
  int issued = 0;
  bool done = false;
};

class Machine {
 public:
  Machine(int threads, int block, int blocks, int shared_bytes)
      : block(block), blocks(blocks), shared(SHARED_BASE + shared_bytes, 0xFF), threads_(threads),
        warps_((threads + WARP - 1) / WARP), warpgroups_((threads + WARPGROUP - 1) / WARPGROUP),
        random_(options.seed) {}

  void run(const std::function<void()>& body) {
    current_machine = this;
    body_ = &body;
    for (size_t i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[i];
      thread.stack.reset(new char[STACK_BYTES]);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = STACK_BYTES;
      thread.context.uc_link = &scheduler_;
      makecontext(&thread.context, reinterpret_cast<void (*)()>(&Machine::enter), 0);
    }
    for (size_t alive = threads_.size(); alive > 0;) {
      bool progress = false;
      alive = 0;
      const size_t first = random_() % threads_.size();
      for (size_t n = 0; n < threads_.size(); ++n) {
        current_ = int((first + n) % threads_.size());
        Thread& thread = threads_[current_];
        if (thread.done) continue;
        ++alive;
        if (thread.ready && !thread.ready()) continue;
        thread.ready = nullptr;
        progress = true;
        swapcontext(&scheduler_, &thread.context);
        if (!failure_.empty()) throw std::runtime_error("emulator: " + failure_);
      }
      if (!copies_.empty() && (options.eager_copies || !progress || random_() % 16 == 0)) {
        finish_a_copy();
        progress = true;
      }
      if (alive > 0 && !progress) throw std::runtime_error("emulator: deadlock; " + state());
    }
    if (!copies_.empty()) fail_now("the block ended before its copies did");
    for (const Warpgroup& warpgroup : warpgroups_) {
      for (const auto& product : warpgroup.products) {
        if (!product->done) fail_now("the block ended before its products did");
      }
    }
  }

  int thread() const { return current_; }

  // Ends the present thread's turn until `ready`.
  void wait_until(std::function<bool()> ready) {
    if (ready()) return;
    Thread& thread = threads_[current_];
    thread.ready = std::move(ready);
    swapcontext(&thread.context, &scheduler_);
  }

  [[noreturn]] void fail(const std::string& what) {
    failure_ = "thread " + std::to_string(current_) + ": " + what;
    for (;;) swapcontext(&threads_[current_].context, &scheduler_);
  }

  void require(bool holds, const char* what) {
    if (!holds) fail(what);
  }

  // ---------------------------------------------------------------------------------------- threads among each other

  uint32_t exchange(uint32_t mine, int partner_mask) {
    Warp& warp = warps_[current_ / WARP];
    const int lane = current_ % WARP;
    const int round = warp.rounds[lane]++;
    warp.values[round % 2][lane] = mine;
    ++warp.count[round % 2];
    if (warp.count[round % 2] == WARP) {
      warp.complete = round + 1;
      warp.count[(round + 1) % 2] = 0;
    }
    wait_until([&warp, round] { return warp.complete > round; });
    return warp.values[round % 2][lane ^ partner_mask];
  }

  uint32_t first_lane(uint32_t mine) {
    const uint32_t lane_bits = exchange(mine, current_ % WARP);
    return lane_bits;
  }

  void block_sync() {
    const int round = sync_rounds_[current_]++;
    if (++sync_count_ == int(threads_.size())) {
      sync_count_ = 0;
      ++sync_complete_;
    }
    wait_until([this, round] { return sync_complete_ > round; });
  }

  // -------------------------------------------------------------------------------------------------------- barriers

  void barrier_init(uint32_t address, uint32_t arrivals) {
    require(address % 8 == 0 && address >= SHARED_BASE && address + 8 <= shared.size(), "a barrier out of place");
    barriers_[address] = {arrivals, arrivals, 0, 0};
  }

  void arrive(uint32_t address, int64_t bytes) {
    Barrier& barrier = find(address);
    require(barrier.pending > 0, "more arrivals at a barrier than it was made for");
    --barrier.pending;
    barrier.bytes += bytes;
    advance(barrier);
  }

  void barrier_wait(uint32_t address, uint32_t parity) {
    Barrier& barrier = find(address);
    require(parity <= 1, "a parity that is neither 0 nor 1");
    wait_until([&barrier, parity] { return (barrier.phase & 1) != parity; });
  }

  // ------------------------------------------------------------------------------------------------- the copy engine

  struct Copy {
    uint32_t destination, bytes, barrier;
    std::function<void()> run;
  };

  void copy(Copy copy) {
    require(copy.destination >= SHARED_BASE && copy.destination + copy.bytes <= shared.size(), "a copy out of bounds");
    std::memset(&shared[copy.destination], 0xFF, copy.bytes);  // from now on nobody may rely on what was there
    copies_.push_back(std::move(copy));
    if (options.eager_copies) finish_a_copy();
  }

  // ------------------------------------------------------------------------------------------------ the tensor cores

  void product(const std::string& shape, float* d, int count, const uint32_t* a, bool accumulate,
               std::function<void(const Product&)> run) {
    const int lane = current_ % WARPGROUP;
    Warpgroup& group = warpgroups_[current_ / WARPGROUP];
    require(group.fenced[lane], "a product without a fence before it");
    const size_t index = group.issued[lane]++;
    if (index == group.products.size()) {
      group.products.push_back(std::make_unique<Product>());
      group.products[index]->shape = shape;
      group.products[index]->rows = count;
      group.products[index]->run = std::move(run);
    }
    Product& product = *group.products[index];
    require(product.shape == shape, "threads of a warpgroup issue different products");
    product.d[lane] = d;
    product.a[lane] = a;
    auto& saved = group.saved[lane];
    if (!saved.count(d)) {
      saved[d] = accumulate ? std::vector<float>(d, d + count) : std::vector<float>(count, 0.f);
      std::fill(d, d + count, __builtin_nanf(""));
    } else if (!accumulate) {
      fail("two products in flight start the same accumulator");
    }
    ++product.issued;
    if (options.eager_products && product.issued == WARPGROUP) run_until(group, index + 1);
  }

  void commit() {
    Warpgroup& group = warpgroups_[current_ / WARPGROUP];
    group.committed[current_ % WARPGROUP].push_back(group.issued[current_ % WARPGROUP]);
  }

  void fence() { warpgroups_[current_ / WARPGROUP].fenced[current_ % WARPGROUP] = true; }

  void wait_products(int pending) {
    const int lane = current_ % WARPGROUP;
    Warpgroup& group = warpgroups_[current_ / WARPGROUP];
    group.fenced[lane] = false;
    auto& committed = group.committed[lane];
    if (int(committed.size()) <= pending) return;
    const size_t end = committed[committed.size() - 1 - pending];
    committed.erase(committed.begin(), committed.end() - pending);
    wait_until([&group, end] {
      return group.products.size() >= end && (end == 0 || group.products[end - 1]->issued == WARPGROUP);
    });
    run_until(group, end);
  }

  const int block, blocks;
  std::vector<uint8_t> shared;
  static inline Machine* current_machine = nullptr;

 private:
  struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    std::function<bool()> ready;
    bool done = false;
  };
  struct Warp {
    uint32_t values[2][WARP];
    int count[2] = {0, 0};
    int rounds[WARP] = {};
    int complete = 0;
  };
  struct Warpgroup {
    std::deque<std::unique_ptr<Product>> products;
    size_t issued[WARPGROUP] = {};
    bool fenced[WARPGROUP] = {};
    std::vector<size_t> committed[WARPGROUP];
    std::map<float*, std::vector<float>> saved[WARPGROUP];
    size_t finished = 0;
  };

  static void enter() {
    Machine& machine = *current_machine;
    (*machine.body_)();
    machine.threads_[machine.current_].done = true;
  }

  void run_until(Warpgroup& group, size_t end) {
    for (; group.finished < end; ++group.finished) {
      Product& product = *group.products[group.finished];
      for (int lane = 0; lane < WARPGROUP; ++lane) {
        auto saved = group.saved[lane].find(product.d[lane]);
        if (saved == group.saved[lane].end()) continue;
        std::copy(saved->second.begin(), saved->second.end(), product.d[lane]);
        group.saved[lane].erase(saved);
      }
      product.run(product);
      product.done = true;
    }
  }

  void finish_a_copy() {
    const size_t which = options.eager_copies ? 0 : random_() % copies_.size();
    Copy copy = std::move(copies_[which]);
    copies_.erase(copies_.begin() + which);
    copy.run();
    Barrier& barrier = find(copy.barrier);
    barrier.bytes -= copy.bytes;
    advance(barrier);
  }

  void advance(Barrier& barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
  }

  Barrier& find(uint32_t address) {
    const auto found = barriers_.find(address);
    if (found == barriers_.end()) fail("a barrier that was not initialised");
    return found->second;
  }

  void fail_now(const std::string& what) { throw std::runtime_error("emulator: " + what); }

  std::string state() const {
    std::string out = "waiting threads:";
    for (size_t i = 0; i < threads_.size(); ++i) {
      if (!threads_[i].done && i % WARP == 0) out += " " + std::to_string(i);
    }
    for (const auto& [address, barrier] : barriers_) {
      out += "; barrier " + std::to_string(address) + " phase " + std::to_string(barrier.phase) + " pending " +
             std::to_string(barrier.pending) + " bytes " + std::to_string(barrier.bytes);
    }
    return out;
  }

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Warpgroup> warpgroups_;
  std::map<uint32_t, Barrier> barriers_;
  std::deque<Copy> copies_;
  std::map<int, int> sync_rounds_;
  int sync_count_ = 0, sync_complete_ = 0;
  std::mt19937 random_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_;
  int current_ = 0;
  std::string failure_;
};

inline Machine& machine() { return *Machine::current_machine; }

}  // namespace emulator
