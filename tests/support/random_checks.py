"""`mfkernels.jvp` of random modules against the modules' own steps and PyTorch's forward mode.

PYTHONPATH=.:tests/support python -m random_checks 5000             # seeds 0 to 4999, a table, status 0 or 1
PYTHONPATH=.:tests/support python -m random_checks --seed 17        # one seed, its program and what is wrong
PYTHONPATH=.:tests/support python -m random_checks --minimise 17    # the shortest program with the same fault
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import random
import re
import selectors
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from dualized import mha_operations
from random_modules import Program, RandomModule, random_program
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves

import mfkernels
from mfkernels import Dual
from mfkernels.derivative import split_output

BOUND = {False: 1e-12, True: 3e-5}  # of a relative error, in float64 and where anything is computed in float32
CONDITION = 1e-13  # the relative change of the inputs that tells an ill-conditioned program


def general(text: str) -> str:
    """What was found, without numbers and places."""
    if text.startswith("process"):
        return text
    text = re.sub(r" \((in \w+, )?program.*|. PyTorch's message.*|\[torch\..*", " …", text)
    return re.sub(r", # of # rows", "", re.sub(r"(?<![\w.])-?\d[\d.]*(e[+-]\d+)?", "#", text))[:150]


@dataclasses.dataclass
class Findings:
    """What is wrong and what was refused, each as "where: what"."""

    faults: list[str] = dataclasses.field(default_factory=list)
    refusals: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def kinds(self) -> set[str]:
        """The faults without their numbers."""
        return {general(fault) for fault in self.faults}


@dataclasses.dataclass
class Step:
    """What a training step leaves: outputs, gradients, the random state and what became of the inputs."""

    out: list[Tensor]
    spec: Any
    grads: dict[str, Tensor | None]
    rng: Tensor
    primals: list[Tensor]


def plain_step(net: RandomModule, program: Program) -> Step:
    primals, _ = program.inputs()
    torch.manual_seed(0)
    out, spec = tree_flatten(net(*primals))
    rng = torch.get_rng_state()
    return Step(out, spec, gradients(net, out, primals), rng, [p.detach() for p in primals])


def gradients(net: torch.nn.Module, out: list[Tensor], primals: list[Tensor]) -> dict[str, Tensor | None]:
    net.zero_grad()
    loss = sum((o.square().mean() for o in out if o.requires_grad), torch.zeros(()))
    if loss.requires_grad:
        loss.backward()
    named = {**dict(net.named_parameters()), **{f"inputs[{i}]": p for i, p in enumerate(primals)}}
    return {name: None if x.grad is None else x.grad.clone() for name, x in named.items() if x.is_leaf}


# --------------------------------------------------------------------------------------------------------------- oracle


def cut(tangents: list[Tensor | None], like: list[Tensor], lengths: list[int]) -> list[Tensor]:
    """The tangents of the first samples, zero on the others."""
    return [
        torch.zeros(p.shape, dtype=p.dtype) if t is None else torch.cat([t[:n], torch.zeros_like(t[n:])]).contiguous()
        for t, p, n in zip(tangents, like, lengths, strict=True)
    ]


class Oracle:
    """The tangents of a program's outputs, for every row, by PyTorch's forward mode."""

    def __init__(self, program: Program) -> None:
        self.program, self.net = program, program.module(oracle=True)

    def run(self, *xs: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return tuple(tree_leaves(self.net(*xs)))

    def primals(self, change: float = 0.0) -> list[Tensor]:
        """The program's, in memory of their own, changed a little at random."""
        g = torch.Generator().manual_seed(1)
        return [
            p.detach() * (1 + change * torch.randn(p.shape, generator=g, dtype=p.dtype))
            for p in self.program.inputs()[0]
        ]

    def tangents(self, tangents: Sequence[Tensor], change: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
        """The values, which tell whether it drew the same random numbers, and the tangents."""
        tangents = [t.clone() for t in tangents]  # a program that writes into its inputs writes into these
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), mha_operations():
            try:
                out, out_dot = torch.func.jvp(self.run, tuple(self.primals(change)), tuple(tangents))
                return list(out), list(out_dot)
            except RuntimeError as error:
                if "mutate a captured Tensor" not in str(error):
                    raise
            with fwAD.dual_level():
                pairs = [fwAD.unpack_dual(u) for u in self.run(*map(fwAD.make_dual, self.primals(change), tangents))]
                return [u for u, _ in pairs], [torch.zeros_like(u) if t is None else t for u, t in pairs]

    def differences(self, tangents: list[Tensor], h: float = 1e-5) -> list[Tensor]:
        """By central differences, of fourth order."""
        held: list[Tensor] = []
        with torch.no_grad(), _Held(held, replay=False):
            self.run(*self.primals())

        def at(s: float) -> tuple[Tensor, ...]:
            with _Held(list(held), replay=True):
                return self.run(*(p + s * t for p, t in zip(self.primals(), tangents, strict=True)))

        with torch.no_grad():
            far, near = zip(at(2 * h), at(-2 * h), strict=True), zip(at(h), at(-h), strict=True)
            return [(8 * (a - b) - (c - d)) / (12 * h) for (c, d), (a, b) in zip(far, near, strict=True)]


class _Held(TorchFunctionMode):
    """What `detach` and `.data` gave in one run, given again in others: there differences do not go on either."""

    def __init__(self, held: list[Tensor], replay: bool) -> None:
        super().__init__()
        self.held, self.replay = held, replay

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (Tensor.detach, Tensor.data.__get__):  # type: ignore[attr-defined]
            return func(*args, **(kwargs or {}))
        if self.replay:
            return self.held.pop(0)
        self.held.append(func(*args).clone())
        return func(*args)


def error_of(out: Tensor, ref: Tensor, scale: Tensor) -> float:
    """‖out − ref‖ / max(‖ref‖, ‖scale‖ / 100, 1e-3); NaN gives infinity."""
    out, ref = out.double(), ref.double()
    floor = max(scale.detach().double().norm().item() / 100, 1e-3)
    error = ((out - ref).norm() / ref.norm().clamp_min(floor)).item()
    return error if error == error else float("inf")


class Expected:
    """The oracle's tangents for one choice of the inputs' tangents; how far others may be from them."""

    def __init__(self, oracle: Oracle, tangents: list[Tensor], step: Step) -> None:
        self.oracle, self.given, self.step = oracle, tangents, step
        self.low = oracle.program.low
        self.bound, self.note = BOUND[self.low], ""
        self.tangents: list[Tensor] | None = None
        try:
            out, self.tangents = oracle.tangents(tangents)
            if any(error_of(u, own, own) > max(1e-8, self.bound) for u, own in zip(out, step.out, strict=True)):
                self.note = "forward mode draws other random numbers"
        except (RuntimeError, NotImplementedError) as error:
            self.note = f"no forward mode: {first_line(error)}"
        if self.note:
            self.tangents, self.bound = None, 1e-5
            if not self.low:
                with contextlib.suppress(RuntimeError):  # a view of what has other strides than the inputs
                    self.tangents = oracle.differences(tangents)

    def worst(self, found: list[Tensor | None], rows: int) -> str:
        """What is wrong with the tangents `found`, of the first rows; empty if nothing is."""
        for i, (t, u) in enumerate(zip(found, self.step.out, strict=True)):
            shape = (rows, *u.shape[1:])
            if t is not None and (t.shape != shape or t.dtype != u.dtype or t.requires_grad):
                return f"tangent of shape {tuple(t.shape)}, {t.dtype}, requires_grad {t.requires_grad}"
            if self.tangents is not None:
                ref = self.tangents[i][:rows]
                error = error_of(torch.zeros_like(ref) if t is None else t, ref, u[:rows])
                if error > self.bound and not self.excused(i, t, ref, error, rows):
                    return f"tangent{' None' if t is None else ''} wrong by {error:.1e}"
        return ""

    def excused(self, i: int, t: Tensor | None, ref: Tensor, error: float, rows: int) -> bool:
        """Whether the program is so ill-conditioned, or PyTorch's forward mode is what is wrong."""
        if self.bound > BOUND[self.low]:  # differences it is already
            return False
        u, program = self.step.out[i][:rows], self.oracle.program
        if self.low:
            other = Oracle(program.in_float64()).tangents([x.double() for x in self.given])[1][i][:rows]
        else:
            other = self.oracle.tangents(self.given, CONDITION)[1][i][:rows]
        if error < 10 * error_of(ref, other, u):
            return True
        if self.low:
            return False
        differences = self.oracle.differences(self.given)[i][:rows]
        t = torch.zeros_like(ref) if t is None else t
        if error_of(t, differences, u) < 1e-5 < error_of(ref, differences, u):
            self.note = "PyTorch's forward mode is wrong"
            return True
        return False


# --------------------------------------------------------------------------------------------------------------- checks


def check(program: Program) -> Findings:
    """The program dualized and as it stands, with no, some and all rows carrying tangents."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Check(program).run()


class _Check:
    def __init__(self, program: Program) -> None:
        self.program, self.found = program, Findings()
        self.rng = random.Random(program.seed)
        self.net, self.oracle = program.module(), Oracle(program)
        self.dual = mfkernels.dualize(self.net)
        self.step = plain_step(self.net, program)
        self.silent = [self.rng.random() < 0.15 for _ in range(3)]  # inputs whose tangent is None
        self.silent[self.rng.randrange(3)] = False

    def run(self) -> Findings:
        B, draw = self.program.batch, self.rng.randint
        for rows in (0, draw(1, B - 1), B):
            expected = Expected(self.oracle, cut(self.tangents(), self.step.primals, [rows] * 3), self.step)
            self.attempt(
                f"dualized, {rows} of {B} rows", expected, rows, lambda p, t, r=rows: self.jvp(self.dual, p, t, r)
            )
            self.attempt(
                f"undualized, {rows} of {B} rows", expected, rows, lambda p, t, r=rows: self.jvp(self.net, p, t, r)
            )
        lengths = [draw(0, B) for _ in range(3)]
        rows = max([n for n, none in zip(lengths, self.silent, strict=True) if not none])
        expected = Expected(self.oracle, cut(self.tangents(), self.step.primals, lengths), self.step)
        self.attempt(f"duals, {rows} of {B} rows", expected, rows, lambda p, t: self.duals(p, t, lengths, rows))
        if expected.note:
            self.found.notes.append(expected.note)
        return self.found

    def tangents(self) -> list[Tensor | None]:
        return [None if none else t for none, t in zip(self.silent, self.program.inputs()[1], strict=True)]

    def jvp(self, net: Any, primals: list[Tensor], tangents: list[Tensor | None], rows: int) -> tuple[Any, Any]:
        longer = [None if t is None else t[: self.rng.randint(rows, len(t))] for t in tangents]
        return mfkernels.jvp(net, primals, longer, rows=rows)

    def duals(self, primals: list[Tensor], tangents: list[Tensor | None], lengths: list[int], rows: int) -> Any:
        out = self.dual(
            *(p if t is None else Dual(p, t[:n]) for p, t, n in zip(primals, tangents, lengths, strict=True))
        )
        return split_output(out, rows)

    def attempt(self, where: str, expected: Expected, rows: int, run: Callable[..., tuple[Any, Any]]) -> None:
        """One pass and its backward; what differs from the plain step goes to the findings."""
        program, step, (primals, tangents) = self.program, self.step, self.program.inputs()
        dots = [None if none else t for none, t in zip(self.silent, tangents, strict=True)]
        torch.manual_seed(0)
        try:
            out, out_dot = run(primals, dots)
            rng = torch.get_rng_state()
            us, spec = tree_flatten(out)
            us_dot = tree_flatten(out_dot, is_leaf=lambda x: x is None)[0]
            grads = gradients(self.net, us, primals)
        except Exception as error:
            self.refusal_or_crash(where, error, rows)
            return

        def wrong(what: str) -> None:
            self.found.faults.append(f"{where}: {what}")

        if spec != step.spec or len(us_dot) != len(us):
            wrong(f"result is {spec}, tangents {len(us_dot)}")
            return
        for u, own in zip(us, step.out, strict=True):
            if type(u) is not Tensor or u.dtype != own.dtype or u.requires_grad != own.requires_grad:
                wrong(f"value is a {type(u).__name__}, {u.dtype}, requires_grad {u.requires_grad}")
            elif not torch.equal(u, own):
                wrong(f"value wrong by {error_of(u, own, own):.1e}")
        undualized = where.startswith("undualized")
        if not undualized and not torch.equal(rng, step.rng):
            wrong("random numbers were drawn differently")
        if not (undualized and program.draws):  # it draws anew
            problem = expected.worst(us_dot, rows)
            if problem and (not undualized or self.runs_on(rows)):
                wrong(problem)
        for name, own in step.grads.items():
            g = grads.get(name)
            if (g is None) != (own is None):
                wrong(f"gradient of {name.split('.')[0][:6]} is {'None' if g is None else 'not None'}")
            elif g is not None and own is not None and error_of(g, own, own) > BOUND[program.low]:
                wrong(f"gradient wrong by {error_of(g, own, own):.1e}")
        fresh, fresh_dots = program.inputs()
        if any(not torch.equal(a, b) for a, b in zip(tangents, fresh_dots, strict=True)):
            wrong("the caller's tangents were written to")
        for p, before, after in zip(primals, fresh, step.primals, strict=True):
            # a module that writes into its input may do so: then as it does by itself
            if not torch.equal(p, before) and not torch.equal(p, after):
                wrong("the caller's primals were written to, and not as the module does")

    def refusal_or_crash(self, where: str, error: Exception, rows: int) -> None:
        text = first_line(error)
        if isinstance(error, NotImplementedError) and text.startswith(("dualize:", "fn:")):
            self.found.refusals.append(f"{where.split(',')[0]}: {text}")
            return
        if not where.startswith("undualized") or self.runs_on(rows):
            self.found.faults.append(f"{where}: {type(error).__name__}: {text}")

    def runs_on(self, rows: int) -> bool:
        """Whether the module does with the first rows alone what it does with them among all.

        Not where it cannot take an empty batch, or where `x.transpose(0, 1).contiguous()` is a copy of several samples
        but a view of one, and is written to.
        """
        try:
            with torch.no_grad():
                torch.manual_seed(0)
                out = tree_leaves(self.net(*(p[:rows].clone() for p in self.program.inputs()[0])))
        except Exception:
            self.found.notes.append(f"undualized: the module cannot run on {'no' if rows == 0 else 'the first'} rows")
            return False
        if self.program.draws or all(error_of(u, v[:rows], v) < 1e-4 for u, v in zip(out, self.step.out, strict=True)):
            return True
        self.found.notes.append("undualized: the module does otherwise with the first rows")
        return False


def first_line(error: BaseException) -> str:
    return re.sub(r"program_\d+", "program", (str(error).strip() or type(error).__name__).splitlines()[0])[:200]


# ------------------------------------------------------------------------------------------------------------- minimise


def shorter(program: Program) -> Iterator[Program]:
    """Programs with a step fewer, a tensor in place of another, a smaller result or plainer inputs."""
    for i in reversed(range(len(program.steps))):
        yield dataclasses.replace(program, steps=program.steps[:i] + program.steps[i + 1 :])
    for i, step in enumerate(program.steps):
        first, *rest = step.split("\n")
        for j in range(len(rest) * (len(rest) > 0)):
            yield dataclasses.replace(
                program,
                steps=[*program.steps[:i], "\n".join([first, *rest[:j], *rest[j + 1 :]]), *program.steps[i + 1 :]],
            )
        made = re.match(r"(\w+) = ", step)
        for other, kind in program.names.items():
            if made and program.names.get(made[1]) == kind and other != made[1]:
                plain = f"{made[1]} = {other}"
                if step != plain and not re.fullmatch(r"\w+ = \w+", step):
                    yield dataclasses.replace(program, steps=[*program.steps[:i], plain, *program.steps[i + 1 :]])
    for part in re.findall(r"[^,()\[\]]+(?:\([^()]*\)[^,()\[\]]*)*", program.result):
        part = re.sub(r"^\{?'\w': ", "", part.strip()).rstrip("}")
        if part and part != program.result:
            yield dataclasses.replace(program, result=part)
    plain_layout = ["contiguous"] * 6
    if program.layouts != plain_layout:
        yield dataclasses.replace(program, layouts=plain_layout)
    if any(program.requires_grad):
        yield dataclasses.replace(program, requires_grad=[False] * 4)
    if program.dtype != torch.float64:
        yield dataclasses.replace(program, dtype=torch.float64)


def minimised(program: Program, about: str = "") -> Program:
    """A program as short as could be found that shows the first fault of `program` that has the words `about`."""

    def kinds(p: Program) -> set[str]:
        try:
            return check(p).kinds()
        except Exception:  # it is no program any more
            return set()

    wanted = next((kind for kind in map(general, check(program).faults) if about in kind), None)
    if wanted is None:
        raise SystemExit(f"seed {program.seed} has no fault with {about!r}")
    changed = True
    while changed:
        changed = False
        for candidate in shorter(program):
            if wanted in kinds(candidate):
                program, changed = candidate, True
                break
    return program


# -------------------------------------------------------------------------------------------------------------- command


def work(first: int, last: int) -> None:
    """Seeds one after the other, each announced and then reported as a line of JSON."""
    for seed in range(first, last):
        print(json.dumps({"begins": seed}), flush=True)
        try:
            found = check(random_program(seed))
        except Exception as error:  # of the generator or the oracle
            found = Findings([f"process: {type(error).__name__}: {first_line(error)}"])
        print(json.dumps({"seed": seed, **dataclasses.asdict(found)}), flush=True)


def results(first: int, last: int, patience: float) -> Iterator[dict[str, Any]]:
    """What `work` says, in a process that is started again after a seed that hangs or crashes."""
    while first < last:
        command = [sys.executable, "-m", "random_checks", "--worker", str(first), str(last)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            watch = selectors.DefaultSelector()
            watch.register(process.stdout, selectors.EVENT_READ)
            rest, fault = b"", ""
            while True:
                if not watch.select(patience):
                    process.kill()
                    fault = f"hung for {patience:.0f} s"
                    break
                data = process.stdout.read(65536)
                if not data:
                    break
                *told, rest = (rest + data).split(b"\n")
                for line in map(json.loads, told):
                    if "seed" in line:
                        yield line
                        first = line["seed"] + 1
            said = process.stderr.read().decode().strip().splitlines()[-1:]
        if first < last:
            fault = fault or f"the process ended with status {process.returncode}: {' '.join(said)}"
            yield {"seed": first, "faults": [f"process: {fault}"], "refusals": [], "notes": []}
            first += 1


def table(title: str, seeds: dict[str, list[int]]) -> None:
    if seeds:
        print(f"\n{title}")
    for what, where in sorted(seeds.items(), key=lambda item: -len(item[1])):
        print(
            f"  {len(where):5d}  {what}\n         seeds {' '.join(map(str, where[:8]))}{' …' if len(where) > 8 else ''}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--patience", type=float, default=60, help="seconds after which a seed counts as hanging")
    parser.add_argument("--seed", type=int, help="show and check one seed")
    parser.add_argument("--minimise", type=int, metavar="SEED", help="the shortest program with the fault of a seed")
    parser.add_argument("--about", default="", help="words of the fault to minimise; default: the first")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        work(*args.worker)
        return 0
    if args.seed is not None or args.minimise is not None:
        program = random_program(args.minimise if args.seed is None else args.seed)
        program = program if args.seed is not None else minimised(program, args.about)
        found = check(program)
        print(program, *found.faults, *found.refusals, *found.notes, sep="\n")
        return int(bool(found.faults))
    kinds = {name: collections.defaultdict(list) for name in ("faults", "refusals", "notes")}
    start, bad = time.time(), 0
    for line in results(args.first, args.first + args.count, args.patience):
        bad += bool(line["faults"])
        for name in kinds:
            for what in set(map(general, line[name])):
                kinds[name][what].append(line["seed"])
    table("Wrong or crashed", kinds["faults"])
    table("Refused (no failure)", kinds["refusals"])
    table("Notes", kinds["notes"])
    seconds = time.time() - start
    print(f"\n{args.count} seeds, {bad} with faults, {seconds:.0f} s ({args.count / seconds:.1f} seeds/s)")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
