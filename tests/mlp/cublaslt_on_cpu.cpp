// The functions of cuBLASLt that csrc/mlp uses, on a CPU and as its documentation has them: columns are contiguous, and
// what the documentation forbids is an error. Products are in float32, in any order.

#include <cmath>
#include <cstring>
#include <map>
#include <vector>

#include "mlp/cublaslt.h"

using namespace mfkernels::cublaslt;

namespace mfkernels::cublaslt {
struct HandleOpaque {};
struct DescOpaque {
  std::map<int, uint64_t> values;
};
struct LayoutOpaque {
  int type;
  uint64_t rows, cols;
  int64_t ld;
};
struct PreferenceOpaque {
  std::map<int, uint64_t> values;
};
}  // namespace mfkernels::cublaslt

namespace {

constexpr Status SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15;
constexpr uint64_t WHICH = 0x5EED;  // in the algorithm that the heuristic gives
int calls = 0, heuristics = 0, alive = 0;

float load(int type, const void* data, int64_t i) {
  uint16_t bits;
  std::memcpy(&bits, static_cast<const uint16_t*>(data) + i, 2);
  if (type == CUDA_R_16BF) {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return sign * (fraction ? NAN : INFINITY);
  return sign * (exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24));
}

// To the nearest, ties to even.
void store(int type, void* data, int64_t i, float x) {
  uint16_t bits;
  if (type == CUDA_R_16BF) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    bits = uint16_t((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
  } else {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    int exponent;
    std::frexp(size, &exponent);
    const float step = std::ldexp(1.0f, std::max(exponent - 11, -24));
    const float rounded = std::nearbyint(size / step) * step;
    std::frexp(rounded, &exponent);
    if (rounded < std::ldexp(1.0f, -14)) {
      bits = sign | uint16_t(std::ldexp(rounded, 24));
    } else {
      bits = sign | uint16_t((exponent + 14) << 10 | (int(std::ldexp(rounded, 11 - exponent)) & 1023));
    }
  }
  std::memcpy(static_cast<uint16_t*>(data) + i, &bits, 2);
}

float gelu(float h, float* slope) {
  const float c = std::sqrt(2 / float(M_PI)), inner = c * (h + 0.044715f * h * h * h), t = std::tanh(inner);
  *slope = 0.5f * (1 + t) + 0.5f * h * (1 - t * t) * c * (1 + 3 * 0.044715f * h * h);
  return 0.5f * h * (1 + t);
}

size_t size_of(int attribute) {
  return attribute == DESC_TRANSA || attribute == DESC_EPILOGUE ? 4 : 8;
}

Status set(std::map<int, uint64_t>& values, int attribute, const void* buf, size_t bytes, size_t expected) {
  if (buf == nullptr || bytes != expected) return INVALID_VALUE;
  std::memcpy(&(values[attribute] = 0), buf, bytes);
  return SUCCESS;
}

bool divides(uint64_t n, const void* data) { return reinterpret_cast<uintptr_t>(data) % n == 0; }

// Whether the documentation allows the operation at all.
bool allowed(Desc desc, Layout a, Layout b, Layout c, Layout d) {
  auto& v = desc->values;
  const bool transposed = v[DESC_TRANSA] == OP_T;
  const uint64_t rows = transposed ? a->cols : a->rows, depth = transposed ? a->rows : a->cols;
  for (Layout layout : {a, b, c, d}) {
    if (layout->type != a->type || layout->ld < int64_t(layout->rows) || layout->ld % 8 != 0) return false;
  }
  const bool ending = v[DESC_EPILOGUE] == EPILOGUE_GELU_AUX_BIAS || v[DESC_EPILOGUE] == EPILOGUE_DGELU_BGRAD;
  const bool aux = v[DESC_EPILOGUE_AUX_LD] % 8 == 0 && v[DESC_EPILOGUE_AUX_LD] >= d->rows &&
                   v[DESC_EPILOGUE_AUX_POINTER] != 0 && v[DESC_EPILOGUE_AUX_POINTER] % 16 == 0;
  return b->rows == depth && d->rows == rows && d->cols == b->cols && c->rows == d->rows && c->cols == d->cols &&
         ending && aux && v[DESC_BIAS_POINTER] != 0;
}

}  // namespace

extern "C" {

// For the tests: how often there was a product and a choice of its kernel, and how many descriptors are alive.
void counts(int* out) {
  out[0] = calls;
  out[1] = heuristics;
  out[2] = alive;
}

Status cublasLtCreate(Handle* handle) {
  *handle = new HandleOpaque;
  return SUCCESS;
}

Status cublasLtMatmulDescCreate(Desc* desc, int compute_type, int scale_type) {
  if (compute_type != COMPUTE_32F || scale_type != CUDA_R_32F) return NOT_SUPPORTED;
  *desc = new DescOpaque;
  ++alive;
  return SUCCESS;
}

Status cublasLtMatmulDescDestroy(Desc desc) {
  delete desc;
  --alive;
  return SUCCESS;
}

Status cublasLtMatmulDescSetAttribute(Desc desc, int attribute, const void* buf, size_t bytes) {
  return set(desc->values, attribute, buf, bytes, size_of(attribute));
}

Status cublasLtMatrixLayoutCreate(Layout* layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  if (type != CUDA_R_16F && type != CUDA_R_16BF) return NOT_SUPPORTED;
  *layout = new LayoutOpaque{type, rows, cols, ld};
  ++alive;
  return SUCCESS;
}

Status cublasLtMatrixLayoutDestroy(Layout layout) {
  delete layout;
  --alive;
  return SUCCESS;
}

Status cublasLtMatmulPreferenceCreate(Preference* preference) {
  *preference = new PreferenceOpaque;
  ++alive;
  return SUCCESS;
}

Status cublasLtMatmulPreferenceDestroy(Preference preference) {
  delete preference;
  --alive;
  return SUCCESS;
}

Status cublasLtMatmulPreferenceSetAttribute(Preference preference, int attribute, const void* buf, size_t bytes) {
  return set(preference->values, attribute, buf, bytes, attribute == PREF_MAX_WORKSPACE_BYTES ? 8 : 4);
}

Status cublasLtMatmulAlgoGetHeuristic(Handle, Desc desc, Layout a, Layout b, Layout c, Layout d, Preference preference,
                                      int asked, HeuristicResult* results, int* found) {
  if (asked < 1 || !allowed(desc, a, b, c, d)) return INVALID_VALUE;
  ++heuristics;
  *found = d->cols == 13 ? 0 : 1;  // a size for which it has nothing
  results[0].algo.data[0] = WHICH;
  for (int i = 0; i < 4; ++i) {
    results[0].algo.data[1 + i] = preference->values.count(PREF_MIN_ALIGNMENT_A_BYTES + i)
                                      ? preference->values[PREF_MIN_ALIGNMENT_A_BYTES + i]
                                      : 256;
  }
  results[0].algo.data[5] = preference->values[PREF_MAX_WORKSPACE_BYTES];
  results[0].state = SUCCESS;
  return *found ? SUCCESS : NOT_SUPPORTED;
}

Status cublasLtMatmul(Handle, Desc desc, const void* alpha, const void* A, Layout a, const void* B, Layout b,
                      const void* beta, const void* C, Layout c, void* D, Layout d, const Algo* algo, void* workspace,
                      size_t workspace_bytes, void*) {
  if (!allowed(desc, a, b, c, d) || algo->data[0] != WHICH) return INVALID_VALUE;
  const void* operands[] = {A, B, C, D};
  for (int i = 0; i < 4; ++i) {
    if (!divides(algo->data[1 + i], operands[i])) return INVALID_VALUE;
  }
  if (workspace_bytes < algo->data[5] || workspace == nullptr) return INVALID_VALUE;
  float one, zero;
  std::memcpy(&one, alpha, 4);
  std::memcpy(&zero, beta, 4);
  if (one != 1 || zero != 0) return NOT_SUPPORTED;
  ++calls;
  auto& v = desc->values;
  void* aux = reinterpret_cast<void*>(v[DESC_EPILOGUE_AUX_POINTER]);
  void* bias = reinterpret_cast<void*>(v[DESC_BIAS_POINTER]);
  const int64_t aux_ld = int64_t(v[DESC_EPILOGUE_AUX_LD]);
  const bool forward = v[DESC_EPILOGUE] == EPILOGUE_GELU_AUX_BIAS;
  std::vector<float> sums(d->rows);
  for (uint64_t j = 0; j < d->cols; ++j) {
    for (uint64_t i = 0; i < d->rows; ++i) {
      float sum = 0;
      for (uint64_t k = 0; k < b->rows; ++k) {
        sum += load(a->type, A, v[DESC_TRANSA] == OP_T ? k + i * a->ld : i + k * a->ld) * load(a->type, B, k + j * b->ld);
      }
      float slope;
      if (forward) {
        sum += load(a->type, bias, i);
        store(a->type, aux, i + j * aux_ld, sum);
        store(a->type, D, i + j * d->ld, gelu(sum, &slope));
      } else {
        gelu(load(a->type, aux, i + j * aux_ld), &slope);
        store(a->type, D, i + j * d->ld, sum * slope);
        sums[i] += sum * slope;
      }
    }
  }
  for (uint64_t i = 0; !forward && i < d->rows; ++i) store(a->type, bias, i, sums[i]);
  return SUCCESS;
}
}
