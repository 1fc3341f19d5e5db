#include "attention/forward.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace mfkernels::attention {
namespace {

using hopper::Operand;

constexpr int64_t INT_LIMIT = std::numeric_limits<int>::max();

std::ostream& operator<<(std::ostream& out, const Operand& x) {
  return out << '(' << x.batches << ", " << x.rows << ", " << x.heads << ", " << x.columns << ')';
}

std::string described(const ForwardCall& call) {
  std::ostringstream out;
  out << "attention_forward of " << (call.element == hopper::Element::BFLOAT16 ? "bfloat16" : "float16") << " q "
      << call.q << ", k " << call.k << ", tangents of " << call.q_dot.batches << " batch rows"
      << (call.causal ? ", causal" : "");
  return out.str();
}

template <class... Words>
[[noreturn]] void refuse(const ForwardCall& call, const Words&... words) {
  std::ostringstream out;
  (out << ... << words);
  out << " [" << described(call) << ']';
  throw std::invalid_argument(out.str());
}

void check_shape(const ForwardCall& call, const char* name, const Operand& x, const Operand& expected) {
  if (x.batches != expected.batches || x.rows != expected.rows || x.heads != expected.heads ||
      x.columns != expected.columns) {
    refuse(call, name, ": expected shape ", expected, ", got ", x);
  }
}

// What the copy engine demands of a tensor.
void check_memory(const ForwardCall& call, const char* name, const Operand& x) {
  if (x.data == nullptr || reinterpret_cast<uintptr_t>(x.data) % 16 != 0) {
    refuse(call, name, ": expected data at an address that 16 divides, got ", x.data);
  }
  const auto check_stride = [&](const char* dimension, int64_t size, int64_t stride) {
    if (size > 1 && (stride <= 0 || stride % 8 != 0 || stride >= int64_t(1) << 39)) {
      refuse(call, name, ": expected a positive stride of the ", dimension,
             " that is a multiple of 8 elements, below 2^39, got ", stride);
    }
  };
  check_stride("batch", x.batches, x.batch_stride);
  check_stride("rows", x.rows, x.row_stride);
  check_stride("heads", x.heads, x.head_stride);
}

Operand first_batches(Operand x, int64_t batches) {
  x.batches = batches;
  return x;
}

void check(const ForwardCall& call) {
  const Operand &q = call.q, &k = call.k, &v = call.v;
  if (std::find(HEAD_DIMS.begin(), HEAD_DIMS.end(), q.columns) == HEAD_DIMS.end()) {
    refuse(call, "q: expected a head dim of 64, 72, 80, 96 or 128, got ", q.columns);
  }
  if (q.batches < 1 || q.rows < 1 || q.heads < 1) refuse(call, "q: expected at least one of everything, got ", q);
  if (k.rows < 1 || k.heads < 1 || q.heads % k.heads != 0) {
    refuse(call, "k: expected at least one key and heads that divide those of q, got ", k);
  }
  check_shape(call, "k", k, {nullptr, q.batches, k.rows, k.heads, q.columns});
  check_shape(call, "v", v, k);
  if (call.q_dot.batches < 0 || call.q_dot.batches > q.batches) {
    refuse(call, "q_dot: expected at most ", q.batches, " batch rows, got ", call.q_dot.batches);
  }
  if (std::max({q.batches, q.rows, k.rows, q.heads}) > INT_LIMIT / 256 ||
      q.batches * q.heads > INT_LIMIT / 2 / (q.rows / 128 + 1)) {
    refuse(call, "q, k: expected fewer rows");
  }
  check_memory(call, "q", q);
  check_memory(call, "k", k);
  check_memory(call, "v", v);
  const int64_t rows = call.q_dot.batches;
  if (rows > 0) {
    check_shape(call, "q_dot", call.q_dot, first_batches(q, rows));
    check_shape(call, "k_dot", call.k_dot, first_batches(k, rows));
    check_shape(call, "v_dot", call.v_dot, first_batches(v, rows));
    check_memory(call, "q_dot", call.q_dot);
    check_memory(call, "k_dot", call.k_dot);
    check_memory(call, "v_dot", call.v_dot);
  }
  if (reinterpret_cast<uintptr_t>(call.o) % 16 != 0 || call.o == nullptr) refuse(call, "o: expected aligned memory");
  if (rows > 0 && (reinterpret_cast<uintptr_t>(call.o_dot) % 16 != 0 || call.o_dot == nullptr)) {
    refuse(call, "o_dot: expected aligned memory");
  }
  if (call.lse == nullptr) refuse(call, "lse: expected memory");
  if (!(call.scale > 0) || !std::isfinite(call.scale)) {
    refuse(call, "scale: expected a positive finite number, got ", call.scale);
  }
}

}  // namespace

void forward(const ForwardCall& call) {
  check(call);
  try {
    switch (call.q.columns) {
      case 64: return launch_forward<64>(call);
      case 72: return launch_forward<72>(call);
      case 80: return launch_forward<80>(call);
      case 96: return launch_forward<96>(call);
      case 128: return launch_forward<128>(call);
    }
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(error.what()) + " [" + described(call) + ']');
  }
}

TileSizes forward_tile(int head_dim, bool dual) {
  switch (head_dim) {
    case 64: return tile_of<64>(dual);
    case 72: return tile_of<72>(dual);
    case 80: return tile_of<80>(dual);
    case 96: return tile_of<96>(dual);
    case 128: return tile_of<128>(dual);
  }
  throw std::invalid_argument("head_dim: expected 64, 72, 80, 96 or 128, got " + std::to_string(head_dim));
}

}  // namespace mfkernels::attention
