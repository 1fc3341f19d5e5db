"""What the objectives refuse, and that the message names the argument: nothing trains on what does not fit."""

import copy
import functools
import warnings

import numpy as np
import pytest
import torch

from meanflow.models import DiT, IMFDiT
from meanflow.objectives import FlowMatching, ImprovedMeanFlow, MeanFlow, Objective, Uniform
from mfkernels import backend

SIZE = {"input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 8, "num_heads": 2, "num_classes": 3}
DIT, IMF = DiT(depth=1, **SIZE), IMFDiT(depth=1, aux_head_depth=1, **SIZE)
OBJECTIVES = [(MeanFlow(), DIT), (FlowMatching(), DIT), (ImprovedMeanFlow(), IMF)]
X, Y, T = torch.randn(4, 3, 4, 4), torch.arange(4) % 3, torch.rand(4)
each = pytest.mark.parametrize(("objective", "net"), OBJECTIVES, ids=[type(o).__name__ for o, _ in OBJECTIVES])


def given(objective):
    """The further arguments of its `loss_at`."""
    draws = {"noise": torch.randn(4, 3, 4, 4), "t": T}
    if not isinstance(objective, FlowMatching):
        draws["r"] = T / 2
    if isinstance(objective, ImprovedMeanFlow):
        draws |= {"omega": torch.ones(4), "t_min": torch.zeros(4), "t_max": torch.ones(4)}
    return draws


@each
@pytest.mark.parametrize(
    ("x", "y", "error", "match"),
    [
        (X, Y[:3], ValueError, r"y: expected shape \(4,\), the batch of x, got \(3,\)"),
        (X, torch.arange(9) % 3, ValueError, r"y: expected shape \(4,\), the batch of x, got \(9,\)"),
        (X, Y[:, None], ValueError, r"y: expected shape \(4,\), the batch of x, got \(4, 1\)"),
        (X, X, ValueError, r"y: expected shape \(4,\), the batch of x, got \(4, 3, 4, 4\)"),
        (X, Y.float(), TypeError, r"y: expected integer labels \(int32 or int64\), got torch.float32"),
        (X, [0, 1, 2, 0], TypeError, "y: expected a tensor of labels, got list"),
        (X, Y.to("meta"), ValueError, "y: expected the device of x, cpu, got meta"),
        (X, Y + 2, ValueError, r'y: expected labels in \[0, 3\], where 3 is "no label", got 2 to 4'),
        (X, Y.int() - 1, ValueError, r"y: expected labels in \[0, 3\], .* got -1 to 1"),
        (torch.where(X[1, 2, 3, 0] == X, torch.nan, X), Y, ValueError, "x: expected finite values, got nan"),
        (torch.where(X[3, 2, 3, 3] == X, torch.inf, X), Y, ValueError, "x: expected finite values, got inf"),
        (torch.where(X[0, 0, 0, 0] == X, -torch.inf, X), Y, ValueError, "x: expected finite values, got -inf"),
        (X.to(torch.uint8), Y, TypeError, "x: expected a floating-point dtype, got torch.uint8"),
        (X.numpy(), Y, TypeError, "x: expected a tensor, got ndarray"),
        (X[:0], Y[:0], ValueError, r"x: expected \(B, …\) with at least one sample, got shape \(0, 3, 4, 4\)"),
    ],
)
def test_data_and_labels(objective, net, x, y, error, match):
    with pytest.raises(error, match=match):
        objective(net, x, y)
    with pytest.raises(error, match=match):
        objective.loss_at(net, x=x, y=y, **given(objective))
    with pytest.raises(error, match=match):
        objective.evaluate(net, x, y, objective.draw(X.shape))


@each
def test_draws(objective, net):
    draws = given(objective)
    cases = [
        ({"t": 0.5}, TypeError, "t: expected a tensor, got float"),
        ({"t": Y}, TypeError, "t: expected a floating-point dtype, got torch.int64"),
        ({"t": T[:3]}, ValueError, r"t: expected shape \(4,\)"),
        ({"t": torch.full((4,), torch.nan)}, ValueError, r"expected times in \[0, 1\]"),
        ({"t": torch.full((4,), 1.5)}, ValueError, r"expected times in \[0, 1\]"),
        ({"noise": torch.full((4, 3, 4, 4), torch.inf)}, ValueError, "noise: expected finite values, got inf"),
        ({"noise": np.zeros((4, 3, 4, 4))}, TypeError, "noise: expected a tensor, got ndarray"),
        ({"drop": True}, TypeError, "drop: expected a tensor, got bool"),
        ({"drop": Y}, TypeError, "drop: expected bool, got torch.int64"),
    ]
    if isinstance(objective, ImprovedMeanFlow):
        cases.append(({"omega": torch.full((4,), torch.nan)}, ValueError, "omega: expected at least 1 in every row"))
        cases.append(({"omega": torch.full((4,), torch.inf)}, ValueError, "omega: expected finite values, got inf"))
        cases.append(({"omega": 2.0}, TypeError, "omega: expected a tensor, got float"))
        cases.append(({"t_min": torch.full((4,), torch.nan)}, ValueError, "t_min: expected finite values, got nan"))
    for changes, error, match in cases:
        with pytest.raises(error, match=match):
            objective.loss_at(net, x=X, y=Y, **{**draws, **changes})
    with pytest.raises(ValueError, match=r"noise: expected the shape of x, \(4, 3, 4, 4\), got \(2, 3, 4, 4\)"):
        objective.evaluate(net, X, Y, objective.draw((2, 3, 4, 4)))


def network(returns):
    def net(z, r, t, y):
        return returns(z)

    net.num_classes = 3
    return net


@pytest.mark.parametrize(
    "objective",
    [MeanFlow(), MeanFlow(ratio=0.0), MeanFlow(omega=2.0), MeanFlow(kappa=0.5), FlowMatching()],
    ids=str,
)
@pytest.mark.parametrize(
    ("net", "error", "match"),
    [
        (IMF, TypeError, "net: expected it to return u, a tensor of the shape of z, got tuple"),
        (network(lambda z: {"u": z}), TypeError, "net: expected it to return u, .* got dict"),
        (network(lambda z: z[:, :1]), ValueError, r"net: expected u of the shape of z, .* got \(\d, 1, 4, 4\)"),
        (network(lambda z: z.repeat(1, 2, 1, 1)), ValueError, r"net: expected u of the shape of z"),
        (network(lambda z: z.flatten(1)), ValueError, r"net: expected u of the shape of z, .* got \(\d, 48\)"),
    ],
)
def test_what_a_meanflow_network_takes_and_returns(objective, net, error, match):
    with pytest.raises(error, match=match):  # guidance calls it with other rows than training
        objective(net, X, Y)


def test_a_meanflow_network_takes_y_by_name():
    for net, match in (
        (lambda z, r, t, labels: z, r"net: expected net\(z, r, t, y\), got function\(z, r, t, labels\): .*'labels'"),
        (torch.nn.Linear(4, 4), r"net: expected net\(z, r, t, y\), got Linear\(input"),
    ):
        with pytest.raises(TypeError, match=match):
            MeanFlow(label_dropout=0.0)(net, X, Y)


def pair(returns):
    def net(z, r, t, y, *, omega, t_min, t_max, heads="uv"):
        return returns(z, heads)

    net.num_classes = 3
    return net


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize(
    ("net", "error", "match"),
    [
        (DIT, TypeError, r"net: expected net\(z, r, t, y, omega=, t_min=, t_max=, heads=\), got DiT\(.*'omega'"),
        (pair(lambda z, heads: z), TypeError, r"net: expected it to return \(u, v\), as IMFDiT does, got Tensor"),
        (pair(lambda z, heads: (z, z, z)), TypeError, r"net: expected it to return \(u, v\), .* got 3 values"),
        (pair(lambda z, heads: (z, None)), TypeError, "net: expected it to return v, a tensor .* got NoneType"),
        (pair(lambda z, heads: (z, z[:, :1])), ValueError, "net: expected v of the shape of z"),
        (pair(lambda z, heads: (z[:, :1], z)), ValueError, "net: expected u of the shape of z"),
        (pair(lambda z, heads: (z, z) if heads == "v" else z), TypeError, r"net: expected it to return \(u, v\)"),
    ],
)
def test_what_an_improved_meanflow_network_takes_and_returns(ratio, net, error, match):
    with pytest.raises(error, match=match):
        ImprovedMeanFlow(ratio=ratio)(net, X, Y)


def test_decorators_are_asked_what_they_take_themselves():
    """Not what the function takes that they wrap."""

    def plain(z, r, t):
        return z

    @functools.wraps(plain)
    def net(z, r, t, y):
        return plain(z, r, t)

    MeanFlow(label_dropout=0.0)(net, X, Y)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: MeanFlow(time_sampler="uniform"), TypeError, "time_sampler: expected a TimeSampler, .* got 'uniform'"),
        (lambda: FlowMatching(time_sampler=Uniform), TypeError, "time_sampler: expected a TimeSampler"),
        (lambda: ImprovedMeanFlow(time_sampler=None), TypeError, "time_sampler: expected a TimeSampler"),
        (lambda: MeanFlow(guidance_interval=0.5), TypeError, r"guidance_interval: expected a pair \(low, high\), got"),
        (lambda: MeanFlow(guidance_interval=(0.5,)), ValueError, "guidance_interval: expected 0 <= low"),
        (
            lambda: MeanFlow(guidance_interval=(0.5, float("nan"))),
            ValueError,
            "guidance_interval: expected a finite",
        ),
    ],
)
def test_what_an_objective_is_made_of(make, error, match):
    with pytest.raises(error, match=match):
        make()


@each
def test_the_label_that_means_none_is_one(objective, net):
    assert objective(net, X, torch.full((4,), 3)).loss.isfinite()


def test_gradients_of_each_sample_by_vmap():
    """Values within `torch.vmap` cannot be read, and are not."""
    objective = FlowMatching(label_dropout=0.0)
    draws = objective.draw((1, 3, 4, 4))
    weights = {name: w.detach() for name, w in DIT.named_parameters()}

    def loss(w, x, y):
        def net(z, r, t, y):
            return torch.func.functional_call(DIT, w, (z, r, t, y))

        return objective.evaluate(net, x[None], y[None], draws).loss

    with backend.use_backend("reference"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)  # of operators without a rule
        each_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, X, Y)
    for i in range(4):
        for name, one in torch.func.grad(loss)(weights, X[i], Y[i]).items():
            torch.testing.assert_close(each_sample[name][i], one)


@each
def test_the_checks_leave_one_graph_and_read_nothing(objective, net):
    assert isinstance(objective, Objective)
    torch.compiler.reset()

    def loss(x, y, draws):
        return objective.evaluate(net, x, y, draws).loss

    draws = objective.draw(X.shape, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X, Y, draws), loss(X, Y, draws))
    meta = objective.draw(X.shape, device="meta")  # a read of a value would raise
    assert objective.evaluate(copy.deepcopy(net).to("meta"), X.to("meta"), Y.to("meta"), meta).loss.shape == ()
