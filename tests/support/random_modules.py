"""Random modules of PyTorch operations, from a seed; nothing in them knows of tangents.

A module's forward is a text: lines drawn from random_templates.py, each tried on the plain module and kept if PyTorch
runs it (and its backward). `print(random_program(17))` shows it. random_checks.py compares what `mfkernels` makes
of it.
"""

from __future__ import annotations

import dataclasses
import linecache
import random
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from random_templates import BATCH_FIRST, EXPRESSIONS, KINDS, REFUSED, STATEMENTS, WEIGHTS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------ what the oracle has plainer


class Clip(torch.autograd.Function):
    """Without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx, dx):
        return dx


class Gate(torch.autograd.Function):
    """Two inputs, two outputs, with a rule that reads what was saved."""

    @staticmethod
    def forward(x, y):
        return x * y, y.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, dp, dq):
        x, y = ctx.saved_tensors
        return dp * y, dp * x + dq * y.cos()

    @staticmethod
    def jvp(ctx, x_dot, y_dot):
        x, y = ctx.saved_tensors
        x_dot = torch.zeros_like(x) if x_dot is None else x_dot
        y_dot = torch.zeros_like(y) if y_dot is None else y_dot
        return x_dot * y + x * y_dot, y_dot * y.cos()


class Cube(torch.autograd.Function):
    """In the older style; an operand that is no tensor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        ctx.factor = factor
        return x**3 * factor

    @staticmethod
    def backward(ctx, dx):
        (x,) = ctx.saved_tensors
        return dx * 3 * x.square() * ctx.factor, None

    @staticmethod
    def jvp(ctx, x_dot, _):
        (x,) = ctx.saved_tensors
        return x_dot * 3 * x.square() * ctx.factor


class Same(torch.autograd.Function):
    """Returns its input, as markers of a backward pass do."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, dx):
        return dx

    @staticmethod
    def jvp(ctx, x_dot):
        return x_dot.view_as(x_dot)


class Double(torch.autograd.Function):
    """In place."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, dx):
        return dx * 2

    @staticmethod
    def jvp(ctx, x_dot):
        return x_dot.mul_(2)


def in_place_inside(x):
    y = x * 2
    y[:, 0] += 1
    y.mul_(x)
    return y.tanh()


def hooked(layer, how, plain=False):
    if how == "pre":
        layer.register_forward_pre_hook(lambda m, args: (args[0] * 0.5, *args[1:]))
    elif how == "forward":
        layer.register_forward_hook(lambda m, args, out: out + args[0])
    elif not plain:
        layer.register_full_backward_hook(lambda m, dx, dy: None)
        layer.register_full_backward_pre_hook(lambda m, dy: (dy[0] * 2,))
    return layer


def tensor_hook(x, plain=False):
    if x.requires_grad and not plain:
        x.register_hook(lambda dx: dx * 2)
    return x


COMMON: dict[str, Any] = {"torch": torch, "F": F, "nn": nn, "partial": partial, "in_place_inside": in_place_inside}
THEIRS = {
    "checkpoint": checkpoint, "clip": Clip.apply, "gate": Gate.apply, "cube": Cube.apply, "same": Same.apply,
    "double": Double.apply, "hooked": hooked, "tensor_hook": tensor_hook,
}  # fmt: skip
# what the oracle calls in their place
PLAIN = {
    "checkpoint": lambda fn, *args, use_reentrant, **kwargs: fn(*args),
    "clip": lambda x: x.clamp(-1, 1),
    "gate": lambda x, y: (x * y, y.sin()),
    "cube": lambda x, factor: x**3 * factor,
    "same": lambda x: x.view_as(x),
    "double": lambda x: x.mul_(2),
    "hooked": partial(hooked, plain=True),
    "tensor_hook": partial(tensor_hook, plain=True),
}


# -------------------------------------------------------------------------------------------------------------- program


@dataclasses.dataclass
class Program:
    """A module's text and what it is made of; the same seed gives the same one."""

    seed: int
    batch: int = 0
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    layouts: list[str] = dataclasses.field(default_factory=list)  # of the primals, then of the tangents
    requires_grad: list[bool] = dataclasses.field(default_factory=list)  # inputs, and at last the parameters
    writes: bool = False  # into its inputs
    steps: list[str] = dataclasses.field(default_factory=list)
    names: dict[str, str] = dataclasses.field(default_factory=dict)  # live tensors and their kinds
    parts: dict[str, str] = dataclasses.field(default_factory=dict)  # parameters, constants and submodules
    result: str = ""

    def __str__(self) -> str:
        head = ", ".join(f"{k} = {v}" for k, v in self.sizes.items())
        parts = "".join(f"# self.{name}: {spec}\n" for name, spec in self.parts.items() if name in self.source())
        return (
            f"# seed {self.seed}, {self.dtype}, B = {self.batch}, {head}\n# primals and tangents {self.layouts}, "
            f"requires_grad {self.requires_grad}\n{parts}{self.source()}"
        )

    def source(self) -> str:
        body = ["B = x.shape[0]", *(line for step in self.steps for line in step.split("\n")), f"return {self.result}"]
        return "def forward(self, x, c, a):\n" + "".join(f"    {line}\n" for line in body)

    def is_about(self, *words: str) -> bool:
        return any(word in text for word in words for text in (self.source(), *self.parts.values()))

    @property
    def draws(self) -> bool:
        return self.is_about("dropout", "Dropout", "TransformerEncoderLayer")

    @property
    def low(self) -> bool:
        """Whether anything is computed in float32."""
        return self.dtype == torch.float32 or self.is_about("float32", ".float()")

    def module(self, *, oracle: bool = False) -> RandomModule:
        return RandomModule(self, oracle)

    def in_float64(self) -> Program:
        """The same program without anything in float32."""

        def wide(text: str) -> str:
            return text.replace("float32", "float64").replace(".float()", ".double()")

        return dataclasses.replace(self, dtype=torch.float64, steps=[wide(step) for step in self.steps])

    def inputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Primals and tangents, made anew."""
        g = torch.Generator().manual_seed(self.seed)
        N, D = self.sizes["N"], self.sizes["D"]
        shapes = [(self.batch, N, D), (self.batch, D), (self.batch,)] * 2

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, dtype=torch.float64).to(self.dtype)

        made = [_laid_out(shape, how, draw) for shape, how in zip(shapes, self.layouts, strict=True)]
        for x, needs in zip(made[:3], self.requires_grad, strict=False):
            x.requires_grad_(needs)
        return made[:3], made[3:]


def _laid_out(shape: Sequence[int], how: str, draw: Callable[..., Tensor]) -> Tensor:
    if how == "expanded batch":
        return draw(1, *shape[1:]).expand(shape)
    if how == "expanded" and len(shape) > 1:
        return draw(*shape[:-1], 1).expand(shape)
    if how == "transposed":
        return draw(*shape[::-1]).permute(*reversed(range(len(shape))))
    if how == "strided":
        return draw(*shape[:-1], 2 * shape[-1])[..., ::2]
    return draw(*shape)


class RandomModule(nn.Module):
    def __init__(self, program: Program, oracle: bool) -> None:
        super().__init__()
        self.program = program
        self.names: dict[str, Any] = {**COMMON, **(PLAIN if oracle else THEIRS), **program.sizes}
        N, D, Q = (program.sizes[s] for s in "NDQ")
        g = torch.Generator().manual_seed(program.seed)
        draw: Callable[..., Tensor] = partial(torch.randn, generator=g)
        self.register_buffer("ids", torch.randint(N, (8,), generator=g))
        self.register_buffer("order", torch.randperm(N, generator=g))
        self.register_buffer("dims", torch.randperm(D, generator=g))
        self.register_buffer("rows", torch.randn(N, generator=g) > 0)
        self.register_buffer("mask", (torch.randn(N, N, generator=g) > 0) | torch.eye(N, dtype=torch.bool))
        self.register_buffer("freqs", torch.exp(-torch.arange(D) / D))
        self.register_buffer("kernel", draw(N, N, 3) / 2)
        self.register_buffer("turn", torch.polar(torch.ones(Q), torch.rand(Q, generator=g)))
        for name, buffer in self.named_buffers():
            if buffer.is_floating_point():
                self.register_buffer(name, buffer.to(program.dtype))
            elif buffer.is_complex():
                self.register_buffer(name, torch.complex(buffer.real.to(program.dtype), buffer.imag.to(program.dtype)))
        for name, spec in program.parts.items():
            self.add(name, spec)
        self.requires_grad_(program.requires_grad[-1])
        source, file = program.source(), f"program_{program.seed}.py"
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        scope = dict(self.names)
        exec(compile(source, file, "exec"), scope)
        self.body = scope["forward"]

    def add(self, name: str, spec: str) -> None:
        """The part `name`, whose values depend on the seed and its name alone."""
        program = self.program
        N, D = program.sizes["N"], program.sizes["D"]
        seed = program.seed * 1000 + int(name[1:])
        g = torch.Generator().manual_seed(seed)
        if spec == "K":
            self.register_buffer(name, torch.randn(6, N, D, generator=g).to(program.dtype))
        elif spec in "WVU":
            shape = {"W": (D, D), "V": (D,), "U": (N, D)}[spec]
            value = torch.randn(shape, generator=g) / (D**0.5 if spec == "W" else 1)
            self.register_parameter(name, nn.Parameter(value.to(program.dtype)))
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.add_module(name, eval(spec, self.names).to(program.dtype))

    def forward(self, *inputs: Tensor) -> Any:
        return self.body(self, *inputs)


# ------------------------------------------------------------------------------------------------------------ generator


CONSTANTS = {"X": "[:B]", "C": "[:B, 0]", "A": "[:B, 0, 0]"}


class _Writer:
    def __init__(self, program: Program) -> None:
        self.program, self.rng = program, random.Random(program.seed)
        self.tried: list[tuple[str, bool]] = []

    def name(self, kind: str, main: bool) -> str | None:
        """A live tensor, mostly a late one; an operand that is not the main one may be a constant."""
        if kind in CONSTANTS and not main and self.rng.random() < 0.25:
            return self.part("K") + CONSTANTS[kind]
        found = [name for name, k in self.program.names.items() if k == kind]
        if not found:
            return None
        return self.rng.choice(found[-2:] if self.rng.random() < 0.6 else found)

    def part(self, spec: str) -> str:
        name = f"p{len(self.program.parts)}"
        self.program.parts[name] = spec
        return f"self.{name}"

    def filled(self, template: str, bound: dict[str, str], new: dict[str, str]) -> str | None:
        """The template with every placeholder replaced; None where a tensor of some kind is missing."""
        kinds = list(self.program.names.values())
        chosen = {"T": self.rng.choice(kinds), "D": self.rng.choice([k for k in kinds if k in "XCSMG"])}

        def one(match: re.Match[str]) -> str:
            spec = match.group(1)
            if spec == "n":
                return repr(round(self.rng.uniform(0.3, 2), 2))
            if spec == "f":
                return f"lambda z: {self.function()}"
            if spec not in bound:
                kind = spec.strip("=23")
                kind = chosen.get(kind, kind)
                if spec[0] == "=":
                    bound[spec] = f"{kind.lower()}{len(self.program.names) + len(new)}"
                    new[bound[spec]] = kind
                elif kind in KINDS:
                    bound[spec] = self.name(kind, main=spec[-1] not in "23") or "?"
                else:
                    bound[spec] = self.part(kind)
            return bound[spec]

        text = re.sub(r"\{([^{}]+)\}", one, template)
        # PyTorch's forward mode has another tangent for y.mul_(y) than differences have
        return None if "?" in text or re.search(r"\b(\w+)\.mul_\(\1\)", text) else text

    def function(self) -> str:
        """An expression in `z`, of kind X."""
        while True:
            group = self.rng.choice("TDX")
            text = self.rng.choice(EXPRESSIONS[group])
            if f"{{{group}}}" in text:
                # the other operands are of kind X too
                text = re.sub(r"\{[TD](\d?)\}", r"{X\1}", text)
                found = self.filled(text, {"X": "z"}, {})
                if found is not None:
                    return found

    def step(self, refusals: bool) -> None:
        """One more line, if the plain module can do it."""
        program, rng = self.program, self.rng
        kept = list(program.steps), dict(program.names), dict(program.parts)
        text, new = None, {}
        while text is None:
            group = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            template = rng.choice(EXPRESSIONS[group] if group else STATEMENTS + REFUSED * 10 * refusals)
            new, program.parts = {}, dict(kept[2])
            text = self.filled(f"{{={group}}} = {template}" if group else template, {}, new)
        program.steps.append(text)
        program.names.update(new)
        ok = plain_runs(program)
        self.tried.append((template, ok))
        if not ok:
            program.steps, program.names, program.parts = kept


def plain_runs(program: Program) -> bool:
    """Whether the module runs by itself, forward and backward, to numbers of moderate size."""
    program.result = f"({', '.join(program.names)},)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = program.module()
            primals, _ = program.inputs()
            torch.manual_seed(0)
            out = net(*primals)
            loss = sum((o.square().mean() for o in out if o.requires_grad), torch.zeros(()))
            moderate = all(bool((o.abs() < 50).all()) for o in out)  # NaN is not
            if not program.writes and any(
                p._version != q._version for p, q in zip(primals, program.inputs()[0], strict=True)
            ):
                return False
            if moderate and loss.requires_grad:
                loss.backward()
                grads = [x.grad for x in (*primals, *net.parameters()) if x.is_leaf and x.grad is not None]
                moderate = all(bool((g.abs() < 1e5).all()) for g in grads)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, NotImplementedError):
        return False
    return moderate


def random_program(seed: int, tried: list[tuple[str, bool]] | None = None) -> Program:
    rng = random.Random(seed ^ 0x5EED)
    D = rng.choice([4, 4, 8])
    training = rng.random() < 0.8
    layouts = ["contiguous"] * 6
    for i in range(6):
        if rng.random() < 0.15:
            layouts[i] = rng.choice(["expanded batch", "expanded", "transposed", "strided"])
    program = Program(
        seed=seed,
        batch=rng.choice([2, 3, 3, 4, 5, 6]),
        sizes={"N": rng.choice([1, 2, 3, 3, 4, 5]), "D": D, "Q": D // 2},
        dtype=torch.float64 if rng.random() < 0.8 else torch.float32,
        layouts=layouts,
        requires_grad=[training and rng.random() < 0.3 for _ in range(3)] + [training],
        writes=rng.random() < 0.15,
        names={"x": "X", "c": "C", "a": "A"},
    )
    writer = _Writer(program)
    length, refusals = rng.randint(2, 10), rng.random() < 0.05
    for _ in range(3 * length):
        if len(program.steps) < length:
            writer.step(refusals)
    if tried is not None:
        tried.extend(writer.tried)
    shown = [BATCH_FIRST[kind].format(name) for name, kind in list(program.names.items())[-5:]]
    program.result = rng.choice(
        [
            shown[-1],
            shown[-1],
            f"({', '.join(shown)},)",
            f"[{', '.join(shown)}]",
            f"{{'u': {shown[-1]}, 'v': [{shown[0]}]}}",
        ]
    )
    return program
