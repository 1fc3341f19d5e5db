"""The whole training step next to its peers, and the one-step sampler.

A step is what a trainer does: latents from pinned memory, draws, guidance, the dual pass, loss, backward, clipping,
AdamW, averaging. On a GPU: DiT-B/4, B/2, L/2 and XL/2 on latents 32×32×4 under bfloat16 autocast, guidance off and on
(ω = 1, κ = 0.5), at batch 32 and at one that fills the GPU. Without one the same code runs a small DiT in float32.
The loss and the gradients of every way are compared with a float32 oracle's before it is timed.

    python -m pytest bench/step/test_whole_step.py -s --json FILE

BENCH_MODELS (names, with commas), BENCH_BATCHES (numbers or "fill"), BENCH_ROUNDS and BENCH_COMPILE (0 leaves the
compiled ways out) choose less or more; BENCH_JAX is a Python that has JAX.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from measure import flops_of, gemm_flops, interleaved_seconds, peak_bytes
from torch import Tensor, nn

from meanflow.models import create_model
from meanflow.objectives import FlowMatching, MeanFlow
from meanflow.sampling import sample
from meanflow.training.ema import EMA
from mfkernels.testing import relative_error

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
SMALL = {"input_size": 16, "hidden_size": 192, "depth": 4, "num_heads": 3, "patch_size": 2, "num_classes": 10}
MODELS = os.environ.get("BENCH_MODELS", "DiT-B/4,DiT-B/2,DiT-L/2,DiT-XL/2" if GPU else "DiT").split(",")
BATCHES = os.environ.get("BENCH_BATCHES", "32,fill" if GPU else "16").split(",")
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "10" if GPU else "4"))
COMPILE = os.environ.get("BENCH_COMPILE", "1" if GPU else "0") == "1"
# Of loss and gradients. In bfloat16 they are a sieve for mistakes, not for rounding.
BOUNDS = (5e-2, 2e-1) if GPU else (1e-5, 1e-5)
CHECKED = 16  # samples in the comparison with the oracle
COLUMNS = ("ms", "images/s", "× flow matching", "× its FLOPs", "of the GEMM ceiling", "peak GiB", "× its memory")

Objective = MeanFlow | FlowMatching
Loss = Callable[..., Tensor]  # (objective, net, x, y, draws)


def ours(objective: Objective, net: nn.Module, x: Tensor, y: Tensor, draws) -> Tensor:
    return objective.loss_of(net, x, y, draws).loss


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
    objective: Objective
    loss: Loss = ours
    attend: peers.Attention | None = None  # of the plain network; None: the way runs this library's


def ways_of(kappa: float) -> list[Way]:
    quarter = MeanFlow(omega=1.0, kappa=kappa, label_dropout=0.0)
    ways = [
        Way("flow matching, this library", FlowMatching(label_dropout=0.0, norm_p=1.0)),
        Way("MeanFlow, this library (25 % of rows)", quarter),
        Way("MeanFlow, this library (every row)", replace(quarter, ratio=1.0)),
        Way("torch.func.jvp", quarter, func_jvp, peers.math_attention),
    ]
    if COMPILE:
        for mode in ("default", "reduce-overhead"):
            compiled = torch.compile(ours, fullgraph=True, dynamic=False, mode=mode)
            ways.append(Way(f"MeanFlow, this library (25 %), compiled: {mode}", quarter, compiled))
        flash, compiled = jvp_flash_attention(), torch.compile(func_jvp, fullgraph=True, dynamic=False)
        name = "torch.compile of torch.func.jvp" + ("" if flash is None else ", jvp-flash-attention")
        ways.append(Way(name, quarter, compiled, flash or peers.math_attention))
    return ways


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


def build(name: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    net = create_model(name, **(SMALL if name == "DiT" else {}))
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.02)  # nothing hides behind adaLN-Zero's zeros
    return net.to(device)


class Step:
    """One training step of a way, with an optimiser and an average of its own; `dtype` is autocast's, or float32."""

    def __init__(self, way: Way, net: nn.Module, batch: int, dtype: torch.dtype) -> None:
        self.way, self.dtype, self.device = way, dtype, next(net.parameters()).device
        self.net = net if way.attend is None else plain_like(net).to(self.device)
        if way.attend is not None:
            self.net.attend = way.attend
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
        draws = self.way.objective.draw(x.shape, generator=self.generator, device=self.device)
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if half else contextlib.nullcontext():
            return self.way.loss(self.way.objective, self.net, x, y, draws)

    def __call__(self) -> None:
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.net, 1)

    def loss_and_gradients(self) -> tuple[Tensor, Tensor]:
        loss = self.loss()
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in self.net.parameters() if p.requires_grad])
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), gradients


def check(way: Way, net: nn.Module) -> None:
    oracle = replace(way, loss=func_jvp, attend=peers.math_attention)
    wanted = Step(oracle, net, CHECKED, torch.float32).loss_and_gradients()
    got = Step(way, net, CHECKED, DTYPE).loss_and_gradients()
    for value, reference, bound in zip(got, wanted, BOUNDS, strict=True):
        error = relative_error(value, reference)
        assert error < bound, f"{way.name} is wrong by {error:.1e}, so it is not timed"


def jax_step(net: nn.Module, batch: int, kappa: float) -> dict | None:
    """jax_step.py's answer, run by the Python of BENCH_JAX (default: this one); None where that has no JAX."""
    python = os.environ.get("BENCH_JAX", sys.executable)
    if subprocess.run([python, "-c", "import jax"], capture_output=True).returncode != 0:
        return None
    answers = []
    for size, half, rounds in ((CHECKED, False, 1), (batch, GPU, ROUNDS)):
        step = Step(Way("", MeanFlow(kappa=kappa, label_dropout=0.0)), net, size, torch.float32)
        x, y = (a.to(step.device) for a in step.data)
        draws = step.way.objective.draw(x.shape, generator=step.generator, device=step.device)
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
        if done.returncode != 0:
            raise RuntimeError(f"jax_step.py failed:\n{done.stderr[-2000:]}")
        answers.append(json.loads(done.stdout))
        if len(answers) == 1:
            loss, gradients = Step(step.way, net, size, torch.float32).loss_and_gradients()
            for got, wanted in ((answers[0]["loss"], loss), (answers[0]["gradient_norm"], gradients.norm())):
                assert abs(got / float(wanted) - 1) < 1e-4, "JAX's step is another one, so it is not timed"
    return answers[1]


def step_flops(way: Way, net: nn.Module, batch: int) -> float:
    """What a step of this kind has to compute: this library's, counted on four samples of meta tensors."""
    meta = copy.deepcopy(net).to("meta")
    x = torch.empty(4, net.in_channels, net.input_size, net.input_size, device="meta")  # [B, C, H, W]
    y = torch.empty(4, dtype=torch.long, device="meta")  # [B]
    draws = way.objective.draw(x.shape, device="meta")
    return flops_of(lambda: ours(way.objective, meta, x, y, draws).backward()) * batch / 4


def filling(way: Way, net: nn.Module) -> int:
    """The power of two, up to 1024, whose step should take at most 80 % of the GPU's memory."""
    if not GPU:
        return 32
    less, more = (peak_bytes(Step(way, net, batch, DTYPE)) for batch in (8, 32))
    room = 0.8 * torch.cuda.get_device_properties(0).total_memory - less
    return min(1024, 2 ** int(math.log2(max(32, 24 * room / max(more - less, 1)))))


@pytest.mark.parametrize("kappa", [0.0, 0.5], ids=["guidance off", "guidance on"])
@pytest.mark.parametrize("name", MODELS)
def test_whole_step(name, kappa, device, figures, benchmark):
    net = build(name, device)
    ways = ways_of(kappa)
    for asked in BATCHES:
        batch = filling(ways[1], net) if asked == "fill" else int(asked)
        table = f"Whole step: {name}, {'guided' if kappa else 'not guided'}, {DTYPE}, batch {batch}"
        base: dict[str, float] = {}  # the first way's figures

        def report(way: str, seconds: float, memory: float, flops: float, table=table, batch=batch, base=base) -> None:
            if not base:
                base.update(seconds=seconds, memory=memory, flops=flops)
            values = (
                1e3 * seconds,
                batch / seconds,
                seconds / base["seconds"],
                flops / base["flops"],
                flops / seconds / gemm_flops(DTYPE),
                memory / 2**30,
                memory / base["memory"],
            )
            figures.append({"table": table, "way": way, **dict(zip(COLUMNS, values, strict=True))})

        for way in ways:
            torch.compiler.reset()
            step = None
            try:
                check(way, net)
                step = Step(way, net, batch, DTYPE)
                taken = interleaved_seconds({"step": step}, rounds=ROUNDS, warmup=3)["step"]
                # a CUDA graph took its memory when it was recorded
                memory = math.nan if "reduce-overhead" in way.name else peak_bytes(step)
                report(way.name, statistics.median(taken), memory, step_flops(way, net, batch))
            except Exception as error:  # the first way is what the others are measured by, and ours must be right
                if way is ways[0] or isinstance(error, AssertionError):
                    raise
                why = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
                figures.append({"table": table, "way": way.name, **dict.fromkeys(COLUMNS, why)})
                print(f"{table}: {way.name}: {error}")
            step = None
            if GPU:
                torch.cuda.empty_cache()
        jax = jax_step(net, batch, kappa)  # last: if it fails, the rows above are there
        if jax is not None:
            # its allocator takes the GPU's memory beforehand, so nothing comparable is to be had
            way, seconds = f"JAX {jax['jax']}, jax.jvp", statistics.median(jax["seconds"])
            report(way, seconds, math.nan, step_flops(ways[1], net, batch))
    benchmark.pedantic(Step(ways[1], net, 8, DTYPE), rounds=1)


@pytest.mark.parametrize("name", MODELS)
def test_sampler(name, device, figures, benchmark):
    """One network evaluation an image: throughput, and the latency of a single image, also from a CUDA graph."""
    net = build(name, device).eval()

    def draw(noise: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, DTYPE) if GPU else contextlib.nullcontext():
            return sample(net, noise, y)

    for batch in (1, 256 if GPU else 16):
        noise = torch.randn(batch, net.in_channels, net.input_size, net.input_size, device=device)  # [B, C, H, W]
        y = torch.zeros(batch, dtype=torch.long, device=device)  # [B]
        ways = {"eager": partial(draw, noise, y)}
        if GPU:
            ways["CUDA graph"] = graphed(ways["eager"])
        for way, taken in interleaved_seconds(ways, rounds=ROUNDS, warmup=3).items():
            figures.append(
                {
                    "table": f"One-step sampling: {name}, {DTYPE}",
                    "batch": batch,
                    "way": way,
                    "ms": 1e3 * statistics.median(taken),
                    "images/s": batch / statistics.median(taken),
                }
            )
    benchmark.pedantic(ways["eager"], rounds=1)


def graphed(fn: Callable[[], Tensor]) -> Callable[[], None]:
    """`fn`, whose inputs stay where they are, recorded into a CUDA graph; its replay is compared with `fn` first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn()
    graph.replay()
    assert relative_error(out, fn()) < 1e-2, "the replay differs, so it is not timed"
    return graph.replay
