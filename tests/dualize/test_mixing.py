"""Which samples an operator takes together: several are refused, one by one or in another order they are served."""

import re

import pytest
import torch
import torch.nn.functional as F
from dualized import Wrapped, assert_same_jvp, duals

from mfkernels import dualize

MIXED = {
    "sub: mixes batch rows": Wrapped(lambda x: x - x[0]),
    "broadcasts the batch along 2 dimensions": Wrapped(lambda x: (x[:, None] - x[None]).square().sum(1)),
    "add: mixes batch rows (it takes sample 1": Wrapped(lambda x: x * (x[1].sin() + x[0])),
    "mul: mixes batch rows (it takes sample 0": Wrapped(lambda x: x.mul_(x[:1])),
    "matmul: mixes batch rows (it takes sample 0": Wrapped(lambda x: x.view(6, 2, 2) @ x[0].view(2, 2)),
    "mm: mixes batch rows": Wrapped(lambda x: torch.tensordot(x, x, ([1], [1]))),
    "convolution: mixes batch rows": Wrapped(lambda x: F.conv1d(x, torch.ones(6, 6, 3).double(), padding=1)),
    "along dimension 2 of (1, 4, 6), which is the batch's": Wrapped(
        lambda x: F.conv1d(x.T, torch.ones(4, 4, 3).double(), padding=1).T
    ),
}


@pytest.mark.parametrize("message", MIXED)
def test_several_samples_in_one_are_refused(message):
    x, *_ = duals((6, 4))
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        dualize(MIXED[message])(x)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: torch.stack([x[i] * x[i].sum() for i in range(6)]),
        lambda x: torch.stack([xi - xi[0] for xi in x[1:4]] + [x[0], *x[4:]]),
        lambda x: torch.cat([xi.expand(2, 4).mean(0, keepdim=True) for xi in x.split(1)]),
        lambda x: torch.stack([x[i].sin() for i in range(6)]) * x,
        lambda x: torch.cat([xi[None] * 2 for xi in x]) * x,
        lambda x: F.pad(x[:1].sin(), (0, 0, 0, 5)) * x,
        lambda x: torch.where(torch.arange(6)[:, None] == 0, x[0].sin(), torch.ones_like(x)) + 0 * x.detach(),
        lambda x: F.conv1d(x.T, torch.ones(4, 4, 1).double()).T,
        lambda x: F.conv1d(x[None], torch.ones(6, 1, 3).double(), padding=1, groups=6)[0],
        lambda x: x[torch.arange(6).roll(1)] * x,
    ],
)
def test_samples_one_by_one_or_in_another_order_are_served(fn):
    x, v = torch.randn(2, 6, 4, dtype=torch.float64)
    assert_same_jvp(Wrapped(fn), (x,), (v,))
