#include "mlp/gelu_product.h"

#include <dlfcn.h>

#include <array>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <tuple>

#include "mlp/cublaslt.h"

namespace mfkernels::mlp {
namespace {

using namespace cublaslt;

// --------------------------------------------------------------------------------------------------------- the library

struct Library {
#define MF_DECLARE(name, parameters) Status(*name) parameters;
  MF_CUBLASLT_FUNCTIONS(MF_DECLARE)
#undef MF_DECLARE

  explicit Library(const std::string& file) {
    void* found = dlopen(file.c_str(), RTLD_LAZY | RTLD_NOLOAD);  // PyTorch's own, whose version fits the driver
    if (found == nullptr) throw std::runtime_error("expected PyTorch to have loaded " + file + ", and it has not");
#define MF_FIND(name, parameters) name = reinterpret_cast<Status(*) parameters>(symbol(found, file, #name));
    MF_CUBLASLT_FUNCTIONS(MF_FIND)
#undef MF_FIND
  }

 private:
  static void* symbol(void* library, const std::string& file, const char* name) {
    void* found = dlsym(library, name);
    if (found == nullptr) throw std::runtime_error(file + " has no " + name);
    return found;
  }
};

// ------------------------------------------------------------------------------------------------------------- a product

std::string described(const GeluProduct& call) {
  std::ostringstream out;
  out << (call.ending == Ending::GELU ? "gelu_product of " : "derivative of a gelu_product of ")
      << (call.element == hopper::Element::BFLOAT16 ? "bfloat16" : "float16") << " M = " << call.M
      << ", N = " << call.N << ", K = " << call.K;
  return out.str();
}

void require(Status status, const char* what, const GeluProduct& call) {
  if (status == 0) return;
  std::ostringstream out;
  out << what << ": cuBLAS status " << status << " [" << described(call) << ']';
  throw std::runtime_error(out.str());
}

std::array<const void*, 6> operands(const GeluProduct& call) {
  return {call.x, call.weight, call.h, call.bias, call.out, call.workspace};
}

void check(const GeluProduct& call) {
  const auto refuse = [&](const char* words) { throw std::invalid_argument(words + (" [" + described(call) + ']')); };
  if (call.M < 1 || call.N < 1 || call.K < 1) refuse("x, weight: expected at least one of everything");
  if (call.N % 8 != 0 || call.K % 8 != 0) refuse("weight: expected sizes that are multiples of 8");
  for (const void* data : operands(call)) {
    if (data == nullptr || reinterpret_cast<uintptr_t>(data) % 16 != 0) {
      refuse("expected every tensor at an address that 16 divides");
    }
  }
}

// The largest power of two up to 256 that divides every address: kernels are chosen by it.
uint32_t alignment(const GeluProduct& call) {
  uintptr_t bits = 256;
  for (const void* data : operands(call)) bits |= reinterpret_cast<uintptr_t>(data);
  return static_cast<uint32_t>(bits & -bits);
}

// What is worked out once for a kind of product. cuBLASLt counts in columns, so it is given outᵀ = op(W) xᵀ.
class Plan {
 public:
  Plan(const Library& lt, Handle handle, const GeluProduct& call) : Plan(lt, handle) {
    const bool transposed = call.ending == Ending::GELU;
    const int type = call.element == hopper::Element::BFLOAT16 ? CUDA_R_16BF : CUDA_R_16F;
    require(lt.cublasLtMatmulDescCreate(&desc_, COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate", call);
    if (transposed) set(DESC_TRANSA, OP_T, call);
    set(DESC_EPILOGUE, transposed ? EPILOGUE_GELU_AUX_BIAS : EPILOGUE_DGELU_BGRAD, call);
    set(DESC_EPILOGUE_AUX_LD, call.N, call);
    set_pointers(call);
    const uint64_t M = call.M, N = call.N, K = call.K;
    create(&weight_, type, transposed ? K : N, transposed ? N : K, call);
    create(&x_, type, K, M, call);
    create(&out_, type, N, M, call);
    choose(call);
  }

  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  ~Plan() {
    for (Layout layout : {weight_, x_, out_}) {
      if (layout != nullptr) lt_.cublasLtMatrixLayoutDestroy(layout);
    }
    if (desc_ != nullptr) lt_.cublasLtMatmulDescDestroy(desc_);
  }

  void run(const GeluProduct& call) {
    const float one = 1, zero = 0;
    set_pointers(call);
    require(lt_.cublasLtMatmul(handle_, desc_, &one, call.weight, weight_, call.x, x_, &zero, call.out, out_, call.out,
                               out_, &algo_, call.workspace, call.workspace_bytes, call.stream),
            "cublasLtMatmul", call);
  }

 private:
  Plan(const Library& lt, Handle handle) : lt_(lt), handle_(handle) {}  // apart, so that ~Plan runs if the rest throws

  template <class Value>
  void set(int attribute, const Value& value, const GeluProduct& call) {
    require(lt_.cublasLtMatmulDescSetAttribute(desc_, attribute, &value, sizeof value),
            "cublasLtMatmulDescSetAttribute", call);
  }

  void set_pointers(const GeluProduct& call) {
    set(DESC_EPILOGUE_AUX_POINTER, call.h, call);
    set(DESC_BIAS_POINTER, call.bias, call);
  }

  void create(Layout* layout, int type, uint64_t rows, uint64_t cols, const GeluProduct& call) {
    require(lt_.cublasLtMatrixLayoutCreate(layout, type, rows, cols, static_cast<int64_t>(rows)),
            "cublasLtMatrixLayoutCreate", call);
  }

  void choose(const GeluProduct& call) {
    Preference preference;
    require(lt_.cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate", call);
    const uint64_t bytes = call.workspace_bytes;
    const uint32_t divides = alignment(call);
    Status status = lt_.cublasLtMatmulPreferenceSetAttribute(preference, PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
    for (int i = 0; i < 4 && status == 0; ++i) {
      status = lt_.cublasLtMatmulPreferenceSetAttribute(preference, PREF_MIN_ALIGNMENT_A_BYTES + i, &divides,
                                                        sizeof divides);
    }
    HeuristicResult result{};
    int found = 0;
    if (status == 0) {
      status = lt_.cublasLtMatmulAlgoGetHeuristic(handle_, desc_, weight_, x_, out_, out_, preference, 1, &result,
                                                  &found);
    }
    lt_.cublasLtMatmulPreferenceDestroy(preference);
    require(status, "cublasLtMatmulAlgoGetHeuristic", call);
    if (found == 0 || result.state != 0) {
      throw std::runtime_error("cuBLASLt has no kernel for this product [" + described(call) + ']');
    }
    algo_ = result.algo;
  }

  const Library& lt_;
  Handle handle_;
  Desc desc_ = nullptr;
  Layout weight_ = nullptr, x_ = nullptr, out_ = nullptr;
  Algo algo_{};
};

}  // namespace

void gelu_product(const std::string& file, const GeluProduct& call) {
  using Kind = std::tuple<std::string, int, Ending, hopper::Element, int64_t, int64_t, int64_t, size_t, uint32_t>;
  // Never destroyed: at exit CUDA may be gone before them. The lock is held while a plan has a call's pointers.
  static auto& lock = *new std::mutex;
  static auto& libraries = *new std::map<std::string, Library>;
  static auto& handles = *new std::map<std::pair<std::string, int>, Handle>;
  static auto& plans = *new std::map<Kind, Plan>;
  constexpr size_t MAX_PLANS = 1024;

  check(call);
  const std::lock_guard<std::mutex> guard(lock);
  const Library& lt = libraries.try_emplace(file, file).first->second;
  Handle& handle = handles[{file, call.device}];
  if (handle == nullptr) require(lt.cublasLtCreate(&handle), "cublasLtCreate", call);
  if (plans.size() >= MAX_PLANS) plans.clear();
  const Kind kind{file,   call.device, call.ending, call.element,        call.M,
                  call.N, call.K,      call.workspace_bytes, alignment(call)};
  plans.try_emplace(kind, lt, handle, call).first->second.run(call);
}

}  // namespace mfkernels::mlp
