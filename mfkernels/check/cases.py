"""What `python -m mfkernels.check` runs: for each op its cases, each with the same formula in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mfkernels
from mfkernels import Dual
from mfkernels.check.formulas import (
    angles,
    error_terms,
    frequencies,
    modulated,
    perceptron,
    residual,
    residual_modulated,
    rms,
    sinusoids,
    softmax_attention,
    turned,
)
from mfkernels.dual import padded_tangent, primal_of, tangent_of
from mfkernels.testing import dual_errors, relative_error

# What every bound has beside twice plain PyTorch's error, which may be none by luck (one token, one channel).
# In eps of the dtype: the rounding of the result is half an eps; Triton's interpreter cuts bfloat16 off, which is one.
FLOOR = 1.0
# In eps of float32 (of float64 in float64), in which sums are taken in half precision too: sums in another order, and
# functions that are right to an ulp or two. Measured: the gradient of one time over 100 features, 1.3 where plain
# PyTorch's is 0.1.
NOISE = 4.0
# The same over one key, where the gradients of q and k are zero in exact arithmetic. Plain PyTorch subtracts two equal
# numbers, a fused backward two sums over the head dim, taken in different orders. Measured: 11; PyTorch's own, 8.
NOISE_ONE_KEY = 16.0
# The same of (e + ε)^(−p), in the kernel exp(−p log(e + ε)): an exponent up to 7 (e <= 1e4, p = 0.75), rounded twice.
NOISE_POWER = 8.0

ERROR_EPS = 0.01  # of the weight of a squared error
Inputs = Mapping[str, Tensor]

# -------------------------------------------------------------------------------------------------------------- cases


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
    gpu_only: whether the case takes too long on a CPU.
    noise: of the bounds, see NOISE.
    constants: tensors by name that both functions take as they are, in whatever dtype the case is.
    """

    size: str
    make: Callable[[torch.Generator], Inputs]
    duals: Sequence[str]
    ours: Callable[..., Any]
    formula: Callable[..., Any]
    part: str = ""
    gpu_only: bool = False
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


class ErrorCase(Case):
    """The error has no Dual: `rows` have a correction, and u alone has a gradient. Both functions have two outputs."""

    def errors(self, rows: int, dtype: torch.dtype, device: torch.device, *, plain: bool) -> dict[str, float]:
        low = {name: x.to(device, dtype) for name, x in self.inputs().items()}
        low["correction"] = low["correction"][:rows]
        high = {name: x.cpu().double() for name, x in low.items()}
        for inputs in (low, high):
            inputs["u"].requires_grad_()
        error, squared_error = (self.formula if plain else self.ours)(**low)
        expected, expected_squared_error = self.formula(**high)
        cotangent = torch.randn(error.shape, generator=torch.Generator().manual_seed(1))  # [B]
        (du,) = torch.autograd.grad(error, low["u"], cotangent.to(error.device, error.dtype))
        (expected_du,) = torch.autograd.grad(expected, high["u"], cotangent.double())
        return {
            "primal": relative_error(error, expected),
            "squared error": relative_error(squared_error, expected_squared_error),
            "d_u": relative_error(du, expected_du),
        }

    def calls(self, dtype: torch.dtype, device: torch.device) -> Calls:
        """The error, all rows with corrections, and the error with its backward."""
        inputs = {name: x.to(dtype) for name, x in self.inputs(device).items()}
        u = inputs["u"].clone().requires_grad_()

        def forward(fn: Callable[..., Any]) -> Callable[[], object]:
            return lambda: fn(**inputs)

        def backward(fn: Callable[..., Any]) -> Callable[[], object]:
            return lambda: torch.autograd.grad(fn(**{**inputs, "u": u})[0].sum(), u)

        return Calls(forward(self.ours), backward(self.ours), forward(self.formula), backward(self.formula))


# -------------------------------------------------------------------------------------------------- the cases of an op


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


def token_case(ours: Callable[..., Any], formula: Callable[..., Tensor], names: str, B: int, N: int, D: int) -> Case:
    """Of x and y [B, N, D] and of modulation [B, D], which is cut out of one wide tensor, as in a DiT block."""

    def make(generator: torch.Generator) -> Inputs:
        gate, shift, scale = random(generator, B, 6 * D).chunk(6, 1)[2:5]  # [B, D]
        x, y = random(generator, 2, B, N, D)  # [B, N, D]
        every = {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale}
        return {name: every[name] for name in names.split()}

    return Case(f"B={B} N={N} D={D}", make, names.split(), ours, formula)


def channel_case(
    ours: Callable[..., Any], formula: Callable[..., Tensor], names: str, weight: str, B: int, N: int, D: int
) -> Case:
    """Of some tensors [B, N, D] and one `weight` [D] without a tangent (none where it is "")."""

    def make(generator: torch.Generator) -> Inputs:
        inputs = {name: random(generator, B, N, D) for name in names.split()}  # [B, N, D]
        return {**inputs, weight: 1 + 0.3 * random(generator, D)} if weight else inputs  # [D]

    return Case(f"B={B} N={N} D={D}", make, names.split(), ours, formula)


def mlp_case(B: int, N: int, D: int, hidden: int) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        return {
            "x": random(generator, B, N, D),  # [B, N, D]
            "w1": random(generator, hidden, D) / D**0.5,  # [D_hidden, D]
            "b1": random(generator, hidden),  # [D_hidden]
            "w2": random(generator, D, hidden) / hidden**0.5,  # [D, D_hidden]
            "b2": random(generator, D),  # [D]
        }

    return Case(f"B={B} N={N} D={D} hidden={hidden}", make, ["x"], lambda **xs: mfkernels.mlp(**xs), perceptron)


def time_case(B: int, dim: int) -> Case:
    return Case(
        f"B={B} dim={dim}",
        lambda generator: {"t": random(generator, B).sigmoid()},  # [B]
        ["t"],
        lambda t, omega: mfkernels.timestep_embedding(t, dim),
        sinusoids,
        constants={"omega": frequencies(dim)},  # [dim/2]
    )


def rotary_case(norm: bool, B: int, N: int, H: int, H_kv: int, d: int, interleaved: bool = False) -> Case:
    """q and k are views of one projection."""

    def make(generator: torch.Generator) -> Inputs:
        q, k = random(generator, B, N, H + 2 * H_kv, d).split((H, H_kv, H_kv), 2)[:2]  # [B, N, H, d], [B, N, H_kv, d]
        weights = {name: 1 + 0.3 * random(generator, d) for name in ("q_weight", "k_weight")}  # [d]
        return {"q": q, "k": k, **(weights if norm else {})}

    op: Callable[..., Any] = mfkernels.qk_norm_rotary if norm else mfkernels.rotary

    def formula(cos: Tensor, sin: Tensor, **xs: Tensor) -> Tensor:
        if norm:
            xs = {name: rms(xs[name], xs[f"{name}_weight"]) for name in "qk"}
        return torch.cat([turned(xs[name], cos, sin, interleaved) for name in "qk"], 2)  # [B, N, H + H_kv, d]

    size = f"B={B} N={N} H={H}" + (f" H_kv={H_kv}" if H_kv != H else "") + f" d={d}"
    return Case(
        size + (" interleaved" if interleaved else ""),
        make,
        ["q", "k"],
        lambda **xs: joined(op(**xs, interleaved=interleaved), 2),
        formula,
        part=f"d={d}",
        constants=dict(zip(("cos", "sin"), angles(N, d), strict=True)),  # [N, d/2]
    )


def attention_case(B: int, N: int, H: int, d: int, N_kv: int = 0, H_kv: int = 0, causal: bool = False) -> Case:
    """q, k and v are views of one projection, or of their own where N_kv or H_kv differ from N and H."""

    def make(generator: torch.Generator) -> Inputs:
        if not N_kv and not H_kv:
            return dict(zip("qkv", random(generator, B, N, 3, H, d).unbind(2), strict=True))  # [B, N, H, d]
        shapes = {"q": (B, N, H, d), "k": (B, N_kv or N, H_kv or H, d), "v": (B, N_kv or N, H_kv or H, d)}
        return {name: random(generator, *shape) for name, shape in shapes.items()}

    size = f"B={B} N={N}" + (f" N_kv={N_kv}" if N_kv else "") + f" H={H}" + (f" H_kv={H_kv}" if H_kv else "")
    return Case(
        f"{size} d={d}" + (" causal" if causal else ""),
        make,
        "qkv",
        lambda **xs: mfkernels.attention(**xs, is_causal=causal),
        lambda q, k, v: softmax_attention(q, k, v, causal),
        part=f"d={d}",
        noise=NOISE_ONE_KEY if (N_kv or N) == 1 else NOISE,
    )


def error_case(B: int, C: int, height: int, width: int, p: float = 1.0) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        u, correction, v = random(generator, 3, B, C, height, width)  # [B, C, H, W]
        interval = random(generator, B).sigmoid()  # [B]
        return {"u": u, "v": v, "correction": correction, "interval": interval}

    return ErrorCase(
        f"B={B} C={C} H={height} W={width} p={p:g}",
        make,
        ["u"],
        lambda **xs: mfkernels.adaptive_squared_error(**xs, p=p, eps=ERROR_EPS),
        lambda **xs: error_terms(**xs, p=p, eps=ERROR_EPS),
        noise=NOISE if p == 1 else NOISE_POWER,
    )


def _by_token(op: str, formula: Callable[..., Tensor], names: str) -> Callable[..., Case]:
    return lambda B, N, D: token_case(lambda **xs: getattr(mfkernels, op)(**xs), formula, names, B, N, D)


def _by_channel(op: str, formula: Callable[..., Tensor], names: str, weight: str) -> Callable[..., Case]:
    return lambda B, N, D: channel_case(lambda **xs: getattr(mfkernels, op)(**xs), formula, names, weight, B, N, D)


def _stream_and_norm(**xs: Any) -> Any:
    return joined(mfkernels.gated_residual_ada_layer_norm(**xs), 1)


MAKERS: dict[str, Callable[..., Case]] = {
    "ada_layer_norm": _by_token("ada_layer_norm", modulated, "x shift scale"),
    "adaptive_squared_error": error_case,
    "attention": attention_case,
    "gated_residual": _by_token("gated_residual", residual, "x y gate"),
    "gated_residual_ada_layer_norm": lambda B, N, D: token_case(
        _stream_and_norm, residual_modulated, "x y gate shift scale", B, N, D
    ),
    "layer_scale_residual": _by_channel("layer_scale_residual", lambda x, y, scale: x + y * scale, "x y", "scale"),
    "mlp": mlp_case,
    "qk_norm_rotary": lambda *sizes, **how: rotary_case(True, *sizes, **how),
    "rms_norm": _by_channel("rms_norm", rms, "x", "weight"),
    "rotary": lambda *sizes, **how: rotary_case(False, *sizes, **how),
    "swiglu": _by_channel("swiglu", lambda a, b: a / (1 + torch.exp(-a)) * b, "a b", ""),
    "timestep_embedding": time_case,
}

# Sizes are multiples of nothing. 1152, 4608 and 72 are DiT-XL's, whose kernels the timings on a GPU find compiled.
_TOKENS = [(3, 63, 100), (2, 1, 2730)]
_HEADS: list[tuple[tuple[int, ...], bool]] = [
    ((2, 17, 2, 1, 64), False),
    ((2, 7, 1, 1, 72), True),
    ((2, 1, 3, 1, 80), False),
    ((2, 5, 1, 1, 128), True),
]


def _more(case: Case) -> Case:
    return replace(case, gpu_only=True)


def _attention_cases(d: int, on_cpu: Case) -> list[Case]:
    grouped, causal = attention_case(2, 63, 4, d, N_kv=100, H_kv=2), attention_case(2, 100, 2, d, causal=True)
    return [on_cpu, _more(grouped), _more(causal)]


CASES: dict[str, list[Case]] = {
    **{
        op: [*(make(*size) for size in _TOKENS), _more(make(2, 100, 1152))]
        for op, make in MAKERS.items()
        if op not in ("adaptive_squared_error", "attention", "mlp", "qk_norm_rotary", "rotary", "timestep_embedding")
    },
    **{
        op: [
            *(MAKERS[op](*size, interleaved=interleaved) for size, interleaved in _HEADS),
            *(_more(MAKERS[op](2, 100, *size[2:], interleaved=interleaved)) for size, interleaved in _HEADS),
        ]
        for op in ("qk_norm_rotary", "rotary")
    },
    "attention": [
        *_attention_cases(64, attention_case(2, 63, 2, 64, N_kv=100, H_kv=1)),
        *_attention_cases(72, attention_case(2, 100, 1, 72)),
        *_attention_cases(80, attention_case(2, 1, 2, 80)),
        *_attention_cases(128, attention_case(2, 63, 1, 128, causal=True)),
        _more(attention_case(2, 100, 2, 64, N_kv=63, H_kv=1, causal=True)),
    ],
    "adaptive_squared_error": [
        error_case(3, 4, 9, 11),
        error_case(2, 1, 1, 1, p=0.75),
        _more(error_case(5, 3, 32, 32, p=0.75)),
    ],
    "mlp": [
        mlp_case(3, 21, 100, 276),
        mlp_case(2, 1, 96, 2730),
        mlp_case(3, 21, 96, 264),
        _more(mlp_case(2, 17, 1152, 4608)),
    ],
    "timestep_embedding": [time_case(1, 100), time_case(63, 256), time_case(100, 2730)],
}


def cases_of(op: str, device: str, part: str | None = None) -> list[Case]:
    """The op's cases for the device, of one part or of all; on a CPU, where they may be interpreted, the smaller."""
    found = [case for case in CASES[op] if not (case.gpu_only and device == "cpu")]
    return [case for case in found if part is None or case.part == part]


# What is timed: on a CPU, on a GPU.
_TOKENS_TIMED = (2, 64, 96), (32, 256, 1152)
_HEADS_TIMED = (2, 64, 2, 2, 72), (32, 256, 16, 16, 72)
_SIZES_TIMED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "attention": ((2, 64, 2, 72), (32, 256, 16, 72)),
    "adaptive_squared_error": ((2, 4, 16, 16), (32, 4, 32, 32)),
    "mlp": ((2, 64, 96, 384), (32, 256, 1152, 4608)),
    "qk_norm_rotary": _HEADS_TIMED,
    "rotary": _HEADS_TIMED,
    "swiglu": ((2, 64, 384), (32, 256, 2730)),
    "timestep_embedding": ((64, 256), (256, 256)),
}


def timed_case(op: str, device: torch.device) -> Case:
    """The op at a realistic size, small on a CPU."""
    return MAKERS[op](*_SIZES_TIMED.get(op, _TOKENS_TIMED)[device.type == "cuda"])
