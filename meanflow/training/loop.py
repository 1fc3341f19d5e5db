"""The training loop: thin, over `accelerate`."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import is_tensorboard_available, set_seed
from torch import Tensor, nn

from ..checks import check_device
from ..data import ImageData, StepOrder, generator_for, micro_batches
from ..data.order import mix, shard
from ..errors import TrainingError, UsageError
from ..models import config_of
from ..objectives import Draws
from ..processes import world_size
from .build import build_model, build_objective
from .checkpoint import (
    Checkpoint,
    check_tensors,
    cure_for_damage,
    list_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    load_tensors,
    load_weights,
    not_finite,
    optimizer_tensors,
    parameter_of,
    remove_partial,
    save_checkpoint,
)
from .config import TrainConfig
from .ema import EMA
from .graphs import Step, StepGraph, conflict, is_recorded
from .log import RunLog
from .parallel import AUTOCAST, checkpoint_blocks, in_bfloat16, is_sharded, settled, training_loss, whole
from .schedule import learning_rate
from .signals import StopSignals
from .state import check_scaler, load_state

# words in the errors of gloo and NCCL where another process is gone
COLLECTIVE = ("connection closed", "connection reset", "broken pipe", "timed out", "gloo", "nccl")


@dataclass(frozen=True)
class TrainResult:
    """How a call of `Trainer.run` ended.

    step: optimiser steps done, over all calls.
    new_steps: those of this call; 0 where the run had reached its last step before.
    seconds: spent in them, over all calls.
    images_per_second: over this call.
    checkpoint: the newest one, None where there is none.
    signal: the signal that ended it early, None where it reached its last step.
    """

    step: int
    new_steps: int
    seconds: float
    images_per_second: float
    checkpoint: Path | None
    signal: int | None


def make_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """Device, precision, gradient accumulation and trackers as the configuration says.

    Raises:
        UsageError: this machine or installation cannot do that.
    """
    check_device(config.device)
    if config.tensorboard and not is_tensorboard_available():
        raise UsageError('tensorboard: it is not installed: pip install "meanflow[tensorboard]"')
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UsageError(
                f"strategy: accelerate was told to use {name} by its own configuration; take that out, and choose with "
                "--strategy ddp or --strategy fsdp"
            )
    world_size()  # raises before accelerate would wait for processes that are not there
    # where PyTorch sees no GPU, accelerate starts no group by itself: each process would be a run of its own
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    device = PartialState(cpu=cpu).device
    config = settled(config, device)
    if config.precision in ("tf32", "fp16") and device.type != "cuda":  # accelerate would train in float32
        raise UsageError(f"precision: {config.precision} is a format of NVIDIA GPUs, and this run's device is {device}")
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=config.precision if config.precision in AUTOCAST else "no",
            gradient_accumulation_steps=config.accumulate,
            log_with="tensorboard" if config.tensorboard else None,
            project_dir=str(folder),
        )
    except ValueError as error:  # a second run of this process with another precision
        raise UsageError(f"precision: {config.precision} cannot be used here: {error}") from error
    if accelerator.num_processes != world_size():  # which accelerate sets for mpirun's processes
        raise UsageError(
            f"WORLD_SIZE: {world_size()} processes are announced, and accelerate found {accelerator.num_processes} on "
            f"{device}; expected as many (`meanflow info` shows what PyTorch sees)"
        )
    torch_version = tuple(map(int, torch.__version__.split(".")[:2]))
    if is_sharded(config, accelerator) and accelerator.device.type == "cpu" and torch_version < (2, 7):
        raise UsageError(f"strategy: fsdp on a CPU: expected torch 2.7 or newer, found {torch.__version__}")
    if config.compile and torch_version < (2, 11):
        # older ones (2.6, 2.8 and 2.9 were tried) do not follow a Dual's properties
        raise UsageError(f"compile: expected torch 2.11 or newer, found {torch.__version__}")
    if config.compile and config.compile_mode == "reduce-overhead" and accelerator.device.type != "cuda":
        raise UsageError(
            f"compile_mode: reduce-overhead records CUDA graphs, and this run's device is {accelerator.device}; there "
            "expected default"
        )
    if config.compile and config.compile_mode == "reduce-overhead" and config.accumulate > 1:
        # the gradients of one part are memory of its CUDA graph, which the next part's run takes (pytorch#169545)
        raise UsageError(f"accumulate: expected 1 with compile_mode reduce-overhead, got {config.accumulate}")
    parts = config.accumulate * accelerator.num_processes
    if config.batch_size % parts != 0:
        raise UsageError(
            f"batch_size: expected a multiple of {parts} ({accelerator.num_processes} processes × accumulate = "
            f"{config.accumulate}), got {config.batch_size}"
        )
    is_recorded(config, accelerator)  # raises where it is asked for and cannot be
    return accelerator


class Trainer:
    """One training run: weights, averages, optimiser and position, and the loop over them.

    Args:
        config: the run.
        data: what it trains on.
        folder: the run folder; nothing is written before `run`.
        accelerator: from `make_accelerator`.
        on_samples: called with (net, step), in the main process, when a sample grid is due; `net` holds the averages.

    Raises:
        UsageError: the configuration does not fit the data or the machine.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData,
        folder: Path,
        accelerator: Accelerator,
        on_samples: Callable[[nn.Module, int], None] | None = None,
    ) -> None:
        self.auto_precision = config.precision == "auto"
        self.config = config = settled(config, accelerator.device)
        self.data, self.folder, self.accelerator = data, folder, accelerator
        self.on_samples = on_samples
        set_seed(config.seed)  # the same first weights in every process
        self.objective = build_objective(config)
        self.model = build_model(config, data)
        if config.init is not None:
            load_weights(self.model, load_tensors(Path(config.init)), Path(config.init))
        if config.precision == "bf16-weights":
            in_bfloat16(self.model)
        checkpoint_blocks(self.model, config.checkpoint_blocks)
        self._check_parts()
        self.loss_of = training_loss(self.model, self.objective, config, accelerator)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.recorded = is_recorded(config, accelerator)
        self.update: Step = self._update  # or a recording of it, within `run`
        # wherever a step can be recorded, so that it is the same one with and without
        recordable = conflict(config, accelerator) is None
        self.lr = torch.tensor(config.lr, device=accelerator.device) if recordable else None
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr if self.lr is None else self.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=recordable or accelerator.device.type == "cuda",  # recordable: no other takes its rate from memory
            capturable=recordable,
        )
        self.optimizer = accelerator.prepare(optimizer)
        self.ema = EMA(self.model, config.ema_decay, recordable=recordable)
        self._check_backends()
        self.order = StepOrder(len(data.train), config.batch_size, config.seed)
        self.step = 0
        self.seconds = 0.0

    def _check_parts(self) -> None:
        parts = self.config.accumulate * self.accelerator.num_processes
        ratio = getattr(self.objective, "ratio", 0.0)
        rows = round(self.config.batch_size * ratio)
        if ratio > 0.0 and rows == 0:
            raise UsageError(
                f"ratio, batch_size: a share of {ratio:g} of {self.config.batch_size} samples is none; expected one "
                "with r != t at least, or ratio 0"
            )
        if rows % parts != 0:
            raise UsageError(
                f"ratio, batch_size: {rows} of the batch's {self.config.batch_size} samples have r != t; expected a "
                f"multiple of {parts} ({self.accelerator.num_processes} processes × accumulate = "
                f"{self.config.accumulate}), so that each part has as many"
            )

    def _check_backends(self) -> None:
        """Four samples through the loss and its gradient, so that a backend that cannot serve an op says so now."""
        device = self.accelerator.device
        x = torch.zeros(4, self.data.channels, self.data.image_size, self.data.image_size, device=device)
        y = torch.zeros(4, dtype=torch.long, device=device)
        try:
            loss = self.objective(self.model, x, y, generator=torch.Generator(device)).loss
            if is_sharded(self.config, self.accelerator):
                loss.backward()
                self.optimizer.zero_grad()
            else:
                torch.autograd.grad(loss, self.parameters, allow_unused=True)  # leaves no gradient behind
        except (NotImplementedError, TypeError, ValueError) as error:
            if str(error).startswith("net:"):
                raise UsageError(f"model: {self.config.model}: {error}") from error
            if isinstance(error, NotImplementedError) or str(error).startswith("MFKERNELS_BACKEND:"):
                raise UsageError(f"backend: this run cannot be served: {error}") from error
            raise  # a mistake within the user's own network
        except RuntimeError as error:
            if self.config.precision != "bf16-weights":
                raise
            raise UsageError(
                "precision: this network does not run with its weights in bfloat16, z in bfloat16 and the times in "
                f"float32 ({error}); --precision bf16 asks nothing of a network"
            ) from error

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint as if the run had never stopped.

        Raises:
            UsageError: it is damaged, of another model, or of other classes or images than the data.
        """
        held = self._held()
        try:
            state = load_state(path, "seconds", "class_names", "model")
            saved = load_checkpoint(path, like=held)
        except UsageError as error:
            raise UsageError(f"{error}{cure_for_damage(self.checkpoints, path)}") from error
        self.data.check_classes(state["class_names"], path)
        for name, here in (("input_size", self.data.image_size), ("in_channels", self.data.channels)):
            before = state["model"].get("config", {}).get(name, here)
            if before != here:
                raise UsageError(f"data: {path} was trained with {name} {before}, and {self.data.name} has {here}")
        load_weights(self.model, saved.model, path)
        check_tensors(saved.ema, self.ema.weights, path / "ema.safetensors")
        moved = {parameter_of(key) for key in saved.optimizer}  # a parameter that never had a gradient has no moments
        moments = {key: value for key, value in held.optimizer.items() if parameter_of(key) in moved}
        unknown = [key for key in saved.optimizer if key not in held.optimizer]
        if unknown:
            raise UsageError(f"{path / 'optimizer.safetensors'}: expected moments of this model, got {unknown[0]}")
        check_tensors(saved.optimizer, moments, path / "optimizer.safetensors")
        self.ema.load(saved.ema)
        load_optimizer_tensors(self.model, self.optimizer.optimizer, saved.optimizer)
        if self.accelerator.scaler is not None and state.get("scaler"):
            check_scaler(state["scaler"], self.accelerator.scaler.state_dict(), path)
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = saved.step, float(state["seconds"])

    def save(self, seconds: float) -> None:
        """Write a checkpoint of the current step; every process takes part.

        Raises:
            TrainingError: weights, averages or moments are not finite, or the disk does not take the checkpoint; the
                last one is as it was.
        """
        saved = self._held(seconds)
        averages = {f"average of {name}": value for name, value in self.ema.weights.items()}
        bad = not_finite({**dict(self.model.named_parameters()), **averages, **saved.optimizer})
        if bad:  # a step whose loss and gradient were finite can still lead there
            raise self._stopped(f"{bad[0]} is not finite after step {self.step}")
        if saved.spread or self.accelerator.is_main_process:
            try:
                save_checkpoint(self.checkpoints, saved, keep=self.config.keep_checkpoints)
            except OSError as error:  # a full disk
                if self.accelerator.is_main_process:
                    remove_partial(self.checkpoints)
                path = self.last_checkpoint()
                cure = f", and --resume --name {self.config.name} goes on from {path}" if path else ""
                raise TrainingError(
                    f"the checkpoint of step {self.step} could not be written: {error}. Mend that{cure}"
                ) from error
        self.accelerator.wait_for_everyone()

    def _held(self, seconds: float = 0.0) -> Checkpoint:
        """What a checkpoint of this moment holds; the tensors are the run's own."""
        scaler = self.accelerator.scaler
        state: dict[str, Any] = {
            "seconds": seconds,
            "model": {"name": self.config.model, "config": config_of(self.model)},
            "class_names": list(self.data.class_names),
            "objective": self.config.objective,
            "guidance": self.config.guidance,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        return Checkpoint(
            step=self.step,
            model=self.model.state_dict(),
            ema=self._averaged_state(),
            optimizer=optimizer_tensors(self.model, self.optimizer.optimizer),
            state=state,
        )

    def _averaged_state(self) -> dict[str, Tensor]:
        """The model's state with the averages in the place of its parameters; buffers are as they are."""
        return {**self.model.state_dict(), **self.ema.weights}

    @torch.no_grad()
    def averaged(self) -> nn.Module | None:
        """The network with averaged weights, whole; every process takes part, and all but the main one get None."""
        net = None
        if self.accelerator.is_main_process:
            net = build_model(self.config, self.data).to(self.accelerator.device).eval()
        into = {} if net is None else net.state_dict()
        for name, average in self._averaged_state().items():
            value = whole(average)
            if net is not None:
                into[name].copy_(value)
        return net

    def run(self) -> TrainResult:
        """Train up to the last step, or until SIGINT or SIGTERM; either way the end is in a checkpoint.

        Raises:
            TrainingError: the loss is no longer finite, or a checkpoint cannot be written.
            UsageError: an image cannot be read; with one process what was trained is in a checkpoint.
        """
        config, first = self.config, self.step
        log = RunLog(self.folder, config, self.accelerator, first)
        batches = micro_batches(
            self.data.train,
            self.order,
            start=first,
            stop=config.steps,
            micros=config.accumulate,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=config.workers,
        )
        self.model.train()
        if self.recorded:
            self.update = StepGraph(self._update)
        begun = last_log = time.perf_counter()
        pending: list[Tensor] = []  # one (3,) tensor a step: loss, squared error, gradient norm
        saved_at = first

        def flush() -> None:
            nonlocal last_log
            if not pending:
                return
            means = self._finite_means(pending)
            now = time.perf_counter()
            row = {
                "step": self.step,
                "loss": means[0],
                "squared_error": means[1],
                "grad_norm": means[2],
                "lr": learning_rate(self.step - 1, config),
                "images_per_second": len(pending) * config.batch_size / max(now - last_log, 1e-9),
                "seconds": self.seconds + now - begun,
            }
            pending.clear()
            last_log = now
            log.write(row)

        def checkpoint() -> None:
            nonlocal saved_at
            flush()  # raises rather than save weights that are not finite
            self.save(self.seconds + time.perf_counter() - begun)
            saved_at = self.step

        with StopSignals(self._first_signal, lambda name: self._second_signal(name, saved_at)) as signals:
            try:
                while self.step < config.steps and not self._stop(signals):
                    pending.append(self._train_step(batches))
                    self.step += 1
                    log.tick()
                    if self.step % config.log_every == 0:
                        flush()
                    if self.step % config.checkpoint_every == 0:
                        checkpoint()
                    if self.on_samples is not None and self._samples_due():
                        net = self.averaged()
                        if net is not None:
                            self.on_samples(net, self.step)
                elapsed = time.perf_counter() - begun
                if self.step > saved_at:
                    checkpoint()
            except UsageError:  # an image that cannot be read: keep what was trained
                # with several processes the others are in the step still, and a save would wait for them for ever
                if self.step > saved_at and self.accelerator.num_processes == 1:
                    checkpoint()
                raise
            finally:
                self.update = self._update  # gives the memory of a recording back
                log.close()
            early = self.step < config.steps
        self.seconds += elapsed
        return TrainResult(
            step=self.step,
            new_steps=self.step - first,
            seconds=self.seconds,
            images_per_second=(self.step - first) * config.batch_size / elapsed,
            checkpoint=self.last_checkpoint(),
            signal=signals.received if early else None,
        )

    def _first_signal(self, name: str) -> str:
        """What the first of the processes says at once when it is asked to stop."""
        if not self.accelerator.is_main_process:
            return ""
        alone = self.accelerator.num_processes == 1
        when = "the step at hand" if alone else f"a multiple of log_every = {self.config.log_every} steps"
        return f"{name}: the run stops after {when} and saves a checkpoint. Once more: it stops at once, unsaved"

    def _second_signal(self, name: str, saved_at: int) -> str:
        """What is lost when it stops at once."""
        path = self.last_checkpoint()
        lost = f"step {self.step} is" if self.step == saved_at + 1 else f"steps {saved_at + 1} to {self.step} are"
        if self.step == saved_at:
            lost = "the step at hand is"
        go_on = f"--resume --name {self.config.name} goes on from {path}" if path else "there is no checkpoint yet"
        return f"stopped by a second {name} after step {self.step}: {lost} lost; {go_on}"

    @contextmanager
    def naming_lost_processes(self) -> Iterator[None]:
        """Context in which the failure of a collective tells that another process of the run is gone.

        Raises:
            TrainingError: it is.
        """
        try:
            yield
        except TrainingError:
            raise
        except RuntimeError as error:
            said = str(error).lower()
            collective = isinstance(error, torch.distributed.DistError) or any(word in said for word in COLLECTIVE)
            if self.accelerator.num_processes == 1 or not collective:
                raise
            path = self.last_checkpoint()
            raise TrainingError(
                f"process {self.accelerator.process_index} of {self.accelerator.num_processes} lost another one after "
                f"step {self.step} of {self.config.steps}, so the run ends; what that process said last is the cause. "
                + (f"Continue from {path} with --resume" if path else "No checkpoint had been written yet")
            ) from error

    def last_checkpoint(self) -> Path | None:
        found = list_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """One optimiser step; returns (3,): loss, squared error and gradient norm, still on the device."""
        config, accelerator = self.config, self.accelerator
        rate = learning_rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if self.lr is None else self.lr.fill_(rate)
        self.ema.set_step(self.step)
        flips = self.order.flips(self.step) if config.flip else None
        figures = torch.zeros(3, device=accelerator.device)
        draws = self._draws()
        where = {"micros": config.accumulate, "rank": accelerator.process_index, "world": accelerator.num_processes}
        for micro in range(config.accumulate):
            x, y = (a.to(accelerator.device, non_blocking=True) for a in next(batches))
            if flips is not None:
                mirrored = shard(flips, micro=micro, **where).to(x.device, non_blocking=True).view(-1, 1, 1, 1)
                x = torch.where(mirrored, x.flip(-1), x)  # [b, C, H, W]
            index = micro * where["world"] + where["rank"]
            part = draws.part(index, where["micros"] * where["world"])
            # what a network draws itself, for dropout say: other numbers in each part, the same ones after a resume
            torch.manual_seed(mix(config.seed, 5, self.step, index))
            figures += self.update(x, y, part)
        return figures

    def _update(self, x: Tensor, y: Tensor, part: Draws) -> Tensor:
        """A part of a step, and after the last one new weights and averages; returns its share of the figures, (3,).

        It reads nothing on the host, and what it keeps stays in the same memory: it can be recorded as a CUDA graph.
        """
        accelerator = self.accelerator
        with accelerator.accumulate(self.loss_of):
            out = self.loss_of(x, y, part)
            accelerator.backward(out.loss)
            loss, error = out.loss.detach().float(), out.squared_error.mean().float()
            norm = torch.zeros_like(loss)
            if accelerator.sync_gradients:
                norm = whole(accelerator.clip_grad_norm_(self.parameters, self.config.grad_clip or math.inf)).float()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if accelerator.sync_gradients:
                self.ema.take(self.model)
        return torch.stack([loss / self.config.accumulate, error / self.config.accumulate, norm])

    def _draws(self) -> Draws:
        """The draws of this step's whole batch: a function of (seed, step), so that a resumed run makes the same ones
        and any number of processes and parts shares the same."""
        device = self.accelerator.device
        shape = (self.config.batch_size, self.data.channels, self.data.image_size, self.data.image_size)
        generator = generator_for(self.config.seed, 4, self.step, device=device)
        return self.objective.draw(shape, generator=generator, device=device, spread=True)

    def _finite_means(self, pending: list[Tensor]) -> list[float]:
        """Means over steps and processes; one transfer from the device for all of them."""
        table = self.accelerator.reduce(torch.stack(pending), reduction="mean").cpu()  # [steps, 3]
        # fp16's gradient scaler meets infinite gradients by design, and skips those steps.
        watched = table[:, :1] if self.config.precision == "fp16" else table[:, [0, 2]]
        bad = (~watched.isfinite().all(dim=1)).nonzero().flatten()
        if len(bad):
            at = self.step - len(pending) + 1 + int(bad[0])
            value = table[int(bad[0])]
            what = f"the loss is {value[0]:g} and the gradient norm {value[2]:g} at step {at}"
            batch = self.data.train.images(self.order.batch(at - 1).tolist())  # read anew: no step waits for this
            if not batch.isfinite().all():
                raise TrainingError(
                    f"training stopped because {what}: its batch has images with values that are not finite; mend those"
                )
            raise self._stopped(what)
        return table.double().mean(dim=0).tolist()

    def _stopped(self, what: str) -> TrainingError:
        path = self.last_checkpoint()
        where = (
            f"The last good checkpoint is {path}; continue from it with a lower learning rate: "
            f"meanflow train --resume --name {self.config.name} --lr {self.config.lr / 2:g}"
            if path
            else "No checkpoint had been written yet; start again with a lower learning rate (--lr) or longer "
            "warm-up (--warmup-steps), with --overwrite"
        )
        return TrainingError(f"training stopped because {what}. {where}")

    def _samples_due(self) -> bool:
        every = self.config.sample_every
        return every > 0 and self.step % every == 0 and self.step < self.config.steps

    def _stop(self, signals: StopSignals) -> bool:
        """Whether a signal came; with several processes they agree, every `log_every` steps."""
        if self.accelerator.num_processes == 1:
            return signals.received is not None
        if self.step % self.config.log_every != 0:
            return False
        flag = torch.tensor(float(signals.received is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)


def parameter_count(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
