import os
import pickle
import subprocess
import sys

import pytest
import torch

from mfkernels import BackendError, backend, requested_backend, rms_norm, silu, use_backend
from mfkernels.backend import choose, recorded_choices

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def served():
    return None


def too_wide():
    return "head dim 300: expected at most 256"


def test_automatic_choice():
    assert choose("op", CPU, {"triton": served}) == "reference"
    assert choose("op", CUDA, {"cuda": served, "triton": served}) == "cuda"
    assert choose("op", CUDA, {"cuda": too_wide, "triton": served}) == "triton"
    assert choose("op", CUDA, {"triton": too_wide}) == "reference"


def test_a_request_is_served_or_refused():
    with use_backend("triton"):
        assert requested_backend() == "triton"
        assert choose("op", CPU, {"triton": served}) == "triton"
        with pytest.raises(BackendError, match=r"op: the triton backend cannot serve this call: head dim 300") as error:
            choose("op", CUDA, {"triton": too_wide})
        for raised in (error.value, pickle.loads(pickle.dumps(error.value))):
            assert isinstance(raised, NotImplementedError)
            assert (raised.op, raised.backend, raised.reason) == ("op", "triton", too_wide())
            assert str(raised) == f"op: the triton backend cannot serve this call: {too_wide()}"
        with use_backend("reference"):
            assert choose("op", CUDA, {"triton": served}) == "reference"
        with use_backend(None):
            assert choose("op", CPU, {"triton": served}) == "reference"
    assert requested_backend() == os.environ.get("MFKERNELS_BACKEND")


def test_a_request_for_one_op():
    with use_backend("reference, attention=triton"):
        assert requested_backend() == requested_backend("mlp") == "reference"
        assert requested_backend("attention") == "triton"
        assert choose("attention", CUDA, {"triton": served}) == "triton"
        assert choose("mlp", CUDA, {"triton": served}) == "reference"
    with use_backend("attention=cuda"):
        assert requested_backend("mlp") is None
        assert choose("mlp", CUDA, {"triton": served}) == "triton"
        with pytest.raises(BackendError, match="attention: no cuda backend"):
            choose("attention", CUDA, {"triton": served})
    with (
        pytest.raises(ValueError, match=r"name: expected one of the ops .*attention, .* before '=', got 'atention'"),
        use_backend("atention=cuda"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"expected one of the ops .*attention, .*got 'scaled_dot_product_attention'"),
        use_backend("scaled_dot_product_attention=triton"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="name: rms_norm has the backends reference, triton, got 'cuda'"),
        use_backend("rms_norm=cuda"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="name: expected one of reference, triton, cuda, cublaslt, got ''"),
        use_backend("attention="),
    ):
        pass


def test_a_backend_that_serves_only_on_request():
    supports = {"cuda": served, "triton": too_wide}
    assert choose("op", CUDA, supports, opt_in=("cuda",)) == "reference"
    with use_backend("cuda"):
        assert choose("op", CUDA, supports, opt_in=("cuda",)) == "cuda"


def test_a_backend_that_an_op_does_not_have():
    with (
        use_backend("cuda"),
        pytest.raises(BackendError, match=r"op: no cuda backend \(it has: reference, triton\)") as error,
    ):
        choose("op", CUDA, {"triton": served})
    assert (error.value.op, error.value.backend) == ("op", "cuda")
    assert error.value.reason.startswith("no cuda backend")


def test_an_op_with_one_implementation_is_not_subject_to_requests():
    with use_backend("triton"), recorded_choices() as chosen:
        silu(torch.randn(3))
    assert chosen == {"silu": "reference"}


def test_unknown_names():
    with (
        pytest.raises(ValueError, match="name: expected one of reference, triton, cuda, cublaslt, got 'tpu'"),
        use_backend("tpu"),
    ):
        pass
    code = "import torch, mfkernels; mfkernels.attention(*torch.randn(3, 1, 2, 1, 8))"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MFKERNELS_BACKEND": "tpu"}, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "MFKERNELS_BACKEND: expected one of reference, triton, cuda, cublaslt, got 'tpu'" in run.stderr


def test_import_is_quiet_and_builds_nothing():
    heavy = "('triton', 'matplotlib', 'accelerate')"
    code = f"import sys, mfkernels, meanflow; print(*(m for m in {heavy} if m in sys.modules))"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
    assert run.stderr == ""


@pytest.mark.parametrize(("found", "told"), [("3.3.1", "expected Triton 3.4 or newer, found 3.3.1"), ("3.10.0", None)])
def test_an_old_triton_is_named(monkeypatch, found, told):
    monkeypatch.setattr(backend, "version", lambda name: found)
    assert backend._triton_missing() == told


def test_without_triton_the_cure_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'triton>=3.4'" in backend._triton_missing()


def test_on_a_gpu_plain_pytorch_is_warned_about_once(monkeypatch, caplog):
    monkeypatch.setattr(backend, "_warned", set())
    for _ in range(2):
        assert choose("op", CUDA, {"triton": too_wide}) == "reference"
    assert choose("op", CPU, {"triton": too_wide}) == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "op runs on plain PyTorch, which is slower on a GPU (triton: head dim 300: expected at most 256)"
    ]


def test_a_compiled_call_that_is_refused_says_why():
    x, weight = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    compiled = torch.compile(lambda x: rms_norm(x, weight), backend="eager", fullgraph=True)
    with use_backend("rms_norm=triton"), pytest.raises(Exception, match="rms_norm: the triton backend cannot serve"):
        compiled(x)
