"""What is known of each ATen operator: its rule, and whether it makes views, writes in place or is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from .. import _torch
from .call import Call, Out
from .rules import RULES, constant, foreign, rule_for


class Operator(NamedTuple):
    """name: without overload and trailing underscore.

    reshapes: changes its first argument's shape in place.
    functional: of an operator that writes into its first argument, the one that does not.
    refusal: why it cannot take an operand that carries a tangent.
    """

    name: str
    rule: Callable[[Call, Any], list[Out]]
    constant: bool
    view: bool
    in_place: bool
    reshapes: bool
    functional: Any
    refusal: str | None


NUMBER = (
    "a number taken out of a tensor has no derivative, so what is computed from it would lack one; keep it a tensor, "
    "or detach() it if it is a constant by design"
)
MEMORY = "it sees a tensor's memory, where its tangent is not; reshape, index or slice it instead"
RESHAPES = (
    "it changes in place the shape of a tensor that is a view or has views, through which autograd cannot go back then;"
    " take the function without the underscore"
)
_FAST_PATH = (
    "PyTorch's fused transformer layer has no forward-mode rule; torch.backends.mha.set_fastpath_enabled(False) gives "
    "the layer's own operations"
)
_REFUSED = {
    "_local_scalar_dense": NUMBER,
    **dict.fromkeys(("as_strided", "as_strided_", "set_", "resize_", "resize_as_", "as_strided_scatter"), MEMORY),
    "mkldnn_rnn_layer": "oneDNN's LSTM has no forward-mode rule; torch.backends.mkldnn.flags(enabled=False) avoids it",
    **dict.fromkeys(("_transformer_encoder_layer_fwd", "_native_multi_head_attention"), _FAST_PATH),
}
# What is a view to PyTorch and a copy here: below autograd nobody resolves what is marked as conjugate or negative.
APART = frozenset(["_conj", "_neg_view"])
_SHOWN = {"_local_scalar_dense": "item"}


def _out_of_place(name: str, func: Any) -> Any:
    """The operator `name` that takes what `func` takes: of the same overload name, but for transpose.int."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or hasattr(packet, _torch.overload_of(func)):
        return packet and getattr(packet, _torch.overload_of(func))
    overloads, types = (getattr(packet, o) for o in packet.overloads()), _types(func)
    return next((o for o in overloads if _types(o) == types), None)


def _types(func: Any) -> list[str]:
    return [str(a.type) for a in _torch.schema_of(func).arguments]


@cache
def operator(func: Any) -> Operator:
    """What is known of an OpOverload."""
    arguments = _torch.schema_of(func).arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    aliased = any(a.alias_info is not None and not a.alias_info.is_write for a in arguments)
    packet = func.overloadpacket.__name__
    in_place = written == [0] and not arguments[0].kwarg_only
    name = packet.removesuffix("_") if in_place else packet
    refusal = _REFUSED.get(packet)
    functional = None
    if func.namespace != "aten":
        if written:
            refusal = f"{func} writes into a tensor and has no forward-mode (JVP) rule"
        return Operator(str(func), foreign, False, False, in_place, False, None, refusal)
    if refusal is None and any(arguments[i].kwarg_only for i in written):
        refusal = "out= is not supported; use the result it returns"
    if in_place and refusal is None:
        functional = _out_of_place(name, func)
        if functional is None and RULES.get(name) is not constant:
            refusal = "it writes in place, and dualize knows no operator that does the same out of place"
    view = aliased and not written and name not in APART
    rule = rule_for(name, functional or func, view)
    name = _SHOWN.get(name, name)
    reshapes = functional is not None and rule is not constant and torch.Tag.inplace_view in func.tags
    return Operator(name, rule, rule is constant and not in_place, view, in_place, reshapes, functional, refusal)
