"""What `python -m mfkernels.check` runs: cases of ops, each with the same formula in plain PyTorch.

Each op declares its own in `cases.py` of its folder: `CASES`, by name. A formula shares no code with its op: in float64
it is the oracle; in a case's own dtype and on its own device it is what the op's error is measured against.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dual import Dual, padded_tangent, primal_of, tangent_of
from ..folders import modules_of_ops
from ..testing import dual_errors

# What every bound has beside twice plain PyTorch's error, which may be none by luck (one token, one channel).
# In eps of the dtype: the rounding of the result is half an eps; Triton's interpreter cuts bfloat16 off, which is one.
FLOOR = 1.0
# In eps of float32 (of float64 in float64), in which sums are taken in half precision too: sums in another order, and
# functions that are right to an ulp or two. Measured: the gradient of one time over 100 features, 1.3 where plain
# PyTorch's is 0.1.
NOISE = 4.0

EPS = 1e-6  # of the norms
Inputs = Mapping[str, Tensor]

# --------------------------------------------------------------------------------------------------------------- a case


class Calls(NamedTuple):
    """What is timed: no call reads a result back, so that each can be recorded into a CUDA graph."""

    dual_forward: Callable[[], object]
    forward_backward: Callable[[], object]
    plain_jvp: Callable[[], object]
    plain_forward_backward: Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One op at one size.

    size: in words.
    make: float64 inputs by name, from a generator.
    duals: those of them that carry tangents.
    ours, formula: the op and the plain formula; both are called with the inputs by keyword and have one output.
    part: cases of one op and different parts may be run by different processes.
    noise: of the bounds, see NOISE.
    constants: tensors by name that both functions take as they are, in whatever dtype the case is.
    """

    size: str
    make: Callable[[torch.Generator], Inputs]
    duals: Sequence[str]
    ours: Callable[..., Any]
    formula: Callable[..., Any]
    part: str = ""
    noise: float = NOISE
    constants: Inputs = field(default_factory=dict)

    def on(self, device: torch.device | str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` with the constants, which are on the device already when it is called."""
        return partial(fn, **{name: x.to(device) for name, x in self.constants.items()})

    def inputs(self, device: torch.device | str = "cpu") -> Inputs:
        return self.make(torch.Generator(device).manual_seed(0))

    def rows(self) -> list[tuple[int, int]]:
        """No, some and all rows with tangents, each beside the number of all."""
        batch = self.inputs()[self.duals[0]].shape[0]
        return [(rows, batch) for rows in sorted({0, batch // 2, batch})]

    def errors(self, rows: int, dtype: torch.dtype, device: torch.device, *, plain: bool) -> dict[str, float]:
        """Errors by quantity of the op, or of the plain formula, against the formula in float64; see `dual_errors`."""
        return dual_errors(
            partial(self._plain, self.on(device, self.formula)) if plain else self.on(device, self.ours),
            self.on("cpu", self.formula),
            self.inputs(),
            duals=self.duals,
            rows=rows,
            dtype=dtype,
            device=device,
        )

    def _plain(self, formula: Callable[..., Tensor], **operands: Tensor | Dual) -> Dual:
        """The formula on Duals: `torch.func.jvp` makes the tangent."""
        primals = {name: primal_of(x) for name, x in operands.items()}
        of_duals = tuple(primals[name] for name in self.duals)
        with torch.no_grad():
            tangents = tuple(padded_tangent(operands[name], of_duals[0].shape[0]) for name in self.duals)
            out_dot = torch.func.jvp(self._of_duals(formula, primals), of_duals, tangents)[1]
        rows = tangent_of(operands[self.duals[0]])
        return Dual(formula(**primals), None if rows is None else out_dot[: rows.shape[0]])

    def _of_duals(self, formula: Callable[..., Tensor], primals: Inputs) -> Callable[..., Tensor]:
        return lambda *xs: formula(**{**primals, **dict(zip(self.duals, xs, strict=True))})

    def calls(self, dtype: torch.dtype, device: torch.device) -> Calls:
        """Our dual forward, all rows with tangents, and our forward and backward without; and plain PyTorch's."""
        leaves = {name: x.to(dtype).requires_grad_() for name, x in self.inputs(device).items()}
        primals = {name: x.detach() for name, x in leaves.items()}
        of_duals = tuple(primals[name] for name in self.duals)
        tangents = tuple(torch.randn_like(x) for x in of_duals)
        duals = {name: Dual(primals[name], dot) for name, dot in zip(self.duals, tangents, strict=True)}
        ours, formula = self.on(device, self.ours), self.on(device, self.formula)

        @torch.no_grad()
        def dual_forward() -> object:
            return ours(**{**primals, **duals})

        def plain_jvp() -> object:
            return torch.func.jvp(self._of_duals(formula, primals), of_duals, tangents)

        return Calls(dual_forward, _backward_of(ours, leaves), plain_jvp, _backward_of(formula, leaves))


def _backward_of(fn: Callable[..., Tensor], leaves: Inputs) -> Callable[[], object]:
    with torch.no_grad():
        cotangent = torch.randn_like(fn(**leaves))

    def run() -> object:
        return torch.autograd.grad(fn(**leaves), list(leaves.values()), cotangent)

    return run


# --------------------------------------------------------------------------------------- what ops share in their cases


def joined(outs: Iterable[Tensor | Dual], dim: int) -> Tensor | Dual:
    """Several outputs as one, so that one check sees them all; Duals with the same rows."""
    outs = list(outs)
    primal = torch.cat([primal_of(x) for x in outs], dim)
    if not any(isinstance(x, Dual) for x in outs):
        return primal
    tangents = [x for x in map(tangent_of, outs) if x is not None]
    return Dual(primal, torch.cat(tangents, dim) if tangents else None)


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)


class OpCases(NamedTuple):
    """The cases of an op.

    make: a case of a given size.
    small: run on every machine, on a CPU too, where they may be interpreted. Sizes are multiples of nothing.
    large: run on a GPU alone.
    timed: a realistic size, for a CPU and for a GPU.
    """

    make: Callable[..., Case]
    small: Sequence[Case]
    large: Sequence[Case]
    timed: tuple[Case, Case]


TIMED_TOKENS = (2, 64, 96), (32, 256, 1152)


def _of_tokens(make: Callable[..., Case], timed: Sequence[tuple[int, ...]]) -> OpCases:
    """At sizes B, N, D. 1152 is DiT-XL's, whose kernels the timings on a GPU find compiled."""
    on_cpu, on_gpu = timed
    return OpCases(make, [make(3, 63, 100), make(2, 1, 2730)], [make(2, 100, 1152)], (make(*on_cpu), make(*on_gpu)))


def token_cases(ours: Callable[..., Any], formula: Callable[..., Tensor], names: str) -> OpCases:
    """Of x and y [B, N, D] and of modulation [B, D], which is cut out of one wide tensor, as in a DiT block."""

    def make(B: int, N: int, D: int) -> Case:
        def inputs(generator: torch.Generator) -> Inputs:
            gate, shift, scale = random(generator, B, 6 * D).chunk(6, 1)[2:5]  # [B, D]
            x, y = random(generator, 2, B, N, D)  # [B, N, D]
            every = {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale}
            return {name: every[name] for name in names.split()}

        return Case(f"B={B} N={N} D={D}", inputs, names.split(), ours, formula)

    return _of_tokens(make, TIMED_TOKENS)


def channel_cases(
    ours: Callable[..., Any],
    formula: Callable[..., Tensor],
    names: str,
    weight: str = "",
    timed: Sequence[tuple[int, ...]] = TIMED_TOKENS,
) -> OpCases:
    """Of some tensors [B, N, D] and one `weight` [D] without a tangent (none where it is "")."""

    def make(B: int, N: int, D: int) -> Case:
        def inputs(generator: torch.Generator) -> Inputs:
            tensors = {name: random(generator, B, N, D) for name in names.split()}  # [B, N, D]
            return {**tensors, weight: 1 + 0.3 * random(generator, D)} if weight else tensors  # [D]

        return Case(f"B={B} N={N} D={D}", inputs, names.split(), ours, formula)

    return _of_tokens(make, timed)


# ------------------------------------------------------------------------------------------------------- those of an op


@functools.cache
def cases_by_op() -> dict[str, OpCases]:
    return {op: cases for module in modules_of_ops("cases") for op, cases in module.CASES.items()}


def cases_of(op: str, device: str, part: str | None = None) -> list[Case]:
    """The op's cases for the device, of one part or of all."""
    cases = cases_by_op()[op]
    found = [*cases.small, *([] if device == "cpu" else cases.large)]
    return [case for case in found if part is None or case.part == part]


def timed_case(op: str, device: torch.device) -> Case:
    return cases_by_op()[op].timed[device.type == "cuda"]
