"""The whole training step next to its peers, and the one-step sampler.

A step is what a trainer does: latents from pinned memory, draws, guidance, the dual pass, loss, backward, clipping,
AdamW, averaging. On a GPU: DiT-B/2, B/4, L/2 and XL/2 on latents 32×32×4 under bfloat16 autocast, guidance off and on
(ω = 1, κ = 0.5). Without one the same code runs a small DiT in float32. What users judge by is the first two rows: the
flow-matching step of a plain DiT through SDPA, eager and compiled. One row is one way. Its loss and gradients are
compared first: of an eager way at 16 samples with a float32 oracle's, in flow matching also at its own batch with the
plain step's; of a compiled one, which is compiled once, at its own batch with the eager way's.

    python -m pytest bench/step/test_whole_step.py --json FILE

BENCH_STEPS chooses: MODEL:BATCH:GUIDANCE:WAYS, several with spaces between them, as in "DiT-B/2:256:off:plain,fm,mf
DiT-B/2:256:on:plain,mf"; the batch "fill" is what should take 80 % of the GPU's memory, WAYS are keys of `WAYS`, or
"all". BENCH_ROUNDS is how often each is timed; BENCH_JAX is a Python that has JAX.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peers
import pytest
import torch
import torch.nn.functional as F
from measure import REHEARSAL, gemm_flops, median_ratio, torch_compile
from torch import Tensor, nn

from meanflow.models import create_model
from meanflow.objectives import FlowMatching, MeanFlow
from meanflow.sampling import sample
from meanflow.training.ema import EMA
from mfkernels import use_backend
from mfkernels.measuring import flops_of, interleaved_seconds, peak_bytes
from mfkernels.testing import relative_error
from mfkernels.timing import busy_time, latency

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
SMALL = {"input_size": 16, "hidden_size": 192, "depth": 4, "num_heads": 3, "patch_size": 2, "num_classes": 10}
if REHEARSAL:
    SMALL |= {"input_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 1}
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "10" if GPU else "4"))
# Of loss and gradients. In bfloat16 they are a sieve for mistakes, not for rounding.
BOUNDS = (5e-2, 2e-1) if GPU else (1e-5, 1e-5)
CHECKED = 4 if REHEARSAL else 16  # samples in the comparison with the oracle

Objective = MeanFlow | FlowMatching
Loss = Callable[..., Tensor]  # (objective, net, x, y, draws)


def ours(objective: Objective, net: nn.Module, x: Tensor, y: Tensor, draws) -> Tensor:
    return objective.loss(net, x, y, draws).loss


def func_jvp(objective: Objective, net: nn.Module, x: Tensor, y: Tensor, draws) -> Tensor:
    if isinstance(objective, FlowMatching):
        objective = MeanFlow(ratio=0.0)
    return peers.meanflow_step_loss(net, x, draws.noise, draws.t, draws.r, y, objective.omega, objective.kappa)


def jvp_flash_attention() -> peers.Attention | None:
    """The peer's attention, where it is installed."""
    try:
        from jvp_flash_attention.jvp_attention import JVPAttn
    except ImportError:
        return None
    return JVPAttn.fwd_dual


@dataclass(frozen=True)
class Way:
    name: str
    meanflow: bool = True  # or flow matching
    share: float = 0.25  # of the rows, with r ≠ t
    loss: Loss = ours
    attend: peers.Attention | None = None  # of the plain network; None: the way runs this library's
    mode: str | None = None  # of torch.compile; None: eager
    eager: str = ""  # the key of the way that a compiled one is compared with
    backend: str | None = None  # what is asked for with `use_backend`

    def objective(self, kappa: float) -> Objective:
        if not self.meanflow:
            return FlowMatching(label_dropout=0.0, norm_p=1.0)
        return MeanFlow(omega=1.0, kappa=kappa, ratio=self.share, label_dropout=0.0)


sdpa = F.scaled_dot_product_attention
# The most telling first. What the automatic choice of backends leaves out has not been timed yet.
WAYS: dict[str, Way] = {
    "plain": Way("flow matching, plain DiT through SDPA", meanflow=False, attend=sdpa),
    "plain-compiled": Way(
        "flow matching, plain DiT, compiled", meanflow=False, attend=sdpa, mode="default", eager="plain"
    ),
    "fm": Way("flow matching, this library", meanflow=False),
    "mf": Way("MeanFlow, this library (25 % of rows)"),
    "mf-compiled": Way("MeanFlow, this library (25 %), compiled", mode="default", eager="mf"),
    "fm-compiled": Way("flow matching, this library, compiled", meanflow=False, mode="default", eager="fm"),
    "jvp-compiled": Way(
        "torch.compile of torch.func.jvp",
        loss=func_jvp,
        attend=peers.math_attention,
        mode="default",
        eager="mf",  # the eager step of its own kind does not fit a GPU at this batch
    ),
    "mf-all": Way("MeanFlow, this library (every row)", share=1.0),
    "jvp": Way("torch.func.jvp", loss=func_jvp, attend=peers.math_attention),
    # eager: Dynamo does not trace its triton.set_allocator
    "jvp-flash": Way(
        "torch.func.jvp, jvp-flash-attention", loss=func_jvp, attend=jvp_flash_attention() or peers.math_attention
    ),
    "mf-graphs": Way("MeanFlow, this library (25 %), compiled: reduce-overhead", mode="reduce-overhead", eager="mf"),
    "mf-cudnn": Way("MeanFlow (25 %), attention_backward=cudnn", backend="triton,attention_backward=cudnn"),
    "mf-flash": Way("MeanFlow (25 %), attention_backward=flash", backend="triton,attention_backward=flash"),
    "mf-cuda": Way("MeanFlow (25 %), attention=cuda", backend="triton,attention=cuda"),
    "mf-cublaslt": Way("MeanFlow (25 %), mlp=cublaslt", backend="triton,mlp=cublaslt"),
}
# Flow matching has no guidance; what is compared with a guided step is the plain one without
GUIDED = ("plain", "plain-compiled", "mf", "mf-compiled", "jvp-compiled", "jvp", "jvp-flash")


class Case(NamedTuple):
    model: str
    batch: int | None  # None: what fills the GPU
    kappa: float
    key: str

    def __str__(self) -> str:
        return f"{self.model}-{self.batch or 'fill'}-{'guided' if self.kappa else 'not guided'}-{self.key}"


def cases(steps: str) -> list[Case]:
    """What BENCH_STEPS asks for. In a rehearsal a small model stands for DiT-B/2, and the others are left out."""
    found: list[Case] = []
    for step in steps.split():
        model, batch, guidance, keys = step.split(":")
        kappa = {"off": 0.0, "on": 0.5}[guidance]
        for key in WAYS if keys == "all" else keys.split(","):
            assert key in WAYS, f"BENCH_STEPS: expected keys of {', '.join(WAYS)}, got {key!r}"
            if kappa == 0 or key in GUIDED:
                size = None if batch == "fill" else int(batch)
                found.append(Case(model, size, kappa, key))
    if REHEARSAL:
        small = [Case("DiT", 4, case.kappa, case.key) for case in found if case.model == "DiT-B/2"]
        return list(dict.fromkeys(small))
    return found


# on a CPU the compiler takes minutes
EAGER = ",".join(key for key, way in WAYS.items() if way.mode is None and way.backend is None)
SIZES = ("DiT-B/2:256", "DiT-B/4:256", "DiT-XL/2:64")
EVERY_MODEL = " ".join(f"{size}:{guidance}:all" for size in SIZES for guidance in ("off", "on"))
CASES = cases(os.environ.get("BENCH_STEPS") or (EVERY_MODEL if GPU else f"DiT:16:off:{EAGER} DiT:16:on:{EAGER}"))
MODELS = list(dict.fromkeys(case.model for case in CASES))
BATCH = CASES[0].batch or 256


def plain_like(net: nn.Module) -> peers.PlainDiT:
    plain = peers.PlainDiT(
        input_size=net.input_size,
        patch_size=net.patch_size,
        in_channels=net.in_channels,
        hidden_size=net.pos_embed.shape[-1],
        depth=len(net.blocks),
        num_heads=net.blocks[0].attn.num_heads,
        num_classes=net.num_classes,
    )
    plain.load_state_dict(net.state_dict())
    return plain


def create(name: str) -> nn.Module:
    return create_model(name, **(SMALL if name == "DiT" else {}))


@functools.lru_cache(maxsize=1)
def build(name: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    with device:
        net = create(name)
        for p in net.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.02)  # nothing hides behind adaLN-Zero's zeros
    return net.to(device)


class Step:
    """One training step of a way, with an optimiser and an average of its own; `dtype` is autocast's, or float32."""

    def __init__(self, way: Way, net: nn.Module, batch: int, dtype: torch.dtype, kappa: float) -> None:
        self.way, self.dtype, self.device = way, dtype, next(net.parameters()).device
        self.objective = way.objective(kappa)
        self.net = net if way.attend is None else plain_like(net).to(self.device)
        if way.attend is not None:
            self.net.attend = way.attend
        mode = way.mode
        self.loss_of = way.loss if mode is None else torch_compile(way.loss, fullgraph=True, mode=mode)
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=GPU)
        self.ema = EMA(self.net, 0.9999)
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(batch, net.in_channels, net.input_size, net.input_size, generator=generator)  # [B, C, H, W]
        y = torch.randint(net.num_classes, (batch,), generator=generator)  # [B]
        self.data = (x.pin_memory(), y.pin_memory()) if GPU else (x, y)
        self.generator = torch.Generator(self.device).manual_seed(4)

    def loss(self) -> Tensor:
        x, y = (a.to(self.device, non_blocking=True) for a in self.data)
        draws = self.objective.draw(x.shape, generator=self.generator, device=self.device)
        half = self.dtype != torch.float32
        asked = contextlib.nullcontext() if self.way.backend is None else use_backend(self.way.backend)
        with torch.autocast(self.device.type, self.dtype) if half else contextlib.nullcontext(), asked:
            return self.loss_of(self.objective, self.net, x, y, draws)

    def __call__(self) -> None:
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.net, 1)

    def loss_and_gradients(self) -> tuple[Tensor, Tensor]:
        self.generator.manual_seed(4)
        loss = self.loss()
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in self.net.parameters() if p.requires_grad])
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), gradients


def check(case: Case, step: Step, net: nn.Module, batch: int) -> str:
    """What the step was compared with; a step that disagrees is not timed."""
    way = step.way
    if way.mode is None:
        if case not in RIGHT:
            oracle = replace(way, loss=func_jvp, attend=peers.math_attention, backend=None)
            wanted = Step(oracle, net, CHECKED, torch.float32, case.kappa).loss_and_gradients()
            agree(Step(way, net, CHECKED, DTYPE, case.kappa), wanted)
            if not way.meanflow and way.attend is None:  # a new plain step: those that were timed have been trained
                agree(step, Step(WAYS["plain"], net, batch, DTYPE, case.kappa).loss_and_gradients())
            RIGHT.add(case)
        return "the oracle"
    eager = case._replace(key=way.eager)
    try:
        reference = Step(WAYS[way.eager], net, batch, DTYPE, case.kappa)
        check(eager, reference, net, batch)
        wanted = reference.loss_and_gradients()
    except Exception as error:
        if way.attend is None:
            raise
        return f"nothing, for {WAYS[way.eager].name} fails: {error}"[:200]  # which has a row of its own
    del reference
    agree(step, wanted)
    return WAYS[way.eager].name


RIGHT: set[Case] = set()  # eager ways that agree with the oracle


def agree(step: Step, wanted: tuple[Tensor, Tensor]) -> None:
    for value, reference, bound in zip(step.loss_and_gradients(), wanted, BOUNDS, strict=True):
        error = relative_error(value, reference)
        assert error < bound, f"{step.way.name} is wrong by {error:.1e}, so it is not timed"


def jax_step(net: nn.Module, batch: int, kappa: float) -> dict:
    """jax_step.py's answer, run by the Python of BENCH_JAX (default: this one); its loss and gradient are checked."""
    python = os.environ.get("BENCH_JAX", sys.executable)
    if subprocess.run([python, "-c", "import jax"], capture_output=True).returncode != 0:
        pytest.skip(f"{python} has no JAX")
    answers = []
    for size, half, rounds in ((CHECKED, False, 1), (batch, GPU, ROUNDS)):
        step = Step(WAYS["mf"], net, size, torch.float32, kappa)
        x, y = (a.to(step.device) for a in step.data)
        draws = step.objective.draw(x.shape, generator=step.generator, device=step.device)
        case = {
            "x": x,
            "e": draws.noise,
            "t": draws.t,
            "r": draws.r,
            "y": y,
            "null": torch.full_like(y, net.num_classes),
        }
        arrays = {name: a.detach().cpu().numpy() for name, a in (net.state_dict() | case).items()}
        sizes = (net.patch_size, len(net.blocks), net.blocks[0].attn.num_heads)
        with tempfile.TemporaryDirectory() as folder:
            np.savez(f"{folder}/case.npz", sizes=sizes, kappa=kappa, half=half, **arrays)
            command = [python, str(Path(__file__).with_name("jax_step.py")), f"{folder}/case.npz", str(rounds)]
            done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"jax_step.py failed: {done.stderr[-2000:]}"
        answers.append(json.loads(done.stdout))
        if len(answers) == 1:
            loss, gradients = step.loss_and_gradients()
            for got, wanted in ((answers[0]["loss"], loss), (answers[0]["gradient_norm"], gradients.norm())):
                assert abs(got / float(wanted) - 1) < 1e-4, "JAX's step is another one, so it is not timed"
    return answers[1]


@functools.lru_cache(maxsize=1)
def on_meta(model: str) -> nn.Module:
    with torch.device("meta"):
        return create(model)


def step_flops(way: Way, model: str, batch: int, kappa: float) -> float:
    """What a step of this kind has to compute: this library's, counted on four samples of meta tensors."""
    net, objective = on_meta(model), way.objective(kappa)
    x = torch.empty(4, net.in_channels, net.input_size, net.input_size, device="meta")  # [B, C, H, W]
    y = torch.empty(4, dtype=torch.long, device="meta")  # [B]
    draws = objective.draw(x.shape, device="meta")
    with use_backend("reference"):
        return flops_of(lambda: ours(objective, net, x, y, draws).backward()) * batch / 4


@functools.lru_cache(maxsize=1)
def filling(net: nn.Module, kappa: float) -> int:
    """The power of two, up to 1024, whose MeanFlow step should take at most 80 % of the GPU's memory."""
    if not GPU:
        return 32
    less, more = (peak_bytes(Step(WAYS["mf"], net, batch, DTYPE, kappa)) for batch in (8, 32))
    room = 0.8 * torch.cuda.get_device_properties(0).total_memory - less
    return min(1024, 2 ** int(math.log2(max(32, 24 * room / max(more - less, 1)))))


@functools.lru_cache(maxsize=1)
def base_of(model: str, net: nn.Module, batch: int) -> tuple[Step, int, float]:
    """What every row is compared with in its own process, the plain eager step; its peak memory and its FLOPs."""
    step = Step(WAYS["plain"], net, batch, DTYPE, 0.0)
    step()
    return step, peak_bytes(step), step_flops(step.way, model, batch, 0.0)


def ratio_to_compiled(rows: list[dict], table: str, ratio: float) -> float | None:
    """To the compiled plain step: the quotient of the two ratios to the eager one, each taken in turns with it."""
    name = WAYS["plain-compiled"].name
    found = [row["× plain"] for row in rows if row["table"] == table and row.get("way") == name]
    return ratio / found[-1] if found else None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_step(case, device, figures):
    model, batch, kappa, key = case
    way = WAYS[key]
    if key == "jvp-flash" and jvp_flash_attention() is None:
        pytest.skip("jvp-flash-attention is not installed")
    torch.compiler.reset()
    net = build(model, device)
    if batch is None:
        batch = filling(net, kappa)
    base, base_memory, base_flops = base_of(model, net, batch)
    step = base if key == "plain" else Step(way, net, batch, DTYPE, kappa)
    try:
        compared_with = check(case, step, net, batch)
    except NotImplementedError as error:
        pytest.skip(str(error))  # what was asked for does not serve this network on this machine
    taken = interleaved_seconds({"plain": base, "way": step}, rounds=ROUNDS, warmup=1 if REHEARSAL else 3)
    seconds, ratio = statistics.median(taken["way"]), median_ratio(taken["way"], taken["plain"])
    memory = None if way.mode == "reduce-overhead" else peak_bytes(step)  # a CUDA graph took its before
    flops = step_flops(way, model, batch, kappa)
    table = table_of(model, batch, kappa)
    figures.append(
        {
            "table": table,
            "way": way.name,
            "ms": 1e3 * seconds,
            "images/s": batch / seconds,
            "× plain": ratio,
            "× plain, compiled": ratio_to_compiled(figures.rows(), table, ratio),
            "× its FLOPs": flops / base_flops,
            "of the GEMM ceiling": flops / seconds / gemm_flops(DTYPE),
            "peak GiB": memory and memory / 2**30,
            "× its memory": memory and memory / base_memory,
            "compared with": compared_with,
        }
    )


def table_of(model: str, batch: int, kappa: float) -> str:
    return f"Whole step: {model}, {'guided' if kappa else 'not guided'}, {DTYPE}, batch {batch}"


@pytest.mark.parametrize("kappa", [0.0, 0.5], ids=["not guided", "guided"])
@pytest.mark.parametrize("model", MODELS)
def test_jax(model, kappa, device, figures):
    """The same step in JAX, in a process of its own; its allocator takes memory beforehand, so none is told."""
    net = build(model, device)
    batch = BATCH
    jax = jax_step(net, batch, kappa)
    seconds = statistics.median(jax["seconds"])
    base = base_of(model, net, batch)[0]
    ratio = seconds / statistics.median(interleaved_seconds({"plain": base}, rounds=ROUNDS)["plain"])
    table = table_of(model, batch, kappa)
    figures.append(
        {
            "table": table,
            "way": f"JAX {jax['jax']}, jax.jvp",
            "ms": 1e3 * seconds,
            "images/s": batch / seconds,
            "× plain": ratio,
            "× plain, compiled": ratio_to_compiled(figures.rows(), table, ratio),
        }
    )


SAMPLES = (1, 4) if REHEARSAL else (1, 256 if GPU else 16)


@pytest.mark.parametrize("batch", SAMPLES)
@pytest.mark.parametrize("model", MODELS)
def test_sampler(model, batch, device, figures):
    """One network evaluation an image: how long the device is busy, and the time of a call, also from a CUDA graph."""
    net = build(model, device)
    noise = torch.randn(batch, net.in_channels, net.input_size, net.input_size, device=device)  # [B, C, H, W]
    y = torch.zeros(batch, dtype=torch.long, device=device)  # [B]

    def draw() -> Tensor:
        with torch.autocast(device.type, DTYPE) if GPU else contextlib.nullcontext():
            return sample(net, noise, y)

    busy = busy_time(draw)
    for way in ("eager", "CUDA graph") if GPU else ("eager",):
        alone = latency(draw if way == "eager" else graphed(draw))
        figures.append(
            {
                "table": f"One-step sampling: {model}, {DTYPE}",
                "batch": batch,
                "way": way,
                "ms": 1e3 * busy.seconds,
                "images/s": batch / (busy.seconds if way == "CUDA graph" else max(busy.seconds, alone)),
                "latency ms": 1e3 * alone,
                "timed by": busy.how,
            }
        )


def graphed(fn: Callable[[], Tensor]) -> Callable[[], None]:
    """`fn`, whose inputs stay where they are, recorded into a CUDA graph; its replay is compared with `fn` first."""
    stream = torch.cuda.current_stream()  # the row's own
    for _ in range(3):
        fn()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = fn()
    graph.replay()
    error = relative_error(out, fn())
    assert error < 1e-2, f"the replay differs by {error:.1e}, so it is not timed"
    return graph.replay
