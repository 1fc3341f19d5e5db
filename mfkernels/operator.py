"""How PyTorch sees the kernels of an op: an `autograd.Function` in eager, a custom op everywhere else.

A custom op is what `torch.compile`, `torch.func`, fake tensors and dispatch modes need: a graph keeps it whole, and it
has a rule for shapes. In plain eager it costs several times an `autograd.Function`, which therefore takes its place
there. Both run the same functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import Function

from ._torch import is_batched, nothing_intercepts

_PLAIN = (Tensor, torch.nn.Parameter)


def runs_plainly(*inputs: Any) -> bool:
    """Whether this is eager PyTorch on tensors that are no more than that, and nothing looks on."""
    if torch.compiler.is_compiling() or not nothing_intercepts():
        return False
    for x in inputs:  # noqa: SIM110 (a generator takes twice as long)
        if type(x) not in _PLAIN and isinstance(x, Tensor):
            return False
    return True


class Operator:
    """An op of (optional) tensors and numbers that returns new tensors.

    Args:
        name: unique in the package.
        run: what it does; its annotations are the custom op's schema.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.name, self.run = name, run
        self.custom_op = torch.library.custom_op(f"mfkernels::{name}", run, mutates_args=())
        self.register_fake = self.custom_op.register_fake
        self.apply: Callable[..., Any] | None = None

    def register_gradients(
        self,
        gradients: Callable[..., tuple[Tensor | None, ...]],
        *,
        keep: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], Sequence[Tensor | None]],
        outputs: int = 1,
    ) -> None:
        """Make the first `outputs` outputs differentiable; the others, tangents among them, are constants.

        Args:
            gradients: called with ctx and the gradients of these outputs (None: not used; not all are); gives those of
                the first inputs, the others have none.
            keep: called with ctx, the inputs and the outputs; gives the tensors that `gradients` finds as
                `ctx.saved_tensors`: nothing of a tangent, so that a dual pass keeps what a plain one does.
        """
        nothing = (None,) * len(inspect.signature(self.run).parameters)

        run = self.run

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            setup_context(ctx, inputs, output)
            return output

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.mark_non_differentiable(*output[outputs:])
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*keep(ctx, inputs, output))

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            grads = grads[:outputs]
            for grad in grads:
                if grad is not None:
                    found = gradients(ctx, *grads)
                    return found + nothing[len(found) :]
            return nothing

        self.custom_op.register_autograd(backward, setup_context=setup_context)
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function = type(self.run.__name__, (Function,), members)
        self.apply = super(Function, function).apply  # type: ignore[misc]  # what `Function.apply` adds is for torch.func

    def __call__(self, *inputs: Any) -> Any:
        return self.eager(*inputs) if runs_plainly(*inputs) else self.custom_op(*inputs)

    def inside(self, *inputs: Any) -> Any:
        """The same within another op, which has a gradient rule of its own."""
        return self.run(*inputs) if runs_plainly(*inputs) else self.custom_op(*inputs)

    def eager(self, *inputs: Any) -> Any:
        """The same for a caller that knows that `runs_plainly` says so."""
        if self.apply is not None:
            return self.apply(*inputs) if torch.is_grad_enabled() else self.run(*inputs)
        # a backward
        if is_batched(inputs[0]):
            return self.custom_op(*inputs)
        if not torch.is_grad_enabled():
            return self.run(*inputs)
        with torch.no_grad():  # create_graph: the inputs need not show that something will be differentiated
            out = self.run(*inputs)
        grads = _Undifferentiable.apply(self.name, torch.zeros((), requires_grad=True), *_as_tuple(out))
        return grads if isinstance(out, tuple) else grads[0]


def _as_tuple(out: Any) -> tuple[Any, ...]:
    return out if isinstance(out, tuple) else (out,)


class _Undifferentiable(Function):
    """Gradients as they are, which are an error to differentiate: taken for constants they would give zeros."""

    @staticmethod
    def forward(ctx: Any, name: str, _: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(
            f"mfkernels.{ctx.name}: a second derivative is not supported; "
            'mfkernels.use_backend("reference") has one, except of attention'
        )


def or_no_rows(y_dot: Tensor | None, y: Tensor) -> Tensor:
    """A tangent of `y`; no rows where there is none, as a custom op has no optional outputs."""
    return y.new_empty((0, *y.shape[1:])) if y_dot is None else y_dot


def rows_of(*tangents: Tensor | None) -> int:
    """How many the tangents have that are not None."""
    return next((dot.shape[0] for dot in tangents if dot is not None), 0)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """The function below as an `Operator`."""
    return lambda run: Operator(name, run)
