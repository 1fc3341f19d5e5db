from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..ada_layer_norm import ada_layer_norm
from ..calls import cache_key, cached, is_untransformed, store
from ..checks import check_number
from ..dual import TensorOrDual, primal_of
from ..router import Decision
from .op import gated_residual, gated_residual_ada_layer_norm, gated_residual_norm


class ResidualStream(NamedTuple):
    """The residual stream between the parts of adaLN-Zero blocks: x + gate·(y + bias), added by the norm that reads it.

    A block reads the stream twice and writes it once (arXiv 2212.09748, §3.2): `normed` gives the norm of the sum
    without writing it, `update_and_norm` makes it again, adds the block's second update and writes. A NamedTuple, so
    that hooks, pytrees and activation checkpointing see the tensors inside. On the reference every sum is written.

    Args:
        x: (B, N, D) tensor or Dual.
        y: (B, N, D), what is still to be added; None: nothing.
        gate: (B, D).
        bias: (D,) or None, added to `y` first.
        seen: of `normed` alone. In the graph it stands for the sum; its numbers are NaN, as nothing has written them.
    """

    x: TensorOrDual
    y: TensorOrDual | None = None
    gate: TensorOrDual | None = None
    bias: Tensor | None = None
    seen: TensorOrDual | None = None

    def takes_bias(self, bias: Tensor | None) -> bool:
        """Whether a layer's bias is better left to the update: that saves a pass; on plain PyTorch it adds one.

        Not where the layer is sharded by itself: outside its own forward the bias is not whole.
        """
        if bias is None:
            return False
        key = cache_key("takes_bias", self.x, bias)
        takes: bool | None = cached(key)
        if takes is None:
            fused = gated_residual_norm.choose(x=primal_of(self.x)) != "reference"
            takes = fused and (key is not None or is_untransformed(self.x, bias))
            store(key, takes)
        return takes

    def normed(
        self, shift: TensorOrDual, scale: TensorOrDual, *, eps: float = 1e-6
    ) -> tuple[TensorOrDual, ResidualStream]:
        """`ada_layer_norm` of the sum, (B, N, D), and the stream as it is from then on. Raises as that does."""
        x, y, gate, bias, seen = self
        if y is None or gate is None:
            return ada_layer_norm(x, shift, scale, eps=eps), self
        if seen is not None:
            raise ValueError("stream: expected an update between two norms, and this one has been normed")
        eps = check_number("eps", eps, 0)
        decision, eager = _decision(x, y, gate, shift, scale, bias)
        if decision is None:
            x, h = gated_residual_ada_layer_norm(x, y, gate, shift, scale, bias=bias, eps=eps)
            return h, ResidualStream(x)
        seen, h = gated_residual_norm.update_and_norm(
            decision, (x, y, gate, shift, scale), bias, eps, eager=eager, defer=True
        )
        return h, ResidualStream(x, y, gate, bias, seen)

    def update_and_norm(
        self,
        y: TensorOrDual,
        gate: TensorOrDual,
        bias: Tensor | None,
        shift: TensorOrDual,
        scale: TensorOrDual,
        *,
        eps: float = 1e-6,
    ) -> tuple[TensorOrDual, ResidualStream]:
        """`gated_residual_ada_layer_norm` of the sum with an update: h, and the stream x_new. Raises as that does."""
        if self.seen is None or self.y is None or self.gate is None:
            x, h = gated_residual_ada_layer_norm(self.value(), y, gate, shift, scale, bias=bias, eps=eps)
            return h, ResidualStream(x)
        before = (self.x, self.y, self.gate, self.bias)
        eps = check_number("eps", eps, 0)
        decision, eager = _decision(self.x, y, gate, shift, scale, bias)
        if decision is None:
            raise ValueError(
                "stream: expected the update of a sum that its norm has left unwritten to be such a one too"
            )
        operands = (self.seen, y, gate, shift, scale)
        x, h = gated_residual_norm.update_and_norm(decision, operands, bias, eps, eager=eager, before=before)
        return h, ResidualStream(x)

    def updated(self, y: TensorOrDual, gate: TensorOrDual, bias: Tensor | None = None) -> ResidualStream:
        """The stream with an update that is still to be added; there is none before it."""
        if self.y is not None:
            raise ValueError("stream: expected one without an update that is still to be added")
        return ResidualStream(self.x, y, gate, bias)

    def value(self) -> TensorOrDual:
        """The sum, (B, N, D)."""
        if self.y is None or self.gate is None:
            return self.x
        if self.seen is not None:
            raise ValueError("stream: expected an update after its norm, which left the sum unwritten")
        return gated_residual(self.x, self.y, self.gate, bias=self.bias)


def _decision(*arguments: TensorOrDual | None) -> tuple[Decision | None, bool]:
    """The decision for a call of `gated_residual_ada_layer_norm`, and whether the call has a cache key."""
    # None where the sum cannot be left unwritten: on plain PyTorch, where the sum has another dtype than x, and under
    # torch.func, forward mode and for subclasses, where it would not be one op
    decision = gated_residual_norm.checked(*arguments)
    eager = decision is not None
    if decision is None and is_untransformed(*arguments):
        decision = gated_residual_norm.decide(*arguments)
    if decision is not None and (decision.backend == "reference" or not decision.derived[1]):
        decision = None
    return decision, eager
