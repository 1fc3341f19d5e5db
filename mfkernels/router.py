"""From a public function to the code that serves a call, the same way for every op.

A public function checks its numbers and flags and calls its `DualOp`, which checks the tensors, chooses the backend,
bridges forward mode and returns tensors or Duals. Checks and choice are cached (see calls.py). Differentiability is the
same for every op: the primal is an ordinary differentiable computation, and a tangent is a constant. On the reference
it is computed under no_grad from the rows that have one, and cast to the primal's dtype; of kernels see
`Operator.register_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import choose, recorded, register
from .calls import cache_key, cached, store
from .dual import Dual, TensorOrDual, padded_tangent, primal_of, tangent_rows
from .forward_mode import bridge_forward_mode, plain_forward_mode
from .operator import Operator

Outputs = Sequence[Sequence[int] | None]


class Backend(NamedTuple):
    """Kernels that serve an op.

    operator: called with primals, tangents (None: zero), constants, options and what `derived` returned, each in the
        order of the declaration. It returns a tuple: the outputs, then their tangents (ignored where no operand has
        one).
    unsupported: called with primals and constants by name; why `operator` cannot serve them, or None.
    opt_in: whether it serves only calls that request it by name.
    wrapper: called in the operator's place, with the operator (or its `eager`) before those arguments.
    """

    operator: Operator
    unsupported: Callable[..., str | None]
    opt_in: bool = False
    wrapper: Callable[..., Any] | None = None

    def run(self, *, eager: bool) -> Callable[..., Any]:
        """`eager`: for calls that have a cache key (see calls.py)."""
        call = self.operator.eager if eager else self.operator
        return call if self.wrapper is None else partial(self.wrapper, call)


class Decision(NamedTuple):
    """What is decided for all calls of one cache key: the backend, and the options that `DualOp.derived` returned."""

    backend: str
    derived: tuple[Any, ...]


class DualOp:
    """An op on Tensor | Dual, called with its operands, constants and options, in this order and by position.

    Args:
        name: in requests for a backend and in messages.
        operands: names of the arguments (B, …) that may be Duals.
        constants: names of the tensors, or sizes, that carry no tangent; they may be None.
        check: called with operands and constants; raises where one does not fit. Options (numbers and flags, whose
            values are not in the cache key) are the public function's to check.
        reference: plain PyTorch, called with primals, constants, options and what `derived` returned. It returns the
            output, or a tuple of the outputs and of tensors (B, …) that the tangent reads.
        tangent: of the outputs, called with primals, tangents (None: zero, not all are) and those tensors, all cut to
            the rows that have tangents, then as `reference`; None where `check` lets no tangent pass.
        backends: by name, fastest first; of an op without any, every call is PyTorch's own functions, whose rules of
            forward mode serve constants too.
        outputs: for each output the places of the operands that it depends on; None: on all.
        derived: called with primals and constants; returns further options that follow from their shapes and dtypes.
        prepare: called with all arguments once they have been checked; returns those to go on with.
    """

    def __init__(
        self,
        name: str,
        operands: Sequence[str],
        constants: Sequence[str] = (),
        *,
        check: Callable[..., None],
        reference: Callable[..., Any],
        tangent: Callable[..., Any] | None,
        backends: Mapping[str, Backend] | None = None,
        outputs: Outputs = (None,),
        derived: Callable[..., tuple[Any, ...]] | None = None,
        prepare: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        self.name, self.names, self.outputs = name, (*operands, *constants), outputs
        self.check, self.reference, self.tangent = check, reference, tangent
        self.backends, self.derived, self.prepare = dict(backends or {}), derived, prepare
        self._operands, self._tensors = len(operands), len(self.names)
        self._opt_in = [key for key, backend in self.backends.items() if backend.opt_in]
        self._runs = {
            eager: {key: backend.run(eager=eager) for key, backend in self.backends.items()} for eager in (False, True)
        }
        if self.backends:
            register(name, self.backends)

    def __call__(self, *arguments: Any) -> Any:
        decision = self.checked(*arguments)
        if decision is not None:
            if self.prepare is not None:
                arguments = self.prepare(*arguments)
            return self.run(decision, arguments, eager=True)
        bridge, bridged = bridge_forward_mode, self._operands
        if not self.backends:
            bridge, bridged = plain_forward_mode, self._tensors
        rest = arguments[bridged:]
        return bridge(self.name, lambda *operands: self._run_uncached(*operands, *rest), *arguments[:bridged])

    def checked(self, *arguments: Any) -> Decision | None:
        """Check the arguments; the decision for them, or None where they have no cache key."""
        key = cache_key(self.name, *arguments[: self._tensors])
        decision: Decision | None = cached(key)
        if decision is None:
            self.check(*arguments[: self._tensors])
            if key is None:
                return None
            decision = self.decide(*(arguments if self.prepare is None else self.prepare(*arguments)))
            store(key, decision)
        recorded(self.name, decision.backend)
        return decision

    def decide(self, *arguments: Any) -> Decision:
        """The decision for arguments that have been checked."""
        by_name = {name: primal_of(x) for name, x in zip(self.names, arguments, strict=False)}
        return Decision(self.choose(**by_name), () if self.derived is None else self.derived(**by_name))

    def choose(self, **by_name: Any) -> str:
        """The backend that serves these primals and constants."""
        if not self.backends:
            return recorded(self.name, "reference")
        supports = {key: partial(backend.unsupported, **by_name) for key, backend in self.backends.items()}
        return choose(self.name, by_name[self.names[0]].device, supports, opt_in=self._opt_in)

    def _run_uncached(self, *arguments: Any) -> Any:
        if self.prepare is not None:
            arguments = self.prepare(*arguments)
        return self.run(self.decide(*arguments), arguments, eager=False)

    def run(self, decision: Decision, arguments: tuple[Any, ...], *, eager: bool) -> Any:
        """The call; `eager`: it has a cache key."""
        operands, rest = arguments[: self._operands], arguments[self._operands :] + decision.derived
        if decision.backend == "reference":
            return self._run_reference(operands, rest)
        return run_on_duals(self._runs[eager][decision.backend], operands, rest, self.outputs)

    def _run_reference(self, operands: tuple[TensorOrDual, ...], rest: tuple[Any, ...]) -> Any:
        primals = [primal_of(x) for x in operands]
        found = self.reference(*primals, *rest)
        count = len(self.outputs)
        outs, kept = (found[:count], found[count:]) if isinstance(found, tuple) else ((found,), ())
        rows = tangent_rows(*operands)
        dots: Sequence[Tensor | None] = (None,) * count
        if rows is not None and self.tangent is not None:
            with torch.no_grad():
                tangents = [padded_tangent(x, rows) for x in operands]
                found = self.tangent(
                    *(_first(x, rows) for x in primals), *tangents, *(_first(x, rows) for x in kept), *rest
                )
                dots = found if isinstance(found, tuple) else (found,)
                dots = [None if dot is None else dot.to(y.dtype) for y, dot in zip(outs, dots, strict=True)]
        return _packed(outs, dots, operands, self.outputs, rows)


def run_on_duals(
    run: Callable[..., Any], operands: Sequence[TensorOrDual], rest: Sequence[Any], outputs: Outputs = (None,)
) -> Any:
    """The outputs of a backend's `run`, tensors or Duals as the operands that they depend on are."""
    count, dual, rows = len(outputs), False, None  # rows: as `tangent_rows`
    for x in operands:
        if isinstance(x, Dual):
            dual, dot = True, x[1]
            if dot is not None and (rows is None or dot.shape[0] > rows):
                rows = dot.shape[0]
    if not dual:
        found = run(*operands, *_NOTHING[: len(operands)], *rest)
        return found[0] if count == 1 else found[:count]
    primals, tangents = [], []
    for x in operands:
        p, dot = x if isinstance(x, Dual) else (x, None)
        if dot is not None and rows is not None and dot.shape[0] != rows:
            dot = padded_tangent(x, rows)
        primals.append(p)
        tangents.append(dot)
    found = run(*primals, *tangents, *rest)
    if count == 1 and outputs[0] is None:
        return Dual(found[0], None if rows is None else found[1])
    return _packed(found[:count], found[count : 2 * count], operands, outputs, rows)


_NOTHING = (None,) * 16


def _packed(
    outs: Sequence[Tensor],
    dots: Sequence[Tensor | None],
    operands: Sequence[TensorOrDual],
    outputs: Outputs,
    rows: int | None,
) -> Any:
    """Tensors or Duals of outputs and tangents; `rows`: of the longest tangent of all operands."""
    joined: list[TensorOrDual] = []
    for y, dot, places in zip(outs, dots, outputs, strict=True):
        needed = operands if places is None else [operands[place] for place in places]
        for x in needed:
            if isinstance(x, Dual):
                break
        else:
            joined.append(y)
            continue
        own_rows = rows if places is None else tangent_rows(*needed)
        if own_rows is None or dot is None:
            joined.append(Dual(y))
        else:
            joined.append(Dual(y, dot if own_rows == rows else dot[:own_rows]))
    return joined[0] if len(joined) == 1 else tuple(joined)


def _first(x: Tensor, rows: int) -> Tensor:
    return x if x.shape[0] == rows else x[:rows]
