// mfkernels._C: pointers, shapes, strides and a stream. Knows nothing of torch, so that one build serves every version.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "attention/forward.h"
#include "mlp/gelu_product.h"

#ifndef MF_ARCHITECTURES
#error "MF_ARCHITECTURES: the architectures compiled for, as a string"
#endif

namespace py = pybind11;
using namespace mfkernels;

namespace {

using Sizes = std::array<int64_t, 4>;
using Tensor = std::tuple<uintptr_t, Sizes, Sizes>;  // data pointer, shape, strides (in elements)

hopper::Operand operand(const char* name, const Tensor& tensor) {
  const auto& [data, shape, strides] = tensor;
  if (shape[3] > 1 && strides[3] != 1) {
    throw std::invalid_argument(std::string(name) + ": expected contiguous columns, got a stride of " +
                                std::to_string(strides[3]));
  }
  return {reinterpret_cast<const void*>(data), shape[0],   shape[1],   shape[2], shape[3], strides[0],
          strides[1],                          strides[2]};
}

hopper::Operand operand(const char* name, const std::optional<Tensor>& tensor) {
  return tensor ? operand(name, *tensor) : hopper::Operand{};
}

hopper::Element element(const std::string& dtype) {
  if (dtype == "bfloat16") return hopper::Element::BFLOAT16;
  if (dtype == "float16") return hopper::Element::FLOAT16;
  throw std::invalid_argument("dtype: expected bfloat16 or float16, got " + dtype);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("ARCHITECTURES") = MF_ARCHITECTURES;
  m.attr("HEAD_DIMS") = py::cast(attention::HEAD_DIMS);

  m.def(
      "attention_forward",
      [](const std::string& dtype, const Tensor& q, const Tensor& k, const Tensor& v,
         const std::optional<Tensor>& q_dot, const std::optional<Tensor>& k_dot, const std::optional<Tensor>& v_dot,
         uintptr_t o, uintptr_t o_dot, uintptr_t lse, float scale, bool causal, int device, uintptr_t stream) {
        const attention::ForwardCall call{
            element(dtype),
            operand("q", q),
            operand("k", k),
            operand("v", v),
            operand("q_dot", q_dot),
            operand("k_dot", k_dot),
            operand("v_dot", v_dot),
            reinterpret_cast<uint16_t*>(o),
            reinterpret_cast<uint16_t*>(o_dot),
            reinterpret_cast<float*>(lse),
            scale,
            causal,
            device,
            reinterpret_cast<void*>(stream),
        };
        py::gil_scoped_release release;
        attention::forward(call);
      },
      "Launches the dual rows, then the others. Tensors are (data pointer, shape, strides); o, o_dot and lse are "
      "pointers to contiguous memory. ValueError for what it does not serve, RuntimeError for CUDA's errors.",
      py::kw_only(), py::arg("dtype"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("q_dot"), py::arg("k_dot"),
      py::arg("v_dot"), py::arg("o"), py::arg("o_dot"), py::arg("lse"), py::arg("scale"), py::arg("causal"),
      py::arg("device"), py::arg("stream"));

  m.def(
      "attention_forward_tile",
      [](int head_dim, bool dual) {
        const attention::TileSizes tile = attention::forward_tile(head_dim, dual);
        py::dict out;
        out["block_m"] = tile.block_m;
        out["block_n"] = tile.block_n;
        out["stages"] = tile.stages;
        out["threads"] = tile.threads;
        out["shared_bytes"] = tile.shared_bytes;
        return out;
      },
      py::kw_only(), py::arg("head_dim"), py::arg("dual"));

  m.def(
      "gelu_product",
      [](const std::string& library, bool derivative, const std::string& dtype, std::array<int64_t, 3> sizes,
         uintptr_t x, uintptr_t weight, uintptr_t h, uintptr_t bias, uintptr_t out, uintptr_t workspace,
         size_t workspace_bytes, int device, uintptr_t stream) {
        const mlp::GeluProduct call{
            derivative ? mlp::Ending::DERIVATIVE : mlp::Ending::GELU,
            element(dtype),
            sizes[0],
            sizes[1],
            sizes[2],
            reinterpret_cast<const void*>(x),
            reinterpret_cast<const void*>(weight),
            reinterpret_cast<void*>(h),
            reinterpret_cast<void*>(bias),
            reinterpret_cast<void*>(out),
            reinterpret_cast<void*>(workspace),
            workspace_bytes,
            device,
            reinterpret_cast<void*>(stream),
        };
        py::gil_scoped_release release;
        mlp::gelu_product(library, call);
      },
      "Launches cuBLASLt's product of sizes (M, N, K) on pointers to contiguous memory. ValueError for what it does not "
      "serve, RuntimeError for cuBLASLt's errors.",
      py::kw_only(), py::arg("library"), py::arg("derivative"), py::arg("dtype"), py::arg("sizes"), py::arg("x"),
      py::arg("weight"), py::arg("h"), py::arg("bias"), py::arg("out"), py::arg("workspace"),
      py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"));
}
