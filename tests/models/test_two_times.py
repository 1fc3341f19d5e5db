"""Networks of one time as networks of two."""

import copy

import pytest
import torch
from minimum import needs_compile
from torch import nn

from meanflow.convert import in_our_time, load_dit
from meanflow.models import DiT, DMFDiT, two_times
from meanflow.models.two_times import is_of_one_time, is_told_gap, told_both_times
from meanflow.objectives import MeanFlow, Networks, TeacherVelocity
from mfkernels import dualize, jvp
from mfkernels.testing import relative_error

SIZE = {"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 16, "depth": 2, "num_heads": 2}
SIZE["num_classes"] = 3


class Embedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.layers(t[:, None])


class Flow(nn.Module):
    """v(z, t, y) of an ordinary network, whose time runs the other way inside."""

    num_classes = 3

    def __init__(self, width=12):
        super().__init__()
        self.inner = nn.ModuleDict({"time": Embedder(width), "label": nn.Embedding(4, width)})
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 5)

    def forward(self, z, t, y):
        told = self.inner["time"](1 - t.to(z.dtype)) + self.inner["label"](y)
        return -self.last(torch.tanh(self.first(z)) * torch.sigmoid(told))


def flow():
    torch.manual_seed(0)
    return Flow().double()


def inputs(B=6):
    torch.manual_seed(1)
    t = torch.rand(B, dtype=torch.float64)
    return torch.randn(B, 5, dtype=torch.float64), t * torch.rand(B, dtype=torch.float64), t, torch.arange(B) % 4


def random(net):
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return net.double()


def test_the_network_of_two_times_is_the_one_of_one_at_first_and_learns_the_gap():
    teacher = two_times(flow(), "inner.time")
    z, r, t, y = inputs()
    assert torch.equal(teacher(z, r, t, y), flow()(z, t, y))
    assert teacher.num_classes == 3
    student = dualize(copy.deepcopy(teacher))
    objective = MeanFlow(ratio=0.5, velocity=TeacherVelocity(guidance=1.5))
    draws = objective.draw(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nets = Networks(frozen=teacher)
    before = objective.loss(student, z, y % 3, draws, nets).loss
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for _ in range(20):
        loss = objective.loss(student, z, y % 3, draws, nets).loss
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < before
    assert (student(z, r, t, y) - student(z, t, t, y)).abs().max() > 1e-3
    assert torch.equal(teacher(z, r, t, y), flow()(z, t, y))  # the copy has learned alone
    assert student.get_submodule("net.inner.time").gap is None


@pytest.mark.parametrize("rows", [0, 2, 6])
def test_its_derivative_is_that_of_both_times(rows):
    net = dualize(two_times(flow(), "inner.time"))
    nn.init.normal_(net.r_embedder.mlp[2].weight)
    z, r, t, y = inputs()
    v = torch.randn_like(z)
    u, du = jvp(net, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)), rows=rows, y=y)
    assert torch.equal(u, net(z, r, t, y))
    h = 1e-6
    wanted = (net(z + h * v, r, t + h, y) - net(z - h * v, r, t - h, y)) / (2 * h)
    if rows:
        assert relative_error(du, wanted[:rows]) <= 1e-9
    else:
        assert du is None or len(du) == 0


@needs_compile
def test_it_compiles_as_one_graph():
    net = dualize(two_times(flow(), "inner.time"))
    z, r, t, y = inputs()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, r, t, y), net(z, r, t, y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("embedder", "words"),
    [
        ("time", "embedder: expected the name of a submodule, such as inner, first, last; got 'time'"),
        ("", "embedder: expected the name of a submodule"),
        ("inner", r"embedder: expected one of times \(B,\); inner does not take them"),
        ("inner.label", r"embedder: expected one of times \(B,\); inner\.label does not take them"),
    ],
)
def test_an_embedder_that_is_none_is_named(embedder, words):
    with pytest.raises(ValueError, match=words):
        two_times(flow(), embedder)


def test_weights_trained_at_equal_times_are_the_same_network_at_every_r():
    torch.manual_seed(0)
    old, new = random(DiT(**SIZE)), DiT(**SIZE).double()
    z, y = torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.arange(5) % 4
    t = torch.rand(5, dtype=torch.float64)
    new.load_state_dict(told_both_times(old.state_dict(), new))
    for r in (t, 0 * t, t / 2):
        assert relative_error(new(z, r, t, y), old(z, t, t, y)) <= 1e-14
    assert relative_error(old(z, 0 * t, t, y), old(z, t, t, y)) > 1e-2
    # a network that is told no gap has it in the embedding of t
    decoupled = DMFDiT(**SIZE).double()
    decoupled.load_state_dict(told_both_times(old.state_dict(), decoupled))
    assert relative_error(decoupled(z, t, t, y), old(z, t, t, y)) <= 1e-14


def test_weights_without_an_embedding_of_the_gap_start_with_a_silent_one():
    torch.manual_seed(0)
    old, new = random(DiT(**SIZE)), random(DiT(**SIZE))
    with torch.no_grad():
        [p.zero_() for p in old.r_embedder.parameters()]
    theirs = {name: value for name, value in old.state_dict().items() if not name.startswith("r_embedder")}
    assert is_of_one_time(theirs)
    assert not is_of_one_time(old.state_dict())
    assert is_told_gap(new)
    z, y, t = torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.arange(5) % 4, torch.rand(5, dtype=torch.float64)
    load_dit(new, theirs)
    assert torch.equal(new(z, 0 * t, t, y), old(z, t, t, y))
    other = DiT(**SIZE).double()
    other.load_state_dict(told_both_times(theirs, other))
    assert torch.equal(other(z, 0 * t, t, y), old(z, t, t, y))


def test_a_sit_is_rewritten_for_our_time_exactly():
    """SiT's names are DiT's; its velocity is minus ours at 1 − t."""
    torch.manual_seed(0)
    sit, ours = random(DiT(**SIZE)), DiT(**SIZE).double()
    with torch.no_grad():
        [p.zero_() for p in sit.r_embedder.parameters()]
    theirs = {f"module.{n}": p for n, p in sit.state_dict().items() if not n.startswith("r_embedder")}
    before = {name: value.clone() for name, value in theirs.items()}
    load_dit(ours, in_our_time({"ema": theirs}))
    assert all(torch.equal(theirs[name], value) for name, value in before.items())
    z, y, t = torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.arange(5) % 4, torch.rand(5, dtype=torch.float64)
    assert relative_error(ours(z, t / 3, t, y), -sit(z, 1 - t, 1 - t, y)) <= 1e-7  # float32 frequencies; measured 2e-8
    with pytest.raises(ValueError, match=r"state: expected t_embedder\.mlp\.0\.weight .* of a SiT, got no such"):
        in_our_time({"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="state: expected the weights of a SiT, which has one time; got an embedding"):
        in_our_time(DiT(**SIZE).state_dict())


class Checkpointed(Flow):
    """With the embedder in a part that is recomputed in the backward."""

    def inner_part(self, z, t, y):
        return super().forward(z, t, y)

    def forward(self, z, t, y):
        return torch.utils.checkpoint.checkpoint(self.inner_part, z, t, y, use_reentrant=False)


def test_an_embedder_that_is_recomputed_is_an_error_and_no_wrong_gradient():
    torch.manual_seed(0)
    net = two_times(Checkpointed().double(), "inner.time")
    nn.init.normal_(net.r_embedder.mlp[2].weight)
    loss = net(*inputs()).square().mean()
    with pytest.raises(RuntimeError, match="two_times: expected times to be embedded within a forward"):
        loss.backward()
