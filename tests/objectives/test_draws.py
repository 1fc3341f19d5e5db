"""Draws made before a step: cut for processes, and outside of what is compiled."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from meanflow.models import DiT, IMFDiT
from meanflow.objectives import FlowMatching, ImprovedMeanFlow, MeanFlow

SIZE = {"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
SHAPE = (8, 2, 4, 4)
OBJECTIVES = [MeanFlow(omega=0.8, kappa=0.5, label_dropout=0.3), ImprovedMeanFlow(ratio=0.5), FlowMatching()]


def network(objective):
    torch.manual_seed(1)
    net = IMFDiT(depth=2, aux_head_depth=1, **SIZE) if isinstance(objective, ImprovedMeanFlow) else DiT(depth=1, **SIZE)
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    return net.double()


def draw(objective, seed=0):
    return objective.draw(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, spread=True)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_every_cut_gives_the_losses_of_the_whole_batch(objective):
    net, draws = network(objective), draw(objective)
    x, y = torch.randn(*SHAPE, dtype=torch.float64), torch.arange(8) % 3
    whole = objective.evaluate(net, x, y, draws)
    for parts in (2, 4) if draws.rows % 4 == 0 else (2,):
        pieces = [
            objective.evaluate(net, *(a.chunk(parts)[i] for a in (x, y)), draws.part(i, parts)) for i in range(parts)
        ]
        assert {int((piece.r != piece.t).sum()) for piece in pieces} == {draws.rows // parts}
        for name in ("per_sample", "u", "du_dt", "v", "t", "r"):
            together = torch.cat([getattr(piece, name) for piece in pieces])
            torch.testing.assert_close(together, getattr(whole, name), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sum(piece.loss for piece in pieces) / parts, whole.loss, rtol=1e-13, atol=0)


@pytest.mark.parametrize("rows", [0, 3, 6, 12, 24])
def test_rows_at_even_distances(rows):
    draws = MeanFlow(ratio=rows / 24).draw((24, 1, 2, 2), spread=True)
    assert int(draws.moved.sum()) == draws.rows == rows
    assert torch.equal(draws.moved, draws.r != draws.t)
    if rows == 3:
        assert draws.moved.nonzero().flatten().tolist() == [7, 15, 23]
    with pytest.raises(ValueError, match=rf"parts: expected a divisor of the batch \(24\) and .* \({rows}\), got 5"):
        draws.part(0, 5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_the_objective_compiles_whole_and_once(objective):
    """Guidance forward, dual pass and loss in one graph; the next steps, with other draws, do not compile again."""
    net = network(objective)
    torch.compiler.reset()  # what other tests compiled from the same lines
    counter = CompileCounterWithBackend("aot_eager")
    parameters = [p for p in net.parameters() if p.requires_grad]
    compiled = torch.compile(lambda x, y, draws: objective.evaluate(net, x, y, draws), fullgraph=True, backend=counter)
    for seed in range(4):
        x, y = torch.randn(*SHAPE, dtype=torch.float64), torch.randint(3, (8,))
        draws = draw(objective, seed)
        with torch.no_grad():
            parameters[0].mul_(1.01)  # as an optimiser does
        out, eager = compiled(x, y, draws), objective.evaluate(net, x, y, draws)
        for name in (f.name for f in dataclasses.fields(eager)):
            torch.testing.assert_close(getattr(out, name), getattr(eager, name), rtol=1e-12, atol=1e-12)
        for g, g_ref in zip(*(torch.autograd.grad(o.loss, parameters) for o in (out, eager)), strict=True):
            torch.testing.assert_close(g, g_ref, rtol=1e-10, atol=1e-12)
        assert counter.frame_count == 1


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_the_objective_compiles_whole_with_autocast_around_it(objective):
    net = network(objective).float()
    torch.compiler.reset()
    compiled = torch.compile(objective.evaluate, fullgraph=True, backend="aot_eager")
    x, y, draws = torch.randn(*SHAPE), torch.randint(3, (8,)), objective.draw(SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        out, eager = compiled(net, x, y, draws), objective.evaluate(net, x, y, draws)
    parameters = [p for p in net.parameters() if p.requires_grad]
    torch.testing.assert_close(out.loss, eager.loss, rtol=0, atol=0)
    for g, g_ref in zip(*(torch.autograd.grad(o.loss, parameters) for o in (out, eager)), strict=True):
        torch.testing.assert_close(g, g_ref, rtol=0, atol=0)
