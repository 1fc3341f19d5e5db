"""The authors' own JAX program (improved MeanFlow, arXiv 2512.02012), in float32: same weights and draws."""

import golden_values
import pytest
from both_backends import DEVICE, both
from golden_values import image, tensor, vector

from meanflow import sample
from meanflow.convert import imf_dit_from_flax
from meanflow.models import IMFDiT
from meanflow.objectives import ImprovedMeanFlow
from mfkernels.backend import recorded_choices
from mfkernels.testing import relative_error

SIZE = golden_values.DIT_A | {
    "aux_head_depth": 1,
    "num_class_tokens": 2,
    "num_time_tokens": 2,
    "num_cfg_tokens": 2,
    "num_interval_tokens": 1,
}
OPS = {"attention", "rms_norm", "qk_norm_rotary", "swiglu", "layer_scale_residual"}
backend = both()


@pytest.fixture(autouse=True)
def _served(backend):
    with recorded_choices() as chosen:
        yield
    assert {chosen[op] for op in OPS} == {backend}


@pytest.fixture(scope="module")
def data():
    return golden_values.load("imf_dit_a")


@pytest.fixture
def net(data):
    net = IMFDiT(**SIZE).to(DEVICE)
    net.load_state_dict(imf_dit_from_flax(golden_values.part(data, "param/")))
    return net


def test_objective_and_gradients(net, data):
    x, (y, drop) = image(data["x"]), golden_values.labels(data)
    times = {
        name: vector(data[key])
        for name, key in (("t", "t"), ("r", "r"), ("omega", "omega"), ("t_min", "cfg_t_min"), ("t_max", "cfg_t_max"))
    }
    out = ImprovedMeanFlow().loss_at(net, x=x, noise=x + image(data["v"]), y=y, drop=drop, **times)
    moved = times["r"] != times["t"]
    # measured: 2.1e-7, 2.1e-7, 1.0e-7, 3.1e-7, 6e-8 and 2.2e-7, 1.5e-7 (the authors' metrics are means over elements)
    assert relative_error(out.u, image(data["u"])) <= 5e-7
    assert relative_error(out.v_head, image(data["v_head"])) <= 5e-7
    assert relative_error(out.v, image(data["v_g"])) <= 3e-7
    assert relative_error(out.du_dt[moved], image(data["du_dt"])[moved]) <= 7e-7
    assert out.du_dt[~moved].abs().sum() == 0
    assert relative_error(out.loss, tensor(data["loss"])) <= 2e-7
    for ours, name in ((out.squared_error, "loss_u"), (out.squared_error_v, "loss_v")):
        assert relative_error(ours.mean() / x[0].numel(), tensor(data[f"metric/{name}"])) <= 5e-7
    out.loss.backward()
    wanted = imf_dit_from_flax(golden_values.part(data, "grad/"))
    assert sorted(wanted) == sorted(name for name, _ in net.named_parameters())
    for name, p in net.named_parameters():
        assert relative_error(p.grad, wanted[name]) <= 1.5e-6, name  # measured 7.5e-7


@pytest.mark.parametrize("steps", [1, 2])
def test_samples(net, data, steps):
    noise, (y, _) = image(data[f"sample_{steps}_noise"]), golden_values.labels(data)
    guidance = {name: data[f"sample_{name}"].item() for name in ("omega", "t_min", "t_max")}
    wanted = image(data[f"sample_{steps}"])
    assert relative_error(sample(net, noise, y, steps=steps, **guidance), wanted) <= 4e-7  # measured 1.5e-7
    assert relative_error(sample(net, noise, y, steps=steps, heads="u", **guidance), wanted) <= 4e-7
