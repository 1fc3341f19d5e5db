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
import random
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

import mfkernels
from mfkernels import Dual
from mfkernels._torch import TorchDispatchMode, schema_of, tree_map
from mfkernels.check import formulas
from mfkernels.dual import primal_of, tangent_of

DTYPES = {
    "reference": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
}
EPS = (1e-6, 1e-5, 1e-3, 0.0, 1, 1.0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Call:
    """One call of an op.

    inputs: float64 tensors by name; None where the op takes none.
    duals: those of them that may carry tangents; the first dimension is the batch.
    options: what the op takes beside tensors; `formula` takes it too.
    formula: of plain tensors; one output or a tuple.
    constants: inputs without a gradient.
    """

    op: str
    inputs: dict[str, Tensor | None]
    duals: list[str]
    formula: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    constants: tuple[str, ...] = ()

    def ours(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        return getattr(mfkernels, self.op)(**inputs, **options)

    def __str__(self) -> str:
        shapes = {name: x if x is None else tuple(x.shape) for name, x in self.inputs.items()}
        return f"{self.op}({shapes}, {self.options})"


# ------------------------------------------------------------------------------------------------------ the ops' calls


class Draw(random.Random):
    def size(self, low: int = 1, high: int = 5) -> int:
        """Mostly small, at times 0 or 1 or past a block of 32."""
        return self.choice((0, 1, low, *range(low, high + 1), *range(low, high + 1), 33))

    def tensor(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(32))
        return torch.randn(shape, generator=generator, dtype=torch.float64) * self.choice((1, 1, 1, 0.01, 20))

    def some(self, shape: tuple[int, ...]) -> Tensor | None:
        return self.tensor(*shape) if self.random() < 0.7 else None


def _tokens(d: Draw, names: str) -> tuple[dict[str, Tensor | None], list[str]]:
    """x and y (B, N, D); the rest (B, D)."""
    B, N, D = d.size(), d.size(), d.size(1, 12)
    of = {name: d.tensor(B, N, D) if name in "xy" else d.tensor(B, D) for name in names.split()}
    return dict(of), names.split()


def ada_layer_norm(d: Draw) -> Call:
    return Call("ada_layer_norm", *_tokens(d, "x shift scale"), formulas.modulated, {"eps": d.choice(EPS)})


def gated_residual(d: Draw) -> Call:
    return Call("gated_residual", *_tokens(d, "x y gate"), formulas.residual)


def gated_residual_ada_layer_norm(d: Draw) -> Call:
    def formula(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Any:
        stream = formulas.residual(x, y, gate)
        return stream, formulas.modulated(stream, shift, scale, eps)

    inputs, duals = _tokens(d, "x y gate shift scale")
    return Call("gated_residual_ada_layer_norm", inputs, duals, formula, {"eps": d.choice(EPS)})


def _rows(d: Draw) -> tuple[int, ...]:
    return (d.size(), *(d.size() for _ in range(d.choice((0, 1, 1, 2)))), d.size(1, 12))


def layer_scale_residual(d: Draw) -> Call:
    shape = _rows(d)
    inputs = {"x": d.tensor(*shape), "y": d.tensor(*shape), "scale": d.tensor(shape[-1])}
    return Call("layer_scale_residual", inputs, ["x", "y"], lambda x, y, scale: x + y * scale)


def rms_norm(d: Draw) -> Call:
    shape = _rows(d)
    return Call(
        "rms_norm",
        {"x": d.tensor(*shape), "weight": d.tensor(shape[-1])},
        ["x"],
        formulas.rms,
        {"eps": d.choice(EPS)},
    )


def swiglu(d: Draw) -> Call:
    shape = _rows(d)
    return Call("swiglu", {name: d.tensor(*shape) for name in "ab"}, ["a", "b"], lambda a, b: a * torch.sigmoid(a) * b)


def silu(d: Draw) -> Call:
    return Call("silu", {"x": d.tensor(*_rows(d))}, ["x"], lambda x: x * torch.sigmoid(x))


def linear(d: Draw) -> Call:
    shape, out = _rows(d), d.size()
    inputs = {"x": d.tensor(*shape), "weight": d.tensor(out, shape[-1]), "bias": d.some((out,))}
    return Call("linear", inputs, ["x"], lambda x, weight, bias: x @ weight.mT + (0.0 if bias is None else bias))


def mlp(d: Draw) -> Call:
    def formula(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        return formulas.perceptron(x, w1, 0.0 if b1 is None else b1, w2, 0.0 if b2 is None else b2)

    shape, hidden, out = _rows(d), d.size(), d.size()
    inputs = {"x": d.tensor(*shape), "w1": d.tensor(hidden, shape[-1]), "b1": d.some((hidden,))}
    inputs |= {"w2": d.tensor(out, hidden), "b2": d.some((out,))}
    return Call("mlp", inputs, ["x"], formula)


def patch_embed(d: Draw) -> Call:
    def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        p, q = weight.shape[2:]
        x = x.unfold(2, p, p).unfold(3, q, q)  # [B, C, H/p, W/q, p, q]
        y = torch.einsum("bchwpq,dcpq->bhwd", x, weight).flatten(1, 2)
        return y if bias is None else y + bias

    B, C, D, p, q = d.size(), d.randint(1, 3), d.size(), d.randint(1, 3), d.randint(1, 3)
    x = d.tensor(B, C, p * d.randint(1, 3), q * d.randint(1, 3))
    return Call("patch_embed", {"x": x, "weight": d.tensor(D, C, p, q), "bias": d.some((D,))}, ["x"], formula)


def timestep_embedding(d: Draw) -> Call:
    def formula(t: Tensor, dim: int, max_period: float) -> Tensor:
        return formulas.sinusoids(t, formulas.frequencies(dim, max_period))

    options = {"dim": 2 * d.randint(1, 20), "max_period": d.choice((10000.0, 10000, 1.5, 1e6))}
    return Call("timestep_embedding", {"t": d.tensor(d.size())}, ["t"], formula, options)


def _heads(d: Draw, N: int) -> tuple[dict[str, Tensor | None], int]:
    B, H_kv, width = d.size(), d.randint(1, 2), d.choice((2, 6, 8, 8, 16, 24))
    return {"q": d.tensor(B, N, H_kv * d.randint(1, 2), width), "k": d.tensor(B, N, H_kv, width)}, width


def rotary(d: Draw) -> Call:
    def formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Any:
        return tuple(formulas.turned(x, cos, sin, interleaved) for x in (q, k))

    N = d.size()
    inputs, width = _heads(d, N)
    inputs |= dict(zip(("cos", "sin"), (x.double() for x in formulas.angles(N, width)), strict=True))
    return Call("rotary", inputs, ["q", "k"], formula, {"interleaved": d.random() < 0.5}, ("cos", "sin"))


def qk_norm_rotary(d: Draw) -> Call:
    turn = rotary(d)

    def formula(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, **rest: Any) -> Any:
        return turn.formula(formulas.rms(q, q_weight, eps), formulas.rms(k, k_weight, eps), **rest)

    width = turn.inputs["q"].shape[-1]
    inputs = {**turn.inputs, "q_weight": d.tensor(width), "k_weight": d.tensor(width)}
    return Call("qk_norm_rotary", inputs, ["q", "k"], formula, {**turn.options, "eps": d.choice(EPS)}, ("cos", "sin"))


def attention(d: Draw) -> Call:
    def formula(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> Tensor:
        return formulas.softmax_attention(q, k, v, is_causal, scale)

    B, N, N_kv, H_kv = d.size(), d.size(), max(1, d.size()), d.randint(1, 2)
    width = d.choice((1, 3, 4, 8, 8, 8, 16, 24))
    shape = (B, d.choice((N, N_kv)), H_kv * d.randint(1, 2), width)
    inputs = {"q": d.tensor(*shape), "k": d.tensor(B, N_kv, H_kv, width), "v": d.tensor(B, N_kv, H_kv, width)}
    options = {"is_causal": d.random() < 0.5, "scale": d.choice((None, None, 0.3, 1, 0, 0.0, -0.3, 1e-30, -2))}
    return Call("attention", inputs, list("qkv"), formula, options)


def scaled_dot_product_attention(d: Draw) -> Call:
    inner = attention(d)

    def formula(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, **options: Any) -> Tensor:
        return inner.formula(*(x.transpose(1, 2) for x in (query, key, value)), **options).transpose(1, 2)

    names = ("query", "key", "value")
    inputs = {name: x.transpose(1, 2) for name, x in zip(names, inner.inputs.values(), strict=True)}
    options = {**inner.options, "enable_gqa": True}
    return Call("scaled_dot_product_attention", inputs, list(names), formula, options)


def meanflow_loss(d: Draw) -> Call:
    def formula(u: Tensor, du_dt: Tensor, v: Tensor, t: Tensor, r: Tensor, norm_p: float, norm_eps: float) -> Any:
        return formulas.loss_terms(u, du_dt, v, t, r, norm_p, norm_eps)

    shape = (d.size(), *(d.size() for _ in range(d.randint(1, 3))))
    rows = d.randint(0, shape[0])
    r, t = d.tensor(2, shape[0]).sigmoid().sort(0).values
    inputs = {"u": d.tensor(*shape), "du_dt": d.tensor(rows, *shape[1:]), "v": d.tensor(*shape), "t": t, "r": r}
    options = {"norm_p": d.choice((0, 0.5, 0.75, 1.0, 1)), "norm_eps": d.choice((0.01, 1e-3, 1))}
    return Call("meanflow_loss", inputs, [], formula, options, ("du_dt", "v", "t", "r"))


OPS: dict[str, Callable[[Draw], Call]] = {
    fn.__name__: fn
    for fn in (
        ada_layer_norm,
        attention,
        gated_residual,
        gated_residual_ada_layer_norm,
        layer_scale_residual,
        linear,
        meanflow_loss,
        mlp,
        patch_embed,
        qk_norm_rotary,
        rms_norm,
        rotary,
        scaled_dot_product_attention,
        silu,
        swiglu,
        timestep_embedding,
    )
}
OPTIONAL = {"bias", "b1", "b2"}

# ------------------------------------------------------------------------------------------------- tensors of all kinds


def laid_out(d: Draw, x: Tensor) -> Tensor:
    """The values of `x`, or of a part of it repeated, in memory of some layout."""
    how = d.choice(("contiguous", "contiguous", "permuted", "sliced", "expanded", "offset"))
    if x.ndim == 0 or how == "contiguous":
        return x.contiguous()
    if how == "permuted":
        order = d.sample(range(x.ndim), x.ndim)
        return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])
    if how == "sliced":
        axis, step = d.randrange(x.ndim), d.randint(2, 3)
        shape = list(x.shape)
        shape[axis] = shape[axis] * step + 1
        out = x.new_full(shape, torch.nan)
        part = [slice(None)] * x.ndim
        part[axis] = slice(1, None, step)
        out[tuple(part)] = x
        return out[tuple(part)]
    if how == "expanded":
        axis = d.randrange(x.ndim)
        return x.narrow(axis, 0, 1).contiguous().expand(x.shape) if x.shape[axis] else x
    out = x.new_empty(x.numel() + 3)
    out[3:] = x.reshape(-1)
    return out[3:].view(x.shape)


def bad_tensors(d: Draw, x: Tensor) -> dict[str, Any]:
    """What no op takes in place of the tensor `x`."""
    bad: dict[str, Any] = {
        "a word": "a",
        "a number": 1.0,
        "a list": [1.0],
        "integers": torch.zeros(x.shape, dtype=torch.int64, device=DEVICE),
        "booleans": torch.zeros(x.shape, dtype=torch.bool, device=DEVICE),
        "complex": torch.zeros(x.shape, dtype=torch.complex64, device=DEVICE),
        "float8": torch.zeros(x.shape, device=DEVICE).to(torch.float8_e4m3fn),
        "sparse": x.to_sparse(),
        "one dimension more": x[None].expand(2, *x.shape),
        "another size": torch.zeros((*x.shape[:-1], x.shape[-1] + 7), dtype=x.dtype, device=DEVICE),
    }
    if x.ndim:
        bad["a scalar"] = x.new_zeros(())
    return bad


BAD_NUMBERS = (torch.nan, torch.inf, -torch.inf, "a", None, True, [1.0], 1j)


def damaged(d: Draw, call: Call, given: dict[str, Any], options: dict[str, Any]) -> str:
    """Make one argument bad, in place; what was done, and "" where nothing was."""
    names = [name for name, x in given.items() if x is not None]
    if options and d.random() < 0.4:
        name = d.choice(list(options))
        if name in ("is_causal", "interleaved"):
            bad: Any = d.choice(("no", None, 1, torch.ones(2)))
        elif name == "enable_gqa":
            return ""
        else:
            bad = d.choice(BAD_NUMBERS)
        if name == "scale" and bad is None:
            return ""
        options[name] = bad
        return f"{name} = {bad!r}"
    name = d.choice(names)
    x = primal_of(given[name])
    if isinstance(given[name], Dual) and given[name].tangent is not None and d.random() < 0.5:
        t = given[name].tangent
        what, t = d.choice(
            (
                ("rows", torch.zeros((x.shape[0] + 1, *x.shape[1:]), dtype=x.dtype, device=DEVICE)),
                ("dtype", t.to(torch.float32 if x.dtype != torch.float32 else torch.float64)),
                ("shape", t[..., None]),
                ("gradient", t.detach().clone().requires_grad_()),
                ("kind", "a"),
            )
        )
        given[name] = Dual(x, t)
        return f"{name}.tangent: {what}"
    choices = bad_tensors(d, x.detach())
    if name not in OPTIONAL:
        choices["nothing"] = None
    if call.op in ("linear", "silu") or (
        call.op in ("layer_scale_residual", "mlp", "rms_norm", "swiglu") and x.ndim > 1
    ):
        choices.pop("one dimension more", None)  # any number of them is right there, or another argument is wrong then
    if len(names) == 1 or (call.op == "patch_embed" and name == "x"):
        choices.pop("another size", None)
    if call.op == "silu":
        choices.pop("a scalar", None)
    what = d.choice(sorted(choices))
    bad = choices[what]
    given[name] = Dual(bad) if isinstance(given[name], Dual) and d.random() < 0.5 else bad
    return f"{name}: {what}"


# --------------------------------------------------------------------------------------------------------- one seed


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
            bound += 16 * of_rounding  # a kernel's backward has the scores from a rounded log-sum-exp as well
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
