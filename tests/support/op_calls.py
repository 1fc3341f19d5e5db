"""Random calls of every public op: its formula in plain PyTorch, tensors of all layouts, bad arguments."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import mfkernels
from mfkernels import Dual
from mfkernels.ada_layer_norm.cases import modulated
from mfkernels.adaptive_squared_error.cases import error_terms
from mfkernels.attention.cases import softmax_attention
from mfkernels.dual import primal_of
from mfkernels.gated_residual.cases import residual
from mfkernels.mlp.cases import perceptron
from mfkernels.rms_norm.cases import rms
from mfkernels.rotary.cases import angles, turned
from mfkernels.timestep_embedding.cases import frequencies, sinusoids

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
    return Call("ada_layer_norm", *_tokens(d, "x shift scale"), modulated, {"eps": d.choice(EPS)})


def gated_residual(d: Draw) -> Call:
    return Call("gated_residual", *_tokens(d, "x y gate"), residual)


def gated_residual_ada_layer_norm(d: Draw) -> Call:
    def formula(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Any:
        stream = residual(x, y, gate)
        return stream, modulated(stream, shift, scale, eps)

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
        rms,
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
        return perceptron(x, w1, 0.0 if b1 is None else b1, w2, 0.0 if b2 is None else b2)

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
        return sinusoids(t, frequencies(dim, max_period))

    options = {"dim": 2 * d.randint(1, 20), "max_period": d.choice((10000.0, 10000, 1.5, 1e6))}
    return Call("timestep_embedding", {"t": d.tensor(d.size())}, ["t"], formula, options)


def _heads(d: Draw, N: int) -> tuple[dict[str, Tensor | None], int]:
    B, H_kv, width = d.size(), d.randint(1, 2), d.choice((2, 6, 8, 8, 16, 24))
    return {"q": d.tensor(B, N, H_kv * d.randint(1, 2), width), "k": d.tensor(B, N, H_kv, width)}, width


def rotary(d: Draw) -> Call:
    def formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Any:
        return tuple(turned(x, cos, sin, interleaved) for x in (q, k))

    N = d.size()
    inputs, width = _heads(d, N)
    inputs |= dict(zip(("cos", "sin"), (x.double() for x in angles(N, width)), strict=True))
    return Call("rotary", inputs, ["q", "k"], formula, {"interleaved": d.random() < 0.5}, ("cos", "sin"))


def qk_norm_rotary(d: Draw) -> Call:
    turn = rotary(d)

    def formula(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, **rest: Any) -> Any:
        return turn.formula(rms(q, q_weight, eps), rms(k, k_weight, eps), **rest)

    width = turn.inputs["q"].shape[-1]
    inputs = {**turn.inputs, "q_weight": d.tensor(width), "k_weight": d.tensor(width)}
    return Call("qk_norm_rotary", inputs, ["q", "k"], formula, {**turn.options, "eps": d.choice(EPS)}, ("cos", "sin"))


def attention(d: Draw) -> Call:
    def formula(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> Tensor:
        if q.dtype != torch.float64:
            return softmax_attention(q, k, v, is_causal, scale)
        # the same from the log-sum-exp, as a kernel's backward has it: the rounding of that counts too
        group, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5 if scale is None else scale
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))  # [B, N_kv, H, d]
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale  # [B, H, N_q, N_kv]
        if is_causal:
            scores = scores.masked_fill(scores.new_ones(scores.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
        weights = (scores - scores.logsumexp(-1, keepdim=True)).exp()  # [B, H, N_q, N_kv]
        return torch.einsum("bhij,bjhd->bihd", weights, v)  # [B, N_q, H, d]

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


def adaptive_squared_error(d: Draw) -> Call:
    shape = (d.size(), *(d.size() for _ in range(d.randint(1, 3))))
    rows = d.randint(0, shape[0])
    inputs = {
        "u": d.tensor(*shape),
        "v": d.tensor(*shape),
        "correction": d.tensor(rows, *shape[1:]),
        "interval": d.tensor(shape[0]).sigmoid(),
    }
    options = {"p": d.choice((0, 0.5, 0.75, 1.0, 1)), "eps": d.choice((0.01, 1e-3, 1))}
    return Call("adaptive_squared_error", inputs, [], error_terms, options, ("v", "correction", "interval"))


OPS: dict[str, Callable[[Draw], Call]] = {
    fn.__name__: fn
    for fn in (
        ada_layer_norm,
        adaptive_squared_error,
        attention,
        gated_residual,
        gated_residual_ada_layer_norm,
        layer_scale_residual,
        linear,
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
