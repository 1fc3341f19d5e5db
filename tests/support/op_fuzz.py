"""Random calls of every public op, right and wrong ones, against plain formulas in float64.

PYTHONPATH=.:tests/support python -m op_fuzz 20000                        # seeds 0 to 19999, a table, status 0 or 1
PYTHONPATH=.:tests/support python -m op_fuzz --backend triton 20000       # on a CPU with TRITON_INTERPRET=1
PYTHONPATH=.:tests/support python -m op_fuzz --seed 17                    # one seed, its call and what came

A call is right (value, tangent and every gradient within their bounds), refused (an error that begins with the name of
an argument or of the op), wrong, or crashed (any other error). A call with a bad argument must be refused.
"""

from __future__ import annotations

import argparse
import collections
import functools
import math
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from op_calls import DEVICE, OPS, Call, Draw, damaged, laid_out
from torch import Tensor

import mfkernels
from mfkernels import Dual
from mfkernels._torch import TorchDispatchMode, schema_of, tree_map
from mfkernels.dual import primal_of, tangent_of

DTYPES = {
    "reference": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
}


@dataclass
class Outcome:
    """kind: right, refused, wrong or crashed."""

    seed: int
    call: str
    kind: str
    what: str = ""


def one(seed: int, backend: str) -> Outcome:
    """Draw a call, make it, and judge it."""
    d = Draw(seed)
    call = OPS[d.choice(sorted(OPS))](d)
    dtype = d.choice(DTYPES[backend])
    how = d.choice(("duals", "duals", "forward mode", "tensors"))
    low: dict[str, Any] = {}
    for name, x in call.inputs.items():
        wide = name in ("cos", "sin") and dtype != torch.float64
        low[name] = None if x is None else laid_out(d, x.to(DEVICE, torch.float32 if wide else dtype)).detach()
    for name, x in low.items():
        if x is not None and name not in call.constants:
            if how == "forward mode" and 0 in x.stride():  # PyTorch's make_dual writes into what has its strides
                low[name] = x.contiguous()
            low[name].requires_grad_()
    rows = _draw_rows(d, call)
    dots = {name: None if n is None else laid_out(d, _tangent(d, low[name], n)) for name, n in rows.items()}
    given, options = dict(low), dict(call.options)
    if how == "duals":
        given |= {name: Dual(low[name], t) for name, t in dots.items()}
    harm = damaged(d, call, given, options) if d.random() < 0.2 else ""
    name = f"{call}, {str(dtype)[6:]}, {how}, rows {rows}" + (f", bad {harm}" if harm else "")

    try:
        with mfkernels.use_backend(backend):
            if how == "forward mode" and not harm:
                dots = {name: t for name, t in dots.items() if t is not None and t.shape == low[name].shape}
                outs = _forward_mode(call, low, dots, options)
            else:
                outs = _outputs(call.ours(given, options))
            grads = _gradients(d, call, low, outs) if not harm else None
    except (TypeError, ValueError, NotImplementedError) as error:
        return _judged(seed, call, name, error, harm)
    except Exception as error:
        return Outcome(seed, name, "crashed", f"{type(error).__name__}: {_first_line(error)}")
    if harm:
        return Outcome(seed, name, "wrong", "was not refused")
    if how == "tensors":
        dots = {}
    what = _compared(call, low, dots, outs, grads, dtype)
    return Outcome(seed, name, "wrong" if what else "right", what)


def _draw_rows(d: Draw, call: Call) -> dict[str, int | None]:
    """Tangent rows of the inputs that are to be Duals: none, some, all; None is a tangent of None."""
    rows: dict[str, int | None] = {}
    for name in call.duals:
        B = call.inputs[name].shape[0]
        if d.random() < 0.8:
            rows[name] = d.choice((None, 0, d.randint(0, B), B, B))
    return rows


def _tangent(d: Draw, x: Tensor, rows: int) -> Tensor:
    return d.tensor(rows, *x.shape[1:]).to(x.device, x.dtype)


def _outputs(out: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Primals and tangents of what an op returned."""
    outs = [out] if isinstance(out, (Tensor, Dual)) else list(out)
    return [(primal_of(o), tangent_of(o)) for o in outs]


def _forward_mode(call: Call, low: Mapping[str, Any], dots: Mapping[str, Tensor], options: Any) -> Any:
    """Tangents by forward_ad; the gradient is the primal's."""
    with fwAD.dual_level():
        made = {name: fwAD.make_dual(low[name], t) for name, t in dots.items()}
        out = call.ours({**low, **made}, options)
        pairs = [fwAD.unpack_dual(o) for o in ([out] if isinstance(out, Tensor) else out)]
        return [(p, None if t is None else t.detach()) for p, t in pairs]


def _gradients(d: Draw, call: Call, low: Mapping[str, Any], outs: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """Cotangents, and the gradients of the inputs that have one."""
    cotangents = [d.tensor(*p.shape).to(p.device, p.dtype) for p, _ in outs]
    used = [(p, c) for (p, _), c in zip(outs, cotangents, strict=True) if p.requires_grad]
    leaves = [x for x in low.values() if x is not None and x.requires_grad]
    if not used:
        return cotangents, [None] * len(leaves)
    return cotangents, list(torch.autograd.grad([p for p, _ in used], leaves, [c for _, c in used], allow_unused=True))


def _judged(seed: int, call: Call, name: str, error: Exception, harm: str) -> Outcome:
    named = re.match(r"(mfkernels\.)?([a-zA-Z_0-9]+)(\.\w+)?(, \w+)*: ", str(error))
    known = {call.op, *call.inputs, *call.options}
    if call.op == "scaled_dot_product_attention":
        known |= {"attention", "q", "k", "v"}
    if named is None or named[2] not in known:
        return Outcome(seed, name, "crashed", f"{type(error).__name__}: {_first_line(error)}")
    # a backend says what it does not serve; anything else that is refused has to be bad
    served = harm or isinstance(error, NotImplementedError)
    return Outcome(seed, name, "refused" if served else "wrong", _first_line(error))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


# ------------------------------------------------------------------------------------------------------- what is right


def _truth(call: Call, inputs: Mapping[str, Any], dots: Mapping[str, Tensor], cotangents: list[Tensor]) -> Any:
    """Values, tangents and gradients of the formula on plain tensors, in their dtype."""
    leaves = {
        name: None if x is None else x.detach().clone().requires_grad_(name not in call.constants)
        for name, x in inputs.items()
    }

    def run(*xs: Tensor) -> tuple[Tensor, ...]:
        out = call.formula(**{**leaves, **dict(zip(dots, xs, strict=True))}, **call.options)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    tangents: tuple[Any, ...] = (None,) * len(cotangents)
    if dots:
        with torch.no_grad(), fwAD.dual_level():  # torch.func.jvp does not go with modes
            made = run(*(fwAD.make_dual(leaves[n].detach(), t.contiguous()) for n, t in dots.items()))
            tangents = tuple(fwAD.unpack_dual(y).tangent for y in made)
    values = run(*(leaves[n] for n in dots))
    of = [x for x in leaves.values() if x is not None and x.requires_grad]
    used = [(y, c) for y, c in zip(values, cotangents, strict=True) if y.requires_grad and y.shape == c.shape]
    if not used:
        return [y.detach() for y in values], tangents, [None] * len(of)
    grads = torch.autograd.grad([y for y, _ in used], of, [c.to(y.dtype) for y, c in used], allow_unused=True)
    return [y.detach() for y in values], tangents, grads


class _Rounding(TorchDispatchMode):
    """Every operator's result off by a random rounding: what such errors do to a result, sums that cancel included."""

    def __init__(self, eps: float, seed: int) -> None:
        super().__init__()
        self.eps, self.generator = eps, torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(a.alias_info is not None for a in (*schema_of(func).arguments, *schema_of(func).returns)):
            return out  # a view, or written in place
        return tree_map(self._rounded, out)

    def _rounded(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float64 or x.data_ptr() == 0:  # forward mode's zero tensors
            return x
        return x * (1 + self.eps * torch.randn(x.shape, generator=self.generator, dtype=x.dtype))


class _Expected:
    """What a call has to give, and how far from it plain PyTorch and rounding are in its dtype."""

    def __init__(self, call: Call, low: Any, dots: Any, cotangents: list[Tensor], dtype: torch.dtype) -> None:
        self.call, self.low, self.dtype, self.cotangents = call, low, dtype, cotangents
        self.dots = {}
        for name, t in dots.items():
            if t is not None:
                self.dots[name] = torch.cat([t, t.new_zeros(low[name].shape[0] - t.shape[0], *t.shape[1:])])
        self.exact = self._truth(wide=True)

    def _truth(self, wide: bool) -> Any:
        def to(x: Tensor) -> Tensor:
            return x.detach().cpu().double() if wide else x.detach()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _truth(
                self.call,
                {name: None if x is None else to(x) for name, x in self.low.items()},
                {name: to(t) for name, t in self.dots.items()},
                [to(c) for c in self.cotangents],
            )

    @functools.cached_property
    def plain(self) -> Any:
        try:
            return self._truth(wide=False)
        except (RuntimeError, NotImplementedError):  # not there in this dtype
            return None

    @functools.cached_property
    def rounded(self) -> list[Any]:
        found = []
        for seed in range(3):
            with _Rounding(torch.finfo(self.dtype).eps, seed):
                found.append(self._truth(wide=True))
        return found

    def wrong(self, what: str, out: Tensor, part: int, i: int) -> str:
        """What is wrong with a value, tangent or gradient (part 0, 1, 2); of a tangent the first rows are compared."""
        exact = self.exact[part][i]
        cut = slice(len(out)) if part == 1 else slice(None)
        exact = exact[cut] if exact.ndim else exact
        if out.shape != exact.shape:
            return f"{what} has shape {tuple(out.shape)}, expected {tuple(exact.shape)}"
        info = torch.finfo(self.dtype)
        if out.numel() == 0 or not exact.isfinite().all() or exact.abs().max() > info.max / 64:
            return ""

        def off(found: Any) -> float:
            x = found[part][i].detach().cpu().double()
            return (x[cut] - exact if x.ndim else x - exact).norm().item()

        error = (out.detach().cpu().double() - exact).norm().item()
        bound = 8 * info.eps * (exact.norm().item() + info.tiny * out.numel() ** 0.5)
        if error <= bound:
            return ""
        if self.plain is not None:
            of_plain = off(self.plain)
            if not math.isfinite(of_plain):
                return ""  # an overflow on the way
            bound += 2 * of_plain
        if error > bound:
            of_rounding = max(map(off, self.rounded))
            if not math.isfinite(of_rounding):
                return ""
            bound += 8 * of_rounding
        return "" if error <= bound else f"{what}: error {error:.2e}, bound {bound:.2e}, size {exact.norm():.2e}"


def _compared(call: Call, low: Any, dots: Any, outs: Any, grads: Any, dtype: torch.dtype) -> str:
    """What is wrong; "" if nothing is."""
    cotangents, found = grads
    expected = _Expected(call, low, dots, cotangents, dtype)
    for i, (value, dot) in enumerate(outs):
        wrong = expected.wrong(f"value {i}", value, 0, i)
        if wrong:
            return wrong
        ref = expected.exact[1][i]
        if dot is not None and (dot.requires_grad or dot.dtype != value.dtype):
            return f"tangent {i} is of {dot.dtype}, requires_grad {dot.requires_grad}"
        if ref is None:
            if dot is not None and dot.any():
                return f"tangent {i} is not zero"
            continue
        n = 0 if dot is None else len(dot)
        if ref[n:].any() and ref[n:].isfinite().all():
            return f"tangent {i} has {n} rows, and others are not zero"
        wrong = "" if dot is None or not len(dot) else expected.wrong(f"tangent {i}", dot, 1, i)
        if wrong:
            return wrong
    names = [name for name, x in low.items() if x is not None and x.requires_grad]
    for i, (name, g) in enumerate(zip(names, found, strict=True)):
        ref = expected.exact[2][i]
        if ref is None or g is None:
            if any(x is not None and x.any() for x in (ref, g)):
                return f"the gradient of {name} is {'None' if g is None else 'there'}"
            continue
        wrong = expected.wrong(f"gradient of {name}", g, 2, i)
        if wrong:
            return wrong
    return ""


# -------------------------------------------------------------------------------------------------------- many of them


def main() -> int:
    parser = argparse.ArgumentParser(description="Random calls of every op against formulas in float64.")
    parser.add_argument("count", nargs="?", type=int, default=1000)
    parser.add_argument("--backend", choices=sorted(DTYPES), default="reference")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="this seed alone")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.seed is not None:
        print(one(args.seed, args.backend))
        return 0
    start, kinds = time.monotonic(), collections.Counter[str]()
    by_op: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for seed in range(args.first, args.first + args.count):
        if time.monotonic() - start > args.seconds:
            break
        outcome = one(seed, args.backend)
        if (seed - args.first) % 1000 == 999:
            print(f"{args.backend}: seeds {args.first} to {seed}, {time.monotonic() - start:.0f} s", flush=True)
        kinds[outcome.kind] += 1
        by_op[outcome.call.partition("(")[0]][outcome.kind] += 1
        if outcome.kind in ("wrong", "crashed"):
            print(f"seed {outcome.seed}: {outcome.kind}: {outcome.what}\n    {outcome.call}", flush=True)
    for op, counts in sorted(by_op.items()):
        print(f"{op:<32}" + "".join(f"{kind} {counts[kind]:<8}" for kind in ("right", "refused", "wrong", "crashed")))
    total = sum(kinds.values())
    print(f"{args.backend}: {total} calls, {dict(kinds)}, {time.monotonic() - start:.0f} s")
    return int(kinds["wrong"] + kinds["crashed"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
