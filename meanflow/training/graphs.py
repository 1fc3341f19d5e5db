"""The whole of a training step as one CUDA graph: recorded once, and replayed at every step after that.

A graph runs the same kernels on the same memory again, and no Python. What differs from one step to the next is put
into that memory before: the batch and everything drawn, the learning rate, the decay of the averages.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import Config
from ..errors import UsageError
from ..files import reason
from ..objectives import Draws
from ..registry import is_code

WARM_UP = 3  # steps: kernels are compiled, moments made and libraries given their memory where they first run
Step = Callable[[Tensor, Tensor, Draws], Tensor]


def conflict(config: Config, accelerator: Accelerator) -> str | None:
    """Why a step of this run cannot be recorded; None where it can."""
    if accelerator.device.type != "cuda":
        return f"device: expected a CUDA GPU, got {accelerator.device}"
    if accelerator.num_processes > 1:
        return f"processes: expected one, got {accelerator.num_processes}"
    if config.run.precision == "fp16":
        return "precision: the gradient scaler of fp16 reads on the host whether a gradient is infinite"
    if config.optim.accumulate > 1:
        return f"accumulate: expected 1, got {config.optim.accumulate}: each part seeds the generators anew"
    if config.run.checkpoint_blocks != 0:
        return (
            f"checkpoint_blocks: expected 0, got {config.run.checkpoint_blocks}: a block that is recomputed reads the "
            "generators' state"
        )
    if config.model.spectral_norm:
        return "spectral_norm: the host waits for the eigenvalues of each weight"
    if config.run.compile and config.run.compile_mode == "reduce-overhead":
        return "compile_mode: reduce-overhead records graphs of its own; expected default"
    return None


def is_recorded(config: Config, accelerator: Accelerator) -> bool:
    """Whether a run records its step. A network of the user's own, whose Python would run no more, only on demand.

    Raises:
        UsageError: it is asked for, and cannot be.
    """
    obstacle = conflict(config, accelerator)
    if config.run.cuda_graphs == "auto":
        return obstacle is None and not is_code(config.model.name)
    if config.run.cuda_graphs and obstacle is not None:
        raise UsageError(f"a step of this run cannot be recorded: {obstacle}", field="cuda_graphs")
    return bool(config.run.cuda_graphs)


def described(config: Config, accelerator: Accelerator) -> str:
    """In words, for the line that a run begins with."""
    if is_recorded(config, accelerator):
        return "steps as a CUDA graph"
    if config.run.cuda_graphs is False:
        return "no CUDA graph"
    foreign = f"model: {config.model.name} is not of this package; --cuda-graphs records it too"
    return f"no CUDA graph ({conflict(config, accelerator) or foreign})"


class CudaGraph:
    """What `StepGraph` needs of CUDA."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream()

    def warm_up(self, fn: Callable[[], Tensor]) -> Tensor:
        """`fn()` on a stream beside the current one, as before a recording, which leaves it too."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = fn()
        current.wait_stream(self.stream)
        return result

    def record(self, fn: Callable[[], Tensor]) -> Tensor:
        """Record what `fn` does without running it; returns the tensor that replays will fill."""
        # a tape that only a cycle keeps alive holds the nodes that gather gradients, which belong to their first stream
        gc.collect()
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # comes back to it, which a recording that fails does not
            # thread_local: the loader's thread may allocate pinned memory meanwhile
            torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"),
        ):
            return fn()

    def replay(self) -> None:
        """Run what was recorded."""
        self.graph.replay()


class StepGraph:
    """`step` as a CUDA graph. The first calls run it as it is, the next one records it, and all from then on replay it.

    Where the phase of the draws changes, it begins anew: other formulas run other kernels.

    Args:
        step: (x, y, draws) -> a tensor. It reads nothing on the host and draws nothing but from PyTorch's default
            generator, which may be seeded before a call. What else it changes or reads stays in the same memory.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.phase: str | None = None

    def _begin(self, phase: str) -> None:
        self.phase, self.calls = phase, 0
        self.inputs: dict[str, Tensor] = {}
        self.rows = 0
        self.result = torch.empty(0)
        self.graph = CudaGraph()  # in the place of the one before, whose memory is free from here on

    def __call__(self, x: Tensor, y: Tensor, draws: Draws) -> Tensor:
        """What `step` returns, in memory of its own.

        Raises:
            ValueError: an argument has not the shape, dtype or device that was recorded.
            UsageError: the step cannot be recorded.
        """
        if draws.phase != self.phase:
            self._begin(draws.phase)
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.graph.warm_up(lambda: self.step(x, y, draws))
        if not self.inputs:
            self._record(x, y, draws)
        else:
            self._fill(x, y, draws)
        self.graph.replay()
        return self.result.clone()

    def _record(self, x: Tensor, y: Tensor, draws: Draws) -> None:
        x, y, draws = x.clone(), y.clone(), draws.map(torch.clone)
        try:
            self.result = self.graph.record(lambda: self.step(x, y, draws))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # the end of a recording that failed has an error of its own, after the one that tells why
            why = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if isinstance(why, torch.OutOfMemoryError):
                raise why from error
            raise UsageError(
                f"cuda_graphs: the step of this run cannot be recorded: {reason(why)}; train with --no-cuda-graphs"
            ) from error
        self.inputs, self.rows = _named(x, y, draws), draws.rows

    def _fill(self, x: Tensor, y: Tensor, draws: Draws) -> None:
        given = _named(x, y, draws)
        if given.keys() != self.inputs.keys():
            raise ValueError(f"draws: expected {', '.join(self.inputs)}, as recorded, got {', '.join(given)}")
        if draws.rows != self.rows:
            raise ValueError(f"draws: expected {self.rows} rows with r != t, as recorded, got {draws.rows}")
        for name, recorded in self.inputs.items():
            expected, got = _kind(recorded), _kind(given[name])
            if got != expected:
                raise ValueError(f"{name}: expected {expected}, as recorded, got {got}")
        for name, recorded in self.inputs.items():
            recorded.copy_(given[name], non_blocking=True)


def _named(x: Tensor, y: Tensor, draws: Draws) -> dict[str, Tensor]:
    return {"x": x, "y": y, **draws.tensors()}


def _kind(a: Tensor) -> str:
    return f"shape {tuple(a.shape)} of {a.dtype} on {a.device}"
