"""The authors' own JAX programs (MeanFlow, arXiv 2505.13447), in float32: same weights, same draws, equal numbers."""

import golden_values
import pytest
from both_backends import DEVICE, both
from golden_values import image, tensor, vector

from meanflow import sample
from meanflow.convert import dit_from_flax
from meanflow.models import DiT
from meanflow.objectives import MeanFlow
from mfkernels import use_backend
from mfkernels.backend import recorded_choices
from mfkernels.testing import relative_error

CASES = {
    "meanflow_dit_a": (golden_values.DIT_A, MeanFlow(ratio=0.25, omega=1.0, kappa=0.5)),
    "meanflow_dit_c": (
        {
            "input_size": 12,
            "patch_size": 2,
            "in_channels": 1,
            "hidden_size": 64,
            "depth": 2,
            "num_heads": 1,
            "num_classes": 5,
        },
        MeanFlow(ratio=1.0, norm_p=0.0, label_dropout=0.0),
    ),
}
# what has no kernel: library products, and two elementwise operations on one vector a sample
LIBRARY = {"linear", "patch_embed", "silu"}
backend = both()


def load(name):
    size, objective = CASES[name]
    data = golden_values.load(name)
    net = DiT(**size).to(DEVICE)
    net.load_state_dict(dit_from_flax(golden_values.part(data, "param/")))
    return net, objective, data


@pytest.fixture(params=CASES)
def case(request):
    return load(request.param)


def test_objective_and_gradients(case, backend):
    net, objective, data = case
    x, (y, drop) = image(data["x"]), golden_values.labels(data)
    t, r = vector(data["t"]), vector(data["r"])
    noise = x + image(data["v"] if "v" in data.files else data["v_g"])
    with recorded_choices() as chosen:
        out = objective.loss_at(net, x=x, noise=noise, t=t, r=r, y=y, drop=drop)
    assert {op for op, name in chosen.items() if name != backend} <= LIBRARY
    assert len(chosen) > len(LIBRARY)
    moved = r != t
    # measured: 2.1e-7, 7.4e-8, 2.8e-7, 0, 3.7e-7
    assert relative_error(out.u, image(data["u"])) <= 5e-7
    assert relative_error(out.v, image(data["v_g"])) <= 2e-7
    assert relative_error(out.du_dt[moved], image(data["du_dt"])[moved]) <= 6e-7
    assert out.du_dt[~moved].abs().sum() == 0
    assert relative_error(out.loss, tensor(data["loss"])) <= 2e-7
    out.loss.backward()
    wanted = dit_from_flax(golden_values.part(data, "grad/"))
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert relative_error(p.grad, wanted[name]) <= 8e-7, name


def assert_samples(net, data, key, **how):
    noise, (y, _) = image(data[f"{key}_noise"]), golden_values.labels(data)
    error = relative_error(sample(net, noise, y, **how), image(data[key]))
    assert error <= 3e-7  # measured 1.3e-7


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples(case, steps):
    net, _, data = case
    with use_backend("reference"):
        assert_samples(net, data, f"sample_{steps}", steps=steps)
        assert_samples(net, data, f"sample_{steps}", times=data[f"sample_{steps}_times"])


def test_samples_by_tritons_kernels(triton):
    """One of them: the interpreter takes seconds a step."""
    net, _, data = load("meanflow_dit_a")
    assert_samples(net, data, "sample_2", steps=2)
