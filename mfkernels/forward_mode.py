"""Tangents of `torch.func.jvp` and `forward_ad` on plain tensors: one bridge to Duals for every op.

Value and tangent are the op's, as on Duals. The tangent is a constant for reverse mode: a gradient that is asked for
through it is an error, and so is its own derivative in forward mode. Both would otherwise be zero without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from ._torch import nothing_intercepts
from .dual import Dual


class CarriesTangent(Tensor):
    """A tensor that carries its tangent through an ordinary module: see `dualize`."""

    def through(self, run: Callable[..., Any], operands: Sequence[Any]) -> Any:
        """`run(*operands)` with Duals in place of these tensors, and these tensors in place of the Duals it returns."""
        raise NotImplementedError


def carries_tangent(x: Any) -> bool:
    """Whether `x` is a tensor that has a tangent without being a Dual: one of forward mode or of a dualized module."""
    if isinstance(x, CarriesTangent):
        return True
    return isinstance(x, Tensor) and x.is_floating_point() and fwAD.unpack_dual(x).tangent is not None


# ------------------------------------------------------------------------------------------------------------ the ops'


def bridge_forward_mode(op: str, run: Callable[..., Any], *operands: Any) -> Any:
    """`run(*operands)`, where plain tensors may carry tangents of `torch.func.jvp`, `forward_ad` or a dualized module.

    Custom ops drop those without a word. Here `run` gets them as Duals, and the tangents of what it returns (a tensor,
    a Dual or a tuple of these) go back to forward mode, where a gradient through them is an error that names `op`.
    """
    if any(isinstance(x, Dual) for x in operands):
        _refuse_mixed(op, operands)
        return _run(op, run, operands)

    carrier = next((x for x in operands if isinstance(x, CarriesTangent)), None)
    if carrier is not None:
        return carrier.through(run, operands)

    if _no_forward_mode():
        return run(*operands)
    pairs = [fwAD.unpack_dual(x) for x in operands]
    if all(t is None for _, t in pairs):
        return _run(op, run, operands)
    for p, t in pairs:
        if t is not None:
            _refuse_second_derivative(op, p, t)

    def back(out: Any) -> Any:
        if not isinstance(out, Dual):
            return tuple(map(back, out)) if isinstance(out, tuple) else out
        if out.tangent is None:
            return out.primal
        return fwAD.make_dual(out.primal, _constant(out.tangent, out.primal, op))

    return back(_run(op, run, [p if t is None else Dual(p, t.detach()) for p, t in pairs]))


def _run(op: str, run: Callable[..., Any], operands: Sequence[Any]) -> Any:
    try:
        return run(*operands)
    except RuntimeError as error:
        if torch.compiler.is_compiling() or not _is_torch_func(error):
            raise
        raise NotImplementedError(
            f"mfkernels.{op}: torch.func.grad and its kin are not supported by this backend; take torch.autograd.grad "
            'or backward(), or mfkernels.use_backend("reference")'
        ) from error


def _is_torch_func(error: RuntimeError) -> bool:
    """Whether PyTorch says that a custom op has no backward under torch.func.grad."""
    return "setup_context" in str(error)


def plain_forward_mode(op: str, run: Callable[..., Any], *operands: Any) -> Any:
    """The same for an op that is PyTorch's own functions: their rules make the tangent, through parameters too."""
    if any(isinstance(x, Dual) for x in operands):
        _refuse_mixed(op, operands)
        return run(*operands)
    out = run(*operands)
    if isinstance(out, CarriesTangent) or not torch.is_grad_enabled() or _no_forward_mode():
        return out
    p, t = fwAD.unpack_dual(out)
    if t is None:
        return out
    _refuse_second_derivative(op, p, t)
    return fwAD.make_dual(p, _constant(t.detach(), p, op))


def _no_forward_mode() -> bool:
    """Whether no tensor can have a tangent of forward mode: asking each takes microseconds."""
    return not torch.compiler.is_compiling() and nothing_intercepts()


def refuse_tangent(name: str, x: Any, kind: str) -> None:
    """Raise if `x`, a parameter or the like as `kind` says, carries a tangent of forward mode."""
    if carries_tangent(x):
        raise NotImplementedError(f"{name}: a forward-mode tangent of a {kind} is not supported")


def _refuse_mixed(op: str, operands: tuple[Any, ...]) -> None:
    if any(carries_tangent(part) for x in operands for part in (x if isinstance(x, Dual) else (x,))):
        raise NotImplementedError(
            f"mfkernels.{op}: forward-mode tangents (torch.func.jvp, forward_ad) and Duals cannot be mixed in one "
            "call; give every tangent as a Dual, or every one to forward mode"
        )


# ------------------------------------------------------------------------------------------- the tangent is a constant


def _refuse_second_derivative(op: str, p: Tensor, t: Tensor) -> None:
    """Raise if `p` or `t` carries a tangent of another level of forward mode, which would be dropped."""
    try:
        with torch.no_grad():
            # any operator without a forward-mode rule
            torch.ops.aten.silu_backward(t.reshape(-1)[:0], p.reshape(-1)[:0])
    except NotImplementedError as error:
        raise NotImplementedError(
            f"mfkernels.{op}: the derivative of a forward-mode tangent (torch.func.jvp inside torch.func.jvp) is not "
            "supported: tangents are constants by design"
        ) from error


def _constant(tangent: Tensor, primal: Tensor, op: str) -> Tensor:
    """`tangent` so that a backward pass that reaches it raises: a gradient of zero would be silent."""
    # inside torch.func.jvp `requires_grad` is not that of the caller's tensor, so it is not used
    if not torch.is_grad_enabled():
        return tangent
    compiled = torch.compiler.is_compiling()
    try:
        return _barrier(tangent, primal, op, compiled)
    except RuntimeError as error:
        if compiled or not _is_torch_func(error):
            raise
    return _Barrier.apply(tangent, primal, op)  # under torch.func.grad, and ten times slower


@torch.library.custom_op("mfkernels::tangent_barrier", mutates_args=())
def _barrier(tangent: Tensor, primal: Tensor, op: str, compiled: bool) -> Tensor:
    return tangent.clone()


@_barrier.register_fake
def _(tangent, primal, op, compiled):  # type: ignore[no-untyped-def]
    return torch.empty_like(tangent)


@_barrier.register_vmap
def _(info, in_dims, tangent, primal, op, compiled):  # type: ignore[no-untyped-def]
    try:
        return _constant(tangent, primal, op), in_dims[0]
    except NotImplementedError as error:
        raise NotImplementedError(
            f"mfkernels.{op}: torch.func.grad of torch.func.vmap of a forward-mode tangent is not supported: tangents "
            "are constants by design"
        ) from error


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.op, ctx.compiled = inputs[2], len(inputs) > 3 and inputs[3]
    ctx.set_materialize_grads(False)


def _backward_rule(ctx, grad):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 4
    if ctx.compiled:
        return None, _gradient_of_constant(grad, ctx.op), None, None
    raise _refusal(ctx.op)


_barrier.register_autograd(_backward_rule, setup_context=_setup_context)


class _Barrier(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tangent: Tensor, primal: Tensor, op: str) -> Tensor:
        return tangent.clone()

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return _backward_rule(ctx, grad)[:3]


@torch.library.custom_op("mfkernels::gradient_of_constant", mutates_args=())
def _gradient_of_constant(grad: Tensor, op: str) -> Tensor:
    """Compiled regions run the backward of every output that requires grad, with zeros for those that are not used."""
    if grad.is_cuda and torch.cuda.is_current_stream_capturing():  # nothing may be read back
        return torch.where(grad == 0, 0.0, torch.nan).to(grad.dtype)
    if grad.any():
        raise _refusal(op)
    return torch.zeros_like(grad)


@_gradient_of_constant.register_fake
def _(grad, op):  # type: ignore[no-untyped-def]
    return torch.empty_like(grad)


def _refusal(op: str) -> RuntimeError:
    return RuntimeError(
        f"mfkernels.{op}: a gradient was asked for through its forward-mode tangent, which is a constant by design "
        "(stop-gradient, as in MeanFlow's target). Detach the tangent before it enters the loss"
    )
