"""What `mfkernels._C` says to calls that it does not serve, and that loading it needs no GPU. No kernel runs."""

import importlib
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda_emulator
import pytest
import torch

from mfkernels.attention import cuda
from mfkernels.extension import description, load


@pytest.fixture(params=["emulator", "compiled"])
def extension(request: pytest.FixtureRequest) -> ModuleType:
    """The same bindings, over the emulator and, where it was compiled, over CUDA."""
    if request.param == "emulator":
        return cuda_emulator.extension()
    return compiled_extension()


def compiled_extension() -> ModuleType:
    why_not = cuda.unavailable()
    if why_not is not None:
        pytest.skip(why_not)
    return load()


def call(extension: ModuleType, **changes: Any) -> None:
    """A call that is right but for the changes; tensors are (address, shape, strides)."""
    shape, strides = (2, 7, 4, 64), (7 * 4 * 64, 4 * 64, 64, 1)
    kv_shape, kv_strides = (2, 9, 2, 64), (9 * 2 * 64, 2 * 64, 64, 1)
    q, k = (1024, shape, strides), (1024, kv_shape, kv_strides)
    tensors = {"q": q, "k": k, "v": k, "q_dot": q, "k_dot": k, "v_dot": k}
    outputs = dict.fromkeys(("o", "o_dot", "lse"), 1024)
    right = {"dtype": "float16", "scale": 0.125, "causal": False, "device": 0, "stream": 0}
    extension.attention_forward(**{**tensors, **outputs, **right, **changes})


def tensor(shape: tuple[int, ...], strides: tuple[int, ...] | None = None, address: int = 1024) -> Any:
    return address, shape, strides or torch.empty(shape, device="meta").stride()


CASES = {
    "dtype": ({"dtype": "float32"}, "dtype: expected bfloat16 or float16, got float32"),
    "head dim": ({"q": tensor((2, 7, 4, 48))}, r"q: expected a head dim of 64, 72, .* got 48 .*q \(2, 7, 4, 48\)"),
    "no queries": ({"q": tensor((2, 0, 4, 64))}, "q: expected at least one of everything"),
    "no keys": ({"k": tensor((2, 0, 2, 64))}, "k: expected at least one key"),
    "heads": ({"k": tensor((2, 9, 3, 64))}, r"k: expected .* heads that divide those of q, got \(2, 9, 3, 64\)"),
    "batch": ({"k": tensor((1, 9, 2, 64))}, r"k: expected shape \(2, 9, 2, 64\), got \(1, 9, 2, 64\)"),
    "values": ({"v": tensor((2, 8, 2, 64))}, r"v: expected shape \(2, 9, 2, 64\), got \(2, 8, 2, 64\)"),
    "tangent": ({"v_dot": None}, r"v_dot: expected shape \(2, 9, 2, 64\), got \(0, 0, 0, 0\)"),
    "rows": ({"q_dot": tensor((3, 7, 4, 64))}, r"q_dot: expected at most 2 batch rows, got 3"),
    "columns": ({"q": tensor((2, 7, 4, 64), (7, 1, 1, 2))}, "q: expected contiguous columns, got a stride of 2"),
    "odd stride": (
        {"k": tensor((2, 9, 2, 64), (1300, 132, 64, 1))},
        "k: expected a positive stride of the batch .*1300",
    ),
    "no stride": ({"q": tensor((2, 7, 4, 64), (1792, 0, 64, 1))}, "q: expected a positive stride of the rows .* got 0"),
    "address": (
        {"v": tensor((2, 9, 2, 64), address=1032)},
        "v: expected data at an address that 16 divides, got 0x408",
    ),
    "output": ({"o": 8}, "o: expected aligned memory"),
    "scale": ({"scale": -1.0}, "scale: expected a positive finite number, got -1"),
    "huge": ({"q": tensor((2, 2**30, 4, 64))}, "q, k: expected fewer rows"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments_are_named(case: str, extension: ModuleType) -> None:
    changes, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        call(extension, **changes)


def test_a_wrong_type_is_a_type_error(extension: ModuleType) -> None:
    with pytest.raises(TypeError):
        call(extension, q=torch.zeros(2, 7, 4, 64))


def test_tiles_fit(extension: ModuleType) -> None:
    assert tuple(extension.HEAD_DIMS) == cuda.HEAD_DIMS
    for head_dim in cuda.HEAD_DIMS:
        for dual in (False, True):
            tile = extension.attention_forward_tile(head_dim=head_dim, dual=dual)
            assert tile["shared_bytes"] <= 232_448  # what a block of sm_90 can have
            assert tile["block_m"] == 128
            assert tile["threads"] == 384
    with pytest.raises(ValueError, match="head_dim: expected 64, 72, 80, 96 or 128, got 48"):
        extension.attention_forward_tile(head_dim=48, dual=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the call would run on addresses made up here")
def test_an_error_of_cuda_has_the_shapes() -> None:
    extension = compiled_extension()
    with pytest.raises(RuntimeError, match=r"attention_forward of float16 q \(2, 7, 4, 64\), k \(2, 9, 2, 64\)"):
        call(extension)


def test_loading_it_needs_no_gpu_and_prints_nothing() -> None:
    compiled_extension()
    code = "import sys, mfkernels._C as C; assert 'sm_90a' in C.ARCHITECTURES"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_what_is_missing_is_said_with_the_command_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, 1, 64, dtype=torch.float16)
    monkeypatch.setattr("mfkernels.extension.COMPILED", False)
    assert "MFKERNELS_CUDA=1 pip install" in str(cuda.unsupported(q))
    assert description() == cuda.unavailable()


def test_an_extension_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("undefined symbol")

    q = torch.zeros(1, 2, 1, 64, dtype=torch.float16)
    monkeypatch.setattr("mfkernels.extension.COMPILED", True)
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ImportError, match=r"the CUDA extension does not load .undefined symbol.; reinstall"):
        cuda.attention_forward(q, q, q, scale=1.0)
    assert "reinstall" in description()


def test_other_devices_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfkernels.extension.COMPILED", True)
    assert cuda.unavailable(torch.device("cpu")) == "device: expected a CUDA device, got cpu"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=8, minor=0))
    assert "expected compute capability 9.0 (Hopper: H100, H200), got 8.0" in str(
        cuda.unavailable(torch.device("cuda"))
    )


def test_torch_compile_traces_through_the_question() -> None:
    def ask(q: torch.Tensor) -> torch.Tensor:
        return q if cuda.unsupported(q) is not None else q + 1

    q = torch.zeros(1, 2, 1, 64, dtype=torch.float16)
    assert torch.equal(torch.compile(ask, fullgraph=True, backend="aot_eager")(q), ask(q))
