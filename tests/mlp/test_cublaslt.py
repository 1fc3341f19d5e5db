"""The mlp by cuBLASLt's GELU endings: on a GPU by PyTorch's library, else by cublaslt_on_cpu.cpp in its place."""

import ctypes
import math
import subprocess
from contextlib import nullcontext
from pathlib import Path

import cuda_emulator
import oracles
import pytest
import torch
from both_backends import DEVICE
from mlp_inputs import make

from mfkernels import Dual, mlp, use_backend
from mfkernels.mlp import cublaslt, op
from mfkernels.testing import assert_dual, relative_error

pytest.importorskip("triton", minversion="3.4")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The file of a cuBLASLt for the CPU, loaded as PyTorch loads its own."""
    target = tmp_path_factory.mktemp("cublaslt") / "libcublasLt.so"
    source = Path(__file__).parent / "cublaslt_on_cpu.cpp"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", f"-I{cuda_emulator.CSRC}"]
    subprocess.run([cuda_emulator.compiler(), *flags, str(source), "-o", str(target)], check=True, timeout=120)
    ctypes.CDLL(str(target))
    return target


@pytest.fixture
def served(request, monkeypatch):
    """Calls that ask for cuBLASLt are served; skips where they cannot be."""
    if DEVICE == "cuda":
        why_not = cublaslt.unavailable(torch.device("cuda", torch.cuda.current_device()))
        if why_not is not None:
            pytest.skip(why_not)
        return
    file, module = str(request.getfixturevalue("library")), cuda_emulator.extension()
    monkeypatch.setattr(cublaslt, "library", lambda: file)
    monkeypatch.setattr(cublaslt, "unavailable", lambda device: None)
    monkeypatch.setattr("mfkernels.extension.load", lambda: module)


def counts(library):
    out = (ctypes.c_int * 3)()
    ctypes.CDLL(str(library)).counts(out)
    return list(out)


# Measured 5e-4 and 6.3e-3; the interpreter cuts bfloat16 off in the tangent's kernel.
DTYPES = {torch.float16: 1e-3, torch.bfloat16: 1.25e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "hidden"), [((4, 7, 24), 96), ((3, 17, 16), 40), ((1, 1, 8), 8)])
def test_against_float64(shape, hidden, dtype, served):
    with use_backend("mlp=cublaslt"):
        assert_dual(
            mlp, oracles.mlp, make(*shape, hidden=hidden), duals=["x"], dtype=dtype, bound=DTYPES[dtype], device=DEVICE
        )


@pytest.mark.parametrize("derivative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products(derivative, dtype, served):
    """Each output to its rounding: of a float64 product of the same 16-bit operands."""
    M, N, K = 37, 56, 24
    x, bias = torch.randn(M, K).to(DEVICE, dtype), torch.randn(N).to(DEVICE, dtype)
    weight = torch.randn(*((K, N) if derivative else (N, K))).to(DEVICE, dtype)
    eps = torch.finfo(dtype).eps
    if not derivative:
        a, h = cublaslt.gelu_product(x, weight, bias)
        h_ref = x.double() @ weight.double().T + bias.double()
        assert relative_error(h, h_ref) <= eps / 2
        assert relative_error(a, torch.nn.functional.gelu(h_ref, approximate="tanh")) <= eps / 2
        return
    h = (2 * torch.randn(M, N)).to(DEVICE, dtype)
    dh, db = cublaslt.gelu_product_backward(x, weight, h)
    w = math.sqrt(2 / math.pi) * (h.double() + 0.044715 * h.double() ** 3)
    inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * h.double() ** 2)
    slope = 0.5 * (1 + torch.tanh(w)) + 0.5 * h.double() * (1 - torch.tanh(w) ** 2) * inner
    dh_ref = slope * (x.double() @ weight.double())
    assert relative_error(dh, dh_ref) <= eps / 2
    assert relative_error(db, dh_ref.sum(0)) <= eps / 2


@pytest.mark.parametrize("rows", [0, 2, 5])
def test_autocast_agrees_with_our_own(rows, served, request):
    """Float32 weights, of which the gradients keep their dtype; tangent rows none, some and all."""
    inputs = {name: x.float().to(DEVICE).requires_grad_() for name, x in make(5, 9, 16, hidden=48).items()}
    x_dot = torch.randn(rows, 9, 16).to(DEVICE)
    results = {}
    before = counts(request.getfixturevalue("library"))[0] if DEVICE == "cpu" else 0
    for asked in ("triton", "mlp=cublaslt"):
        with use_backend(asked), torch.autocast(DEVICE, dtype=torch.float16):
            x = Dual(inputs["x"], x_dot if rows else None)
            y = mlp(x, *(inputs[name] for name in ("w1", "b1", "w2", "b2")))
        assert y.dtype == torch.float16
        grads = torch.autograd.grad(y.primal.float().square().sum(), list(inputs.values()))
        assert all(g.dtype == torch.float32 for g in grads)
        if DEVICE == "cpu":
            made = counts(request.getfixturevalue("library"))[0]
            assert made - before == (2 if asked == "mlp=cublaslt" else 0)  # in the forward and in the backward
            before = made
        results[asked] = [y.primal, *grads, *([y.tangent] if rows else [])]
    for ours, theirs in zip(*results.values(), strict=True):
        assert relative_error(theirs, ours) <= 1.1e-3  # measured 5.4e-4


def test_views_and_odd_addresses_are_copied(served):
    buffer = torch.randn(40 * 9 + 1).to(DEVICE, torch.float16)
    x = buffer[1:].view(9, 40).t()[:8].t()  # [9, 8], columns that are not rows
    weight, bias = torch.randn(17 * 8).half().to(DEVICE)[8:].view(16, 8), torch.randn(17).half().to(DEVICE)[1:]
    a, h = cublaslt.gelu_product(x, weight, bias)
    again = cublaslt.gelu_product(x.clone(), weight.clone(), bias.clone())
    assert torch.equal(a, again[0])
    assert torch.equal(h, again[1])


@pytest.mark.parametrize("given_back", ["transposed", "at an odd address"])
def test_saved_tensors_may_come_back_as_other_views(given_back, served):
    def unpack(x):
        if given_back == "transposed":
            return x.mT.contiguous().mT if x.ndim > 1 else x
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)

    inputs = [a.half().to(DEVICE).requires_grad_() for a in make(3, 5, 16, hidden=24, out=8).values()]
    grads = []
    with use_backend("mlp=cublaslt"):
        for hooks in (nullcontext(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack)):
            with hooks:
                y = mlp(*inputs)
            grads.append(torch.autograd.grad(y.square().sum(), inputs))
    for ours, theirs in zip(*grads, strict=True):
        assert relative_error(theirs, ours) <= 1e-3


def test_compiled(served):
    inputs = [a.half().to(DEVICE).requires_grad_() for a in make(3, 5, 16, hidden=24, out=8).values()]
    grads = []
    with use_backend("mlp=cublaslt"):
        for fn in (mlp, torch.compile(mlp, fullgraph=True, backend="aot_eager")):
            y = fn(*inputs)
            grads.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(theirs, ours)


def test_a_kind_of_product_is_chosen_once(served, request):
    if DEVICE == "cuda":
        pytest.skip("counts the calls of the library for the CPU")
    library = request.getfixturevalue("library")
    x, weight, bias = torch.randn(11, 8).half(), torch.randn(24, 8).half(), torch.randn(24).half()
    cublaslt.gelu_product(x, weight, bias)
    before = counts(library)
    for _ in range(3):
        cublaslt.gelu_product(x, weight, bias)
    after = counts(library)
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 0, 0]


def test_what_the_library_refuses_is_an_error(served, request):
    if DEVICE == "cuda":
        pytest.skip("the library for the CPU has no kernel for 13 rows")
    library = request.getfixturevalue("library")
    alive = counts(library)[2]
    with pytest.raises(RuntimeError, match=r"cublasLtMatmulAlgoGetHeuristic: cuBLAS status 15 .*M = 13, N = 16, K = 8"):
        cublaslt.gelu_product(torch.randn(13, 8).half(), torch.randn(16, 8).half(), torch.randn(16).half())
    assert counts(library)[2] == alive  # and leaves nothing behind
    module = cuda_emulator.extension()
    call = {"derivative": False, "dtype": "float16", "sizes": (4, 16, 8), "workspace_bytes": 64}
    call |= dict.fromkeys(("x", "weight", "h", "bias", "out", "workspace"), 1024) | {"device": 0, "stream": 0}
    with pytest.raises(RuntimeError, match=r"expected PyTorch to have loaded libcublasLt.so.0, and it has not"):
        module.gelu_product(library="libcublasLt.so.0", **call)
    with pytest.raises(ValueError, match="weight: expected sizes that are multiples of 8"):
        module.gelu_product(library=str(library), **call | {"sizes": (4, 12, 8)})
    with pytest.raises(ValueError, match="expected every tensor at an address that 16 divides"):
        module.gelu_product(library=str(library), **call | {"bias": 1026})
    with pytest.raises(ValueError, match="dtype: expected bfloat16 or float16, got float32"):
        module.gelu_product(library=str(library), **call | {"dtype": "float32"})


def test_what_it_does_not_serve_is_named(served):
    x, w1, b1, w2, b2 = (a.half().to(DEVICE) for a in make(2, 3, 8, hidden=16).values())
    with use_backend("mlp=cublaslt"):
        with pytest.raises(NotImplementedError, match="b1: expected a bias, got None"):
            mlp(x, w1, None, w2, b2)
        with pytest.raises(NotImplementedError, match=r"w2: expected sizes that are multiples of 8, got \(7, 16\)"):
            mlp(x, w1, b1, w2[:7], b2[:7])
        with pytest.raises(NotImplementedError, match=r"w1: expected sizes that are multiples of 8, got \(16, 0\)"):
            mlp(x[..., :0], w1[:, :0], b1, w2, b2)
        with pytest.raises(NotImplementedError, match=r"w1: expected sizes that are multiples of 8, got \(12, 8\)"):
            mlp(x, w1[:12], b1[:12], w2[:, :12].contiguous(), b2)
        with pytest.raises(NotImplementedError, match="x: expected float16 or bfloat16, or autocast to one of these"):
            mlp(*(a.float() for a in (x, w1, b1, w2, b2)))


def test_where_it_is_not_there_it_says_so():
    x, w1, b1, w2, b2 = (a.half() for a in make(2, 3, 8, hidden=16).values())
    with (
        use_backend("mlp=cublaslt"),
        pytest.raises(NotImplementedError, match="mlp: the cublaslt backend cannot serve"),
    ):
        mlp(x, w1, b1, w2, b2)


def test_empty_and_opcheck(served):
    x, w1, b1, w2, b2 = (a.half().to(DEVICE).requires_grad_() for a in make(1, 3, 8, hidden=16).values())
    with use_backend("mlp=cublaslt"):
        y = mlp(x[:0], w1, b1, w2, b2)
        grads = torch.autograd.grad(y.sum(), [w1, b1, w2, b2])
    assert y.shape == (0, 3, 8)
    assert all(g.abs().sum() == 0 for g in grads)
    torch.library.opcheck(
        op._forward.custom_op,
        (x.flatten(0, 1), None, w1, b1, w2, b2, torch.float16, "cublaslt"),
        test_utils=("test_schema", "test_faketensor"),
    )
