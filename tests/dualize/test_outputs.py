"""What a module returns: samples elsewhere or several times, collections and dataclasses, each with its tangents."""

import dataclasses
from collections import OrderedDict

import pytest
import torch
from dualized import Wrapped, duals

from mfkernels import dual_aware, dualize, jvp, linear_map


@pytest.mark.parametrize("dualized", [False, True])
def test_more_rows_than_samples(dualized):
    x, v = torch.randn(2, 6, 4).double()
    net = Wrapped(lambda x: x.sin().repeat_interleave(2, 0))
    _, out_dot = jvp(dualize(net) if dualized else net, (x,), (v,), rows=3)
    torch.testing.assert_close(out_dot, (x.cos() * v)[:3].repeat_interleave(2, 0))


class Results(list):
    """No pytree node: PyTorch's functions take it for a leaf."""


@pytest.mark.parametrize("dualized", [False, True])
@pytest.mark.parametrize("kind", [Results, tuple, lambda parts: OrderedDict(enumerate(parts))])
def test_collections_of_any_type_keep_their_tangents_and_their_type(kind, dualized):
    x, v = torch.randn(2, 4, 3).double()

    def forward(x):
        return kind([x.sin(), 2 * x])

    net = dualize(Wrapped(forward)) if dualized else dual_aware(lambda x: kind([linear_map(torch.neg, x), 2 * x]))
    out, out_dot = jvp(net, (x,), (v,), rows=3)
    assert type(out) is type(out_dot) is type(forward(x))
    assert torch.equal(out_dot[1], 2 * v[:3])


def test_dataclasses_are_taken_apart():
    @dataclasses.dataclass
    class Output:
        sample: torch.Tensor
        extra: int

    x, v = torch.randn(2, 6, 4).double()
    out, out_dot = jvp(dualize(Wrapped(lambda x: Output(x.sin(), 3))), (x,), (v,), rows=3)
    assert torch.equal(out.sample, x.sin())
    assert out.extra == 3
    torch.testing.assert_close(out_dot.sample, (x.cos() * v)[:3])


def test_several_batches_one_after_the_other_keep_every_tangent():
    (x,) = duals((6, 3))
    out = dualize(Wrapped(lambda x: torch.cat([x.sin(), x.cos()])))(x)
    x_dot = torch.cat([x.tangent, torch.zeros(4, 3, dtype=torch.float64)])
    torch.testing.assert_close(out.tangent, torch.cat([x.primal.cos() * x_dot, -x.primal.sin() * x_dot]))


def test_a_result_with_its_samples_elsewhere_is_refused():
    with pytest.raises(ValueError, match="with them in dimension 1"):
        dualize(Wrapped(lambda x: x.transpose(0, 1)))(*duals((4, 4, 3)))
