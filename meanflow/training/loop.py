"""The training loop: thin, over `accelerate`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from ..checks import check_backend
from ..codecs import draw_latents, is_drawn
from ..config import Config, Trust
from ..data import ImageData, StepOrder, Stream, generator_for, micro_batches
from ..data.order import mix, shard
from ..errors import NetworkError, TrainingError, UsageError
from ..models import config_of
from ..objectives import Draws
from .checkpoint import (
    Checkpoint,
    check_tensors,
    cure_for_damage,
    joined,
    load_checkpoint,
    load_optimizer_tensors,
    load_weights,
    not_finite,
    optimizer_tensors,
    parameter_of,
    parted,
    remove_partial,
    save_checkpoint,
)
from .ema import EMA, TargetEMA
from .folder import RunFolder
from .graphs import Step, StepGraph, conflict, is_recorded
from .log import RunLog
from .network import load_initial_weights, source_of
from .networks import checksums_of_teachers, networks_beside
from .parallel import check_parts, checkpoint_blocks, full_tensor, in_bfloat16, is_sharded, settled, training_loss
from .power_ema import PowerEMA, power_name
from .schedule import learning_rate
from .signals import StopSignals
from .snapshots import save_snapshot
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


class Trainer:
    """One training run: weights, averages, optimiser and position, and the loop over them.

    Args:
        config: the run.
        data: what it trains on.
        folder: the run folder; nothing is written before `run`.
        accelerator: from `make_accelerator`.
        on_samples: called with (net, step), in the main process, when a sample grid is due; `net` holds the averages.
        trust_code: code that the files of a teacher, or of first weights, may name, see `load_network`.

    Raises:
        UsageError: the configuration does not fit the data or the machine, or a teacher the data.
    """

    def __init__(
        self,
        config: Config,
        data: ImageData,
        folder: RunFolder,
        accelerator: Accelerator,
        on_samples: Callable[[nn.Module, int], None] | None = None,
        trust_code: Trust = False,
    ) -> None:
        self.auto_precision = config.run.precision == "auto"
        self.config = config = settled(config, accelerator.device)
        self.data, self.folder, self.accelerator = data, folder, accelerator
        self.on_samples = on_samples
        set_seed(config.run.seed)  # the same first weights in every process
        self.objective, self.codec = config.objective, config.codec
        config.check_codec(data)
        self.shape = config.codec.latent_shape(data.image_shape)  # of what the network trains on
        self.mirrored = config.data.flip and getattr(data.train, "mirrored", False)  # versions that the source has
        self.model = config.network(data)
        if config.run.init is not None:
            try:
                load_initial_weights(self.model, source_of(config.run.init), codec=config.codec, trust_code=trust_code)
            except UsageError as error:
                raise UsageError(str(error), field="init") from error
        if config.run.precision == "bf16-weights":
            in_bfloat16(self.model)
        checkpoint_blocks(self.model, config.run.checkpoint_blocks)
        check_parts(config, accelerator.num_processes)
        self.nets = networks_beside(config, data, self.model, accelerator, trust_code)
        self.teachers = checksums_of_teachers(config)
        self.learned, self.target = self.nets.learned, cast("nn.Module | None", self.nets.ema)
        self.loss_of = training_loss(self.model, self.objective, config, accelerator, self.nets)
        self.parameters = [p for p in self.loss_of.parameters() if p.requires_grad]
        self.recorded = is_recorded(config, accelerator)
        self.recording: Step | None = None  # of `_update`, within `run`
        # wherever a step can be recorded, so that it is the same one with and without
        recordable = conflict(config, accelerator) is None
        self.lr = torch.tensor(config.optim.lr, device=accelerator.device) if recordable else None
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.optim.lr if self.lr is None else self.lr,
            betas=(config.optim.beta1, config.optim.beta2),
            weight_decay=config.optim.weight_decay,
            fused=recordable or accelerator.device.type == "cuda",  # recordable: no other takes its rate from memory
            capturable=recordable,
        )
        self.optimizer = accelerator.prepare(optimizer)
        self.ema = EMA(self.model, config.optim.ema_decay, recordable=recordable)
        self.further = {str(d): EMA(self.model, d, recordable=recordable) for d in config.optim.ema_decays}
        for sigma_rel in config.optim.power_ema:
            self.further[power_name(sigma_rel)] = PowerEMA(self.model, sigma_rel, recordable=recordable)
        self.snapshots: dict[str, str] = {}  # checksums of those up to here, in the main process
        self.averages = [self.ema, *self.further.values()]
        if self.target is not None:
            self.averages.append(TargetEMA(self.target, self.objective.target_decay, recordable=recordable))
        self._check_backends()
        self.order = StepOrder(len(data.train), config.optim.batch_size, config.run.seed)
        self.step = 0
        self.seconds = 0.0

    def _check_backends(self) -> None:
        """Run some samples through the loss and its gradient, so that a backend that cannot serve an op raises now."""
        check_backend()
        device = self.accelerator.device
        n = math.lcm(4, self.objective.group_size)
        x = torch.zeros(n, *self.shape, device=device)  # [n, C, H, W]
        y = torch.zeros(n, dtype=torch.long, device=device)
        try:
            self.objective.check_network(self.model)
            for draws in self._first_draws(n):
                loss = self.objective.loss(self.model, x, y, draws, self.nets).loss
                if is_sharded(self.config, self.accelerator):
                    loss.backward()
                    self.optimizer.zero_grad()
                else:
                    torch.autograd.grad(loss, self.parameters, allow_unused=True)  # leaves no gradient behind
        except NetworkError as error:
            raise UsageError(f"{self.config.model.name}: {error}", field="model") from error
        except NotImplementedError as error:
            raise UsageError(f"this run cannot be served: {error}", field="backend") from error
        except RuntimeError as error:
            if self.config.run.precision != "bf16-weights":
                raise
            raise UsageError(
                "this network does not run with its weights in bfloat16, z in bfloat16 and the times in float32 "
                f"({error}); --precision bf16 asks nothing of a network",
                field="precision",
            ) from error

    def _first_draws(self, n: int) -> list[Draws]:
        """Draws for n samples, one of each phase that the first and the last step are in."""
        device = self.accelerator.device
        found: dict[str, Draws] = {}
        for step in (0, self.config.optim.steps - 1):
            draws = self.objective.draw((n, *self.shape), step=step, generator=torch.Generator(device), device=device)
            found.setdefault(draws.phase, draws)
        return list(found.values())

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
            raise UsageError(f"{error}{cure_for_damage(self.folder.checkpoints, path)}") from error
        self.data.check_classes(state["class_names"], path)
        taught = state.get("teachers", {})
        for field, now in self.teachers.items():
            if taught.get(field, now) != now:
                raise UsageError(
                    f"{getattr(self.config.run, field)} has other weights than {path} was trained with; expected the "
                    "same: of a run that trains on, name a checkpoint",
                    field=field,
                )
        for name, here in (("input_size", self.shape[1]), ("in_channels", self.shape[0])):
            before = state["model"].get("config", {}).get(name, here)
            if before != here:
                raise UsageError(f"data: {path} was trained with {name} {before}, and {self.data.name} has {here}")
        for part, what, needed in (
            ("learned", "learned parameters", "has a module for them"),
            ("target", "averaged copy of the network for targets", "needs one"),
        ):
            if getattr(held, part) and not getattr(saved, part):
                raise UsageError(f"{path} has no {what}, and this objective {needed}", field="objective")
            if getattr(saved, part) and not getattr(held, part):
                raise UsageError(f"{path} has {what}, for which this objective has no use", field="objective")
        averages = parted(saved.averages)
        if averages.keys() != self.further.keys():
            raise UsageError(
                f"{path} has {_listed(averages)}, and a resumed run keeps them; got {_listed(self.further)}",
                field="ema_decays, power_ema",
            )
        load_weights(self.model, saved.model, path)
        check_tensors(saved.ema, self.ema.weights, path / "ema.safetensors")
        check_tensors(saved.averages, held.averages, path / "averages.safetensors")
        moved = {parameter_of(key) for key in saved.optimizer}  # a parameter that never had a gradient has no moments
        moments = {key: value for key, value in held.optimizer.items() if parameter_of(key) in moved}
        unknown = [key for key in saved.optimizer if key not in held.optimizer]
        if unknown:
            raise UsageError(f"{path / 'optimizer.safetensors'}: expected moments of this model, got {unknown[0]}")
        check_tensors(saved.optimizer, moments, path / "optimizer.safetensors")
        self.ema.load(saved.ema)
        for name, average in self.further.items():
            average.load(averages[name])
        if self.learned is not None:
            load_weights(self.learned, saved.learned, path / "learned.safetensors")
        if self.target is not None:
            load_weights(self.target, saved.target, path / "target.safetensors")
        load_optimizer_tensors(self.loss_of, self.optimizer.optimizer, saved.optimizer)
        if self.accelerator.scaler is not None and state.get("scaler"):
            check_scaler(state["scaler"], self.accelerator.scaler.state_dict(), path)
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.snapshots = dict(state.get("snapshots", {}))
        self.step, self.seconds = saved.step, float(state["seconds"])

    def save(self, seconds: float) -> None:
        """Write a checkpoint of the current step; every process takes part.

        Raises:
            TrainingError: weights, averages or moments are not finite, or the disk does not take the checkpoint; the
                last one is as it was.
        """
        saved = self._held(seconds)
        averages = {f"average of {name}": value for name, value in self.ema.weights.items()}
        averages |= {
            f"average {d} of {name}": value for d, a in self.further.items() for name, value in a.weights.items()
        }
        others = {
            f"{word} {name}": p
            for word, module in (("learned", self.learned), ("target", self.target))
            if module is not None
            for name, p in module.named_parameters()
        }
        bad = not_finite({**dict(self.model.named_parameters()), **averages, **others, **saved.optimizer})
        if bad:  # a step whose loss and gradient were finite can still lead there
            raise self._stopped(f"{bad[0]} is not finite after step {self.step}")
        if saved.sharded or self.accelerator.is_main_process:
            try:
                save_checkpoint(self.folder.checkpoints, saved, keep=self.config.run.keep_checkpoints)
            except OSError as error:  # a full disk
                if self.accelerator.is_main_process:
                    remove_partial(self.folder.checkpoints)
                path = self.folder.newest()
                cure = f", and --resume --name {self.config.run.name} goes on from {path}" if path else ""
                raise TrainingError(
                    f"the checkpoint of step {self.step} could not be written: {error}. Mend that{cure}"
                ) from error
        self.accelerator.wait_for_everyone()

    def _snapshot(self) -> None:
        """Write the power averages of the current step; every process takes part.

        Raises:
            TrainingError: they are not finite, or the disk does not take them.
        """
        averages = joined({name: a.weights for name, a in self.further.items() if isinstance(a, PowerEMA)})
        bad = not_finite(averages)
        if bad:
            raise self._stopped(f"the average {bad[0]} is not finite after step {self.step}")
        try:
            self.snapshots |= save_snapshot(self.folder.averages, self.step, averages)
        except OSError as error:  # a full disk
            raise TrainingError(
                f"the averages of step {self.step} could not be written: {error}. Mend that, and continue with "
                f"--resume --name {self.config.run.name}"
            ) from error

    def _held(self, seconds: float = 0.0) -> Checkpoint:
        """What a checkpoint of this moment holds; the tensors are the run's own."""
        scaler = self.accelerator.scaler
        state: dict[str, Any] = {
            "seconds": seconds,
            "model": {"name": self.config.model.name, "config": config_of(self.model)},
            "class_names": list(self.data.class_names),
            **{name: part for name, part in self.config.to_dict().items() if name in ("objective", "codec")},
            "scaler": scaler.state_dict() if scaler is not None else None,
            **({"teachers": self.teachers} if self.teachers else {}),
            **({"snapshots": dict(self.snapshots)} if self.config.optim.power_ema else {}),
        }
        return Checkpoint(
            step=self.step,
            model=self.model.state_dict(),
            ema=self._averaged_state(),
            averages=joined(self._further()),
            optimizer=optimizer_tensors(self.loss_of, self.optimizer.optimizer),
            learned={} if self.learned is None else self.learned.state_dict(),
            target={} if self.target is None else self.target.state_dict(),
            state=state,
        )

    def _further(self) -> dict[str, dict[str, Tensor]]:
        """The further averages, by their names."""
        return {name: average.weights for name, average in self.further.items()}

    def _averaged_state(self) -> dict[str, Tensor]:
        """The model's state with the averages in the place of its parameters; buffers are as they are."""
        return {**self.model.state_dict(), **self.ema.weights}

    @torch.no_grad()
    def averaged(self) -> nn.Module | None:
        """The network with averaged weights, whole; every process takes part, and all but the main one get None."""
        net = None
        if self.accelerator.is_main_process:
            net = self.config.network(self.data).to(self.accelerator.device).eval()
        into = {} if net is None else net.state_dict()
        for name, average in self._averaged_state().items():
            value = full_tensor(average)
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
            stop=config.optim.steps,
            micros=config.optim.accumulate,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=config.data.workers,
            mirrored=self.mirrored,
        )
        self.model.train()
        if self.recorded:
            self.recording = StepGraph(self._update)
        begun = last_log = time.perf_counter()
        pending: list[Tensor] = []  # one tensor a step: loss, metrics, gradient norm
        saved_at = first

        def flush() -> None:
            nonlocal last_log
            if not pending:
                return
            means = self._finite_means(pending)
            now = time.perf_counter()
            row = {
                "step": self.step,
                **dict(zip(("loss", *self.objective.metrics, "grad_norm"), means, strict=True)),
                "lr": learning_rate(self.step - 1, config.optim),
                "images_per_second": len(pending) * config.optim.batch_size / max(now - last_log, 1e-9),
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
                while self.step < config.optim.steps and not self._stop(signals):
                    pending.append(self._train_step(batches))
                    self.step += 1
                    log.tick()
                    if self.step % config.run.log_every == 0:
                        flush()
                    if config.optim.power_ema and self.step % config.run.power_ema_every == 0:
                        self._snapshot()
                    if self.step % config.run.checkpoint_every == 0:
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
                self.recording = None  # gives its memory back
                log.close()
            early = self.step < config.optim.steps
        self.seconds += elapsed
        return TrainResult(
            step=self.step,
            new_steps=self.step - first,
            seconds=self.seconds,
            images_per_second=(self.step - first) * config.optim.batch_size / elapsed,
            checkpoint=self.folder.newest(),
            signal=signals.received if early else None,
        )

    def _first_signal(self, name: str) -> str:
        """The main process's message after the first signal; "" in the others."""
        if not self.accelerator.is_main_process:
            return ""
        alone = self.accelerator.num_processes == 1
        when = "the step at hand" if alone else f"a multiple of log_every = {self.config.run.log_every} steps"
        return f"{name}: the run stops after {when} and saves a checkpoint. Once more: it stops at once, unsaved"

    def _second_signal(self, name: str, saved_at: int) -> str:
        """The message after the second signal: what is lost."""
        path = self.folder.newest()
        lost = f"step {self.step} is" if self.step == saved_at + 1 else f"steps {saved_at + 1} to {self.step} are"
        if self.step == saved_at:
            lost = "the step at hand is"
        go_on = f"--resume --name {self.config.run.name} goes on from {path}" if path else "there is no checkpoint yet"
        return f"stopped by a second {name} after step {self.step}: {lost} lost; {go_on}"

    @contextmanager
    def naming_lost_processes(self) -> Iterator[None]:
        """Context in which a failed collective is reported as the loss of another process.

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
            path = self.folder.newest()
            raise TrainingError(
                f"process {self.accelerator.process_index} of {self.accelerator.num_processes} lost another one after "
                f"step {self.step} of {self.config.optim.steps}, so the run ends; what that process said last is the "
                "cause. " + (f"Continue from {path} with --resume" if path else "No checkpoint had been written yet")
            ) from error

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """One optimiser step; returns loss, metrics and gradient norm, still on the device."""
        config, accelerator = self.config, self.accelerator
        rate = learning_rate(self.step, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if self.lr is None else self.lr.fill_(rate)
        for average in self.averages:
            average.set_step(self.step)
        flips = self.order.flips(self.step) if config.data.flip and not self.mirrored else None
        figures = torch.zeros(2 + len(self.objective.metrics), device=accelerator.device)
        draws = self._draws()
        noise = self._noise_of_latents() if is_drawn(self.codec) else None
        where = {
            "micros": config.optim.accumulate,
            "rank": accelerator.process_index,
            "world": accelerator.num_processes,
        }
        update = self.recording or self._update
        for micro in range(config.optim.accumulate):
            x, y = (a.to(accelerator.device, non_blocking=True) for a in next(batches))
            if flips is not None:
                mirrored = shard(flips, micro=micro, **where).to(x.device, non_blocking=True).view(-1, 1, 1, 1)
                x = torch.where(mirrored, x.flip(-1), x)  # [b, C, H, W]
            if self.data.codec is None:
                x = self.codec.encode(x)
            part_noise = None if noise is None else shard(noise, micro=micro, **where)
            x = draw_latents(self.codec, x, part_noise)  # [b, C, H, W] of the network's
            index = micro * where["world"] + where["rank"]
            part = draws.part(index, where["micros"] * where["world"])
            # what a network draws itself, for dropout say: other numbers in each part, the same ones after a resume
            torch.manual_seed(mix(config.run.seed, Stream.NETWORK, self.step, index))
            figures += update(x, y, part)
        return figures

    def _update(self, x: Tensor, y: Tensor, part: Draws) -> Tensor:
        """One micro-batch, and after the last one the optimiser step; returns its part of the metrics.

        It reads nothing on the host and keeps its state in the same memory, so that it can be recorded as a CUDA graph.
        """
        accelerator = self.accelerator
        with accelerator.accumulate(self.loss_of):
            out = self.loss_of(x, y, part)
            accelerator.backward(out.loss)
            means = [out.loss.detach().float(), *(a.mean().float() for a in out.metrics.values())]
            norm = torch.zeros_like(means[0])
            if accelerator.sync_gradients:
                norm = full_tensor(
                    accelerator.clip_grad_norm_(self.parameters, self.config.optim.grad_clip or math.inf)
                ).float()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if accelerator.sync_gradients:
                for average in self.averages:
                    average.take(self.model)
        return torch.stack([*(mean / self.config.optim.accumulate for mean in means), norm])

    def _draws(self) -> Draws:
        """The draws of this step's whole batch: a function of (seed, step), so that they are the same in a resumed run
        and for any number of processes and micro-batches."""
        device = self.accelerator.device
        generator = generator_for(self.config.run.seed, Stream.DRAWS, self.step, device=device)
        shape = (self.config.optim.batch_size, *self.shape)
        return self.objective.draw(shape, step=self.step, generator=generator, device=device, spread=True)

    def _noise_of_latents(self) -> Tensor:
        """(batch_size, C, H, W) by which this step's latents are drawn: like the draws, a function of (seed, step)."""
        device = self.accelerator.device
        generator = generator_for(self.config.run.seed, Stream.LATENTS, self.step, device=device)
        return torch.randn(self.config.optim.batch_size, *self.shape, generator=generator, device=device)

    def _finite_means(self, pending: list[Tensor]) -> list[float]:
        """Means over steps and processes; one transfer from the device for all of them."""
        table = self.accelerator.reduce(torch.stack(pending), reduction="mean").cpu()  # [steps, figures]
        # fp16's gradient scaler meets infinite gradients by design, and skips those steps.
        watched = table[:, :1] if self.config.run.precision == "fp16" else table[:, [0, -1]]
        bad = (~watched.isfinite().all(dim=1)).nonzero().flatten()
        if len(bad):
            at = self.step - len(pending) + 1 + int(bad[0])
            value = table[int(bad[0])]
            what = f"the loss is {value[0]:g} and the gradient norm {value[-1]:g} at step {at}"
            indices = self.order.batch(at - 1).tolist()
            if not all(self.data.train[i][0].isfinite().all() for i in indices):  # read anew: no step waits for this
                raise TrainingError(
                    f"training stopped because {what}: its batch has images with values that are not finite; mend those"
                )
            raise self._stopped(what)
        return table.double().mean(dim=0).tolist()

    def _stopped(self, what: str) -> TrainingError:
        path = self.folder.newest()
        where = (
            f"The last good checkpoint is {path}; continue from it with a lower learning rate: "
            f"meanflow train --resume --name {self.config.run.name} --lr {self.config.optim.lr / 2:g}"
            if path
            else "No checkpoint had been written yet; start again with a lower learning rate (--lr) or longer "
            "warm-up (--warmup-steps), with --overwrite"
        )
        return TrainingError(f"training stopped because {what}. {where}")

    def _samples_due(self) -> bool:
        every = self.config.run.sample_every
        return every > 0 and self.step % every == 0 and self.step < self.config.optim.steps

    def _stop(self, signals: StopSignals) -> bool:
        """Whether a signal came; with several processes they agree, every `log_every` steps."""
        if self.accelerator.num_processes == 1:
            return signals.received is not None
        if self.step % self.config.run.log_every != 0:
            return False
        flag = torch.tensor(float(signals.received is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)


def _listed(averages: Iterable[str]) -> str:
    return f"averages of {words}" if (words := ", ".join(averages)) else "no further averages"


def parameter_count(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
