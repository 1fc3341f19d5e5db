"""How PyTorch sees the kernels of an op: an `autograd.Function` in eager, a custom op everywhere else.

A custom op is what `torch.compile`, `torch.func`, fake tensors and dispatch modes need: a graph keeps it whole, and it
has a fake implementation. In plain eager a call of one costs several times a call of an `autograd.Function`, which
therefore takes its place there. Both run the same functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import Function

from ._torch import is_batched, nothing_intercepts
from .calls import PLAIN


def is_plain_eager(*inputs: Any) -> bool:
    """Whether no compiler, transform or dispatch mode is active, and no input is a tensor subclass."""
    if torch.compiler.is_compiling() or not nothing_intercepts():
        return False
    for x in inputs:  # noqa: SIM110 (a generator takes twice as long)
        if type(x) not in PLAIN and isinstance(x, Tensor):
            return False
    return True


class Operator:
    """An operator on (optional) tensors and numbers that returns new tensors.

    Args:
        name: unique in the package.
        run: the implementation; its annotations are the custom op's schema.
        outputs_like: names of tensors among the inputs whose shapes and dtypes the outputs have, one by one, in
            contiguous memory; where they have others, `register_fake` takes a function as that of a custom op does.
    """

    def __init__(self, name: str, run: Callable[..., Any], outputs_like: Sequence[str] = ()) -> None:
        self.name, self.run = name, run
        self.custom_op = torch.library.custom_op(f"mfkernels::{name}", run, mutates_args=())
        self.register_fake = self.custom_op.register_fake
        self.apply: Callable[..., Any] | None = None
        if outputs_like:
            names = list(inspect.signature(run).parameters)
            places = [names.index(like) for like in outputs_like]

            def fake(*inputs: Any) -> Any:
                outputs = tuple(inputs[place].new_empty(inputs[place].shape) for place in places)
                return outputs if len(outputs) > 1 else outputs[0]

            self.register_fake(fake)

    def register_gradients(
        self,
        gradients: Callable[..., tuple[Tensor | None, ...]],
        *,
        save: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], Sequence[Tensor | None]],
        outputs: int = 1,
    ) -> None:
        """Make the first `outputs` outputs differentiable; the others, tangents among them, are constants.

        Args:
            gradients: called with ctx and the gradients of these outputs (None: not used; not all are); returns those
                of the first inputs, the others have none.
            save: called with ctx, the inputs and the outputs; returns the tensors for `ctx.save_for_backward`, none of
                them a tangent, so that a dual pass saves what a plain one does.
        """
        run, nothing = self.run, (None,) * len(inspect.signature(self.run).parameters)

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            setup_context(ctx, inputs, output)
            return output

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.mark_non_differentiable(*output[outputs:])
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*save(ctx, inputs, output))

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
        return self.eager(*inputs) if is_plain_eager(*inputs) else self.custom_op(*inputs)

    def nested(self, *inputs: Any) -> Any:
        """A call inside another operator, which has the gradients: without an autograd node of its own."""
        return self.run(*inputs) if is_plain_eager(*inputs) else self.custom_op(*inputs)

    def visible_to_modes(self, *inputs: Any) -> Any:
        """A call of the autograd function under dispatch modes too, and of the custom op under a compiler alone.

        So a FLOP counter, which has no formula for custom ops, sees the products inside. For inputs that
        `calls.is_untransformed`.
        """
        return self.custom_op(*inputs) if torch.compiler.is_compiling() else self.eager(*inputs)

    def eager(self, *inputs: Any) -> Any:
        """A call by someone who knows that it `is_plain_eager`."""
        if self.apply is not None:
            return self.apply(*inputs) if torch.is_grad_enabled() else self.run(*inputs)
        # a backward
        if is_batched(inputs[0]):
            return self.custom_op(*inputs)
        if not torch.is_grad_enabled():
            return self.run(*inputs)
        with torch.no_grad():  # create_graph: the inputs need not show that something will be differentiated
            out = self.run(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        grads = _Undifferentiable.apply(self.name, torch.zeros((), requires_grad=True), *outs)
        return grads if isinstance(out, tuple) else grads[0]


class _Undifferentiable(Function):
    """Gradients as they are, with a backward that raises: as constants they would have zero gradients silently."""

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


def tangent_or_empty(y_dot: Tensor | None, y: Tensor) -> Tensor:
    """`y_dot`, or a tangent of `y` with no rows in place of None, as a custom op has no optional outputs."""
    return y.new_empty((0, *y.shape[1:])) if y_dot is None else y_dot


def num_tangent_rows(*tangents: Tensor | None) -> int:
    """The rows of those tangents that are not None, which have the same number; 0 where all are None."""
    return next((dot.shape[0] for dot in tangents if dot is not None), 0)


def operator(name: str, *, outputs_like: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """The function below as an `Operator`."""
    return lambda run: Operator(name, run, outputs_like)
