"""Several times r of each sample, all with one point z."""

from dataclasses import dataclass

import family
import pytest
import torch

from meanflow.errors import UsageError
from meanflow.models import DiT
from meanflow.objectives import Control, Hybrid, LogitNormal, MeanFlow, Uniform
from mfkernels.testing import relative_error

CASES = {
    "plain": MeanFlow(ratio=0.5, norm_p=0.5),
    "guided": MeanFlow(ratio=0.5, omega=0.7, kappa=0.4),
    "hybrid": Hybrid(ratio=0.5, kappa=0.3, mix_schedule="gap"),
    "controlled": MeanFlow(ratio=0.5, control=Control(lipschitz=0.3)),
}


def with_intervals(objective, intervals):
    values = {name: getattr(objective, name) for name, field in objective.__dataclass_fields__.items() if field.init}
    own = {name: value for name, value in values.items() if name not in ("outputs", "instantaneous", "Output")}
    fields = {name for name in own if not str(objective.__dataclass_fields__[name].type).startswith("ClassVar")}
    return type(objective)(**{**{name: own[name] for name in fields}, "intervals": intervals})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [0, 3, 8])
def test_losses_and_gradients_are_means_over_the_intervals(case, rows):
    one = CASES[case]
    several = with_intervals(one, 3)
    net = family.network(one)
    parameters = [p for p in net.parameters() if p.requires_grad]
    x, y = family.batch()
    t = torch.linspace(0.2, 0.95, 8, dtype=torch.float64)
    moved = torch.arange(8) * 5 % 8 < rows
    r = [torch.where(moved, share * t, t) for share in (0.1, 0.5, 0.8)]
    more = {"probe": torch.randn(x.shape, dtype=x.dtype)} if case == "controlled" else {}
    common = {"x": x, "noise": x.flip(0), "t": t, "y": y, "drop": torch.arange(8) == 2, **more}
    found = several.loss_at(net, r=r[0], r_2=r[1], r_3=r[2], **common)
    wanted = [one.loss_at(net, r=each, **common) for each in r]
    if case == "controlled":  # the penalty is the first interval's
        del common["probe"]
        plain = [MeanFlow(ratio=0.5).loss_at(net, r=each, **common) for each in r]
        penalty = wanted[0].per_sample - plain[0].per_sample
        mean = sum(out.per_sample for out in plain) / 3 + penalty
        loss = sum(out.loss for out in plain) / 3 + wanted[0].loss - plain[0].loss
    else:
        mean, loss = sum(out.per_sample for out in wanted) / 3, sum(out.loss for out in wanted) / 3
    torch.testing.assert_close(found.per_sample, mean, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.loss, loss, rtol=1e-11, atol=1e-11)
    squared = sum(out.squared_error for out in wanted) / 3
    torch.testing.assert_close(found.squared_error, squared, rtol=1e-11, atol=1e-11)
    for name in ("u", "du_dt", "v", "t", "r"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted[0], name), rtol=1e-11, atol=1e-11)
    flat = torch.cat([g.flatten() for g in torch.autograd.grad(found.loss, parameters)])
    assert relative_error(flat, torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])) <= 1e-12


def test_the_other_times_are_drawn_as_the_first_one_below_t():
    for sampler in (LogitNormal(-0.4, 1.0), Uniform(), LogitNormal(-2.4, 2.0)):
        objective = MeanFlow(ratio=1.0, intervals=3, time_sampler=sampler)
        assert objective.conditions == ("r_2", "r_3")
        draws = objective.draw((100_000, 1), generator=torch.Generator().manual_seed(0))
        shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
        for name in objective.conditions:
            other = draws.conditions[name]
            assert bool(((other >= 0) & (other <= draws.t)).all())
            assert (other.quantile(shares) - draws.r.quantile(shares)).abs().max() < 0.01  # measured 0.004
            found, wanted = (torch.corrcoef(torch.stack([draws.t, r]))[0, 1] for r in (other, draws.r))
            assert (found - wanted).abs() < 0.01


def test_one_interval_draws_what_there_was():
    draws = [MeanFlow(intervals=n).draw((16, 3), generator=torch.Generator().manual_seed(0)) for n in (1, 2)]
    assert draws[0].conditions == {}
    for name, value in draws[0].tensors().items():
        assert torch.equal(value, draws[1].tensors()[name])


@dataclass(frozen=True)
class Fixed:
    def sample(self, n, *, generator=None, device="cpu"):
        return torch.full((n,), 0.5)


def test_values_out_of_range_are_named():
    with pytest.raises(UsageError, match=r"intervals: expected 1, or a time sampler with below\(t\), .*; got 2"):
        MeanFlow(intervals=2, time_sampler=Fixed())
    with pytest.raises(UsageError, match="intervals: expected at least 1, got 0"):
        MeanFlow(intervals=0)
    x, y = family.batch()
    t = torch.full((8,), 0.5, dtype=torch.float64)
    common = {"x": x, "noise": x, "t": t, "r": t / 2, "y": y}
    for r_2, words in (
        (t - 1, r"t, r_2: expected times in \[0, 1\] in every row"),
        (t + 0.1, "r_2: expected r_2 <= t"),
    ):
        with pytest.raises(ValueError, match=words):
            MeanFlow(intervals=2).loss_at(DiT(depth=1, **family.SIZE).double(), r_2=r_2, **common)
    with pytest.raises(TypeError, match="conditions: expected r_2=, got none"):
        MeanFlow(intervals=2).loss_at(DiT(depth=1, **family.SIZE).double(), **common)
