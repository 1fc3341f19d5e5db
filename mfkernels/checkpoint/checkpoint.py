from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpoint_and_recompute_all
from torch.utils.checkpoint import noop_context_fn

from .._torch import tree_flatten, tree_unflatten
from ..dual import Dual

M = TypeVar("M", bound=nn.Module)


def checkpoint(fn: Callable[..., Any], *args: Any, preserve_rng_state: bool = True, **kwargs: Any) -> Any:
    """`fn(*args, **kwargs)`, of which the tape keeps the primal inputs alone; the backward recomputes the primal.

    On Duals the forward computes tangents as usual. They are constants of the loss, so the recompute runs `fn` on plain
    tensors: no tangent is stored and no tangent rule runs again. Built on `torch.utils.checkpoint` (non-reentrant), and
    so works in DDP and FSDP2. In a compiled region it is that function itself: the compiler drops the tangents
    from the recompute, as nothing in the backward reads them.

    Args:
        fn: function or module of tensors and Duals. Its primal must not depend on whether its arguments are Duals, and
            its backward must keep the same tensors in either case; every function of this package holds to that.
        *args, **kwargs: passed to `fn`; tensors and Duals may stand in any pytree.
        preserve_rng_state: give the recompute the random state of the forward, so that dropout draws the same mask.

    Raises:
        torch.utils.checkpoint.CheckpointError: in the backward, where `fn` kept other tensors in the recompute.
    """
    if not torch.is_grad_enabled():
        return fn(*args, **kwargs)  # nothing is kept, so there is nothing to recompute
    if torch.compiler.is_compiling():
        return checkpoint_and_recompute_all(
            fn, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, **kwargs
        )
    leaves, spec = tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Dual))
    return checkpoint_and_recompute_all(
        _PrimalOnSecondCall(fn, leaves, spec),
        *(leaf.primal if isinstance(leaf, Dual) else leaf for leaf in leaves),
        use_reentrant=False,
        context_fn=noop_context_fn,
        preserve_rng_state=preserve_rng_state,
    )


class _PrimalOnSecondCall:
    """`fn` on Duals at the first call, which is the forward, and on their primals from then on."""

    def __init__(self, fn: Callable[..., Any], leaves: list[Any], spec: Any) -> None:
        self.fn, self.spec = fn, spec
        # position: tangent. Only until the first call: the tape keeps this object
        self.tangents: dict[int, Tensor | None] | None = {
            i: leaf.tangent for i, leaf in enumerate(leaves) if isinstance(leaf, Dual)
        }

    def __call__(self, *leaves: Any) -> Any:
        tangents, self.tangents = self.tangents or {}, None
        duals = [Dual(leaf, tangents[i]) if i in tangents else leaf for i, leaf in enumerate(leaves)]
        args, kwargs = tree_unflatten(duals, self.spec)
        return self.fn(*args, **kwargs)


def checkpoint_module(module: M) -> M:
    """Make every call of `module` a `checkpoint`, in place; its class, parameters and their names stay as they are.

    The recompute runs inside the module's own hooks: those of wrappers around it (`fully_shard`, DDP) fire once, and
    inputs that they cast arrive in the recompute as they did in the forward.

    Raises:
        TypeError: `module` is not a module.
        ValueError: it is checkpointed already.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module.__dict__.get("forward"), _CheckpointedForward):
        raise ValueError(f"module: this {type(module).__name__} is checkpointed already")
    module.forward = _CheckpointedForward(module.forward)
    return module


class _CheckpointedForward:
    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.forward, *args, **kwargs)
