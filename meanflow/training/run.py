"""A run from its folder to its report."""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ..codecs import identified, identity_of
from ..config import Config, Trust, words_in
from ..config_file import PRESET, read_config, read_values
from ..errors import UsageError
from ..files import write_text
from ..tf32 import tensor_float32
from .accelerator import make_accelerator
from .folder import RunFolder
from .graphs import described
from .log import read_log
from .loop import Trainer, TrainResult, parameter_count
from .network import LoadedNetwork, check_resumed, load_network
from .owner import owned_by_all
from .parallel import BLOCKS, is_sharded, transformer_blocks
from .pictures import save_loss_curve
from .report import evaluate_network, figures_by_sweep, save_samples
from .snapshots import remove_snapshots_after
from .trackers import log_picture, log_report


def changed_values(config: Config, saved: Config) -> dict[str, tuple[Any, Any]]:
    """What a resumed run is to do otherwise than it did: the value now, and the saved one, by name.

    Raises:
        UsageError: it would be another run.
    """
    before, after = ({**c.values(), **c.data.located()} for c in (saved, config))
    changes = {
        name: (value, before[name])
        for name, value in after.items()
        if name != "name" and name in before and value != before[name]
    }
    if identity_of(config.codec) != identity_of(saved.codec):
        raise UsageError(
            f"expected the resumed run's own, {saved.codec}, got {config.codec}; start another run with --name",
            field="codec",
        )
    for name in ("data", *config.data.located(), "objective", "init", "teacher", "weak_teacher"):
        if name in changes:
            now, then = changes[name]
            of_data = name == "data" or name in config.data.located()
            moved = ", or write the new place of the same images into its config.yaml" if of_data else ""
            raise UsageError(
                f"expected the resumed run's own, {then}, got {now}; start another run with --name{moved}",
                field="data" if of_data else name,
            )
    return changes


def run_training(
    config: Config,
    *,
    preset: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust_code: Trust = False,
) -> TrainResult:
    """Train, and leave config.yaml, log.jsonl, loss.png, samples.png, report.json and checkpoints/ in the run folder.

    Args:
        config: the run.
        preset: what its values started from, noted in config.yaml. A resumed run keeps its own.
        resume: go on from the newest checkpoint in the run folder.
        overwrite: replace the run folder.
        trust_code: code that the files of a teacher may name besides that of the configuration, see `load_network`.

    Raises:
        UsageError: something does not fit; a run folder is created or replaced only after every check has passed.
        TrainingError: the run cannot go on.
    """
    threads = torch.get_num_threads()
    try:
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        with tensor_float32(config.run.precision == "tf32"):
            return _run_training(config, trust_code, preset=preset, resume=resume, overwrite=overwrite)
    finally:
        torch.set_num_threads(threads)


def _run_training(
    config: Config, trust_code: Trust, *, preset: str | None, resume: bool, overwrite: bool
) -> TrainResult:
    started = time.perf_counter()
    folder = RunFolder.named(config.run.name)
    code = set(words_in(config.to_dict()))  # that the caller has named
    if resume and config.run.precision == "auto" and folder.config.is_file():  # its own, on any device
        saved = read_values(folder.config, code)
        config = config.replace(precision=saved.get("precision", "auto"))
    accelerator = make_accelerator(config, folder)
    try:
        config = replace(config, codec=identified(config.codec))
        with owned_by_all(folder.path, accelerator):
            checkpoint = folder.prepare(resume=resume, overwrite=overwrite)
            return _run_owned(
                config, folder, checkpoint, accelerator, started, trust_code, preset=preset, overwrite=overwrite
            )
    finally:
        _keep_process_group()
        accelerator.end_training()  # closes the trackers and the process group


def _run_owned(
    config: Config,
    folder: RunFolder,
    checkpoint: Path | None,
    accelerator: Accelerator,
    started: float,
    trust_code: Trust,
    *,
    preset: str | None,
    overwrite: bool,
) -> TrainResult:
    report, changes = {}, {}
    if checkpoint is not None:  # damage is told before anything is written
        saved, preset = read_config(folder.config, set(words_in(config.to_dict())))
        report = folder.read_report(config.run.evaluator.titles)
        read_log(folder.log)
        changes = changed_values(config, saved)
        check_resumed(checkpoint, config.model.sizes())
    data = config.data.load()
    if not len(data.train):
        raise UsageError(f"{config.data.held_out} leaves nothing to train on", field="held_out")
    classes = data.class_names

    def on_samples(net: nn.Module, step: int) -> None:
        drawn = LoadedNetwork(net, config.objective, classes, step, folder.path, config.codec)
        picture = save_samples(drawn, folder.samples, seed=config.run.seed, device=accelerator.device)
        log_picture(accelerator, folder.samples.stem, picture, step)

    fresh = config if checkpoint is None else config.replace(init=None)  # a checkpoint has all weights
    trainer = Trainer(fresh, data, folder, accelerator, on_samples, _trusted(config, trust_code))
    if checkpoint is not None:
        trainer.resume(checkpoint)
        # as if the sessions had followed without a break
        started -= trainer.seconds + report.get("seconds", 0.0) - report.get("training_seconds", 0.0)
    finished = trainer.step >= config.optim.steps
    with trainer.naming_lost_processes():
        before = None
        if accelerator.is_main_process:
            before = _begin(trainer, preset, changes, overwrite=overwrite)
        accelerator.wait_for_everyone()
        try:
            result = trainer.run()
        except Exception:
            if before is not None and folder.newest() == checkpoint:
                write_text(folder.config, before)  # what this session was asked for led nowhere
            raise
        if data.left_out is not None:  # each process has met its own
            data.left_out.add_named(gather_object(list(data.left_out.reasons.items())))
        if accelerator.is_main_process:
            _end(trainer, result, started, finished=finished)
            if data.left_out is not None and data.left_out.reasons:
                print(data.left_out.summary(), file=sys.stderr, flush=True)
        accelerator.wait_for_everyone()
        return result


def _trusted(config: Config, trust_code: Trust) -> Trust:
    """What files may name: the code that the configuration names, and what is trusted besides."""
    if isinstance(trust_code, bool):
        return trust_code or set(words_in(config.to_dict()))
    return {*words_in(config.to_dict()), *([trust_code] if isinstance(trust_code, str) else trust_code)}


def _begin(
    trainer: Trainer, preset: str | None, changes: Mapping[str, tuple[Any, Any]], *, overwrite: bool
) -> str | None:
    """Make the run folder ready, and say what is trained; returns the config.yaml of a resumed run as it was."""
    config, folder = trainer.config, trainer.folder
    resumed = trainer.step > 0
    if overwrite:
        folder.remove()
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.remove_leftovers()
    remove_snapshots_after(folder.averages, trainer.step)
    if trainer.step >= config.optim.steps:  # config.yaml keeps the values that the run was trained with
        return None
    before = folder.config.read_text() if resumed else None
    values = config.to_dict()
    values["data"] |= config.data.located()
    write_text(folder.config, yaml.safe_dump({PRESET: preset, **values}, sort_keys=False))
    _say_start(trainer, changes)
    return before


def _end(trainer: Trainer, result: TrainResult, started: float, *, finished: bool) -> None:
    """loss.png, and samples.png and report.json of a run that is at its last step, unless they are there."""
    config, folder = trainer.config, trainer.folder
    save_loss_curve(read_log(folder.log), folder.curve)
    current = folder.read_report().get("steps") == result.step
    if not current:  # of a checkpoint that is no longer the newest
        folder.report.unlink(missing_ok=True)
    reported = not config.run.evaluate or current
    if result.signal is not None or (finished and reported):
        return
    try:
        _finish(trainer, result, started)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"all {result.step} steps are saved, samples.png and report.json are not written; --resume --name "
            f"{config.run.name} writes them"
        ) from None


def _keep_process_group() -> None:
    """Close the process group, but never run its destructor: gloo's waits for a thread that may wait for Python's lock.

    DDP's reducer holds the group longest, and Python holds the lock while it lets go of the reducer.
    """
    if dist.is_available() and dist.is_initialized():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))


def _say_start(trainer: Trainer, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """One line of what is trained on what, and for a resumed run one of what is new. On stderr, as all progress is."""
    data, config = trainer.data, trainer.config
    if data.left_out is not None:
        data.left_out.name_new()
    images = f"{len(data.train)} images in {data.num_classes} class{'es' if data.num_classes > 1 else ''}"
    kept = f", {len(data.held_out)} kept apart" if data.held_out is not None else ""
    skipped = f", {data.skipped} other file{'s' if data.skipped > 1 else ''} skipped" if data.skipped else ""
    model = f"{config.model.name}, {parameter_count(trainer.model):,} parameters"
    machine = (
        f"{trainer.accelerator.device}, precision {config.run.precision}{' (auto)' if trainer.auto_precision else ''}"
    )
    if trainer.accelerator.device.type == "cuda":
        machine += f", {described(config, trainer.accelerator)}"
    print(
        f"{data.name}: {images}{kept}{skipped}; {model}; {machine}; {trainer.folder.path}", file=sys.stderr, flush=True
    )
    if is_sharded(config, trainer.accelerator) and not transformer_blocks(trainer.model):
        print(
            f"strategy: {config.model.name} has no blocks, so fsdp gathers all of it at once in each process: {BLOCKS}",
            file=sys.stderr,
            flush=True,
        )
    if changes:
        words = ", ".join(f"{name} {now} (was {then})" for name, (now, then) in changes.items())
        print(f"resumed after step {trainer.step} with {words}", file=sys.stderr, flush=True)


def _finish(trainer: Trainer, result: TrainResult, started: float) -> None:
    """samples.png and report.json, from the last checkpoint: just what `meanflow sample` and `evaluate` would give."""
    config, data, folder, device = trainer.config, trainer.data, trainer.folder, trainer.accelerator.device
    loaded = load_network(folder.path, device=str(device), trust_code=set(words_in(config.to_dict())))
    picture = save_samples(loaded, folder.samples, seed=config.run.seed, device=device)
    log_picture(trainer.accelerator, folder.samples.stem, picture, result.step)
    if not config.run.evaluate:
        return
    evaluator = config.run.evaluator
    report = {
        **evaluate_network(loaded, data, evaluator, device=device),
        **figures_by_sweep(loaded, data, evaluator, device),
        "seconds": round(time.perf_counter() - started, 3),
        "training_seconds": round(result.seconds, 3),
        "images_per_second": round(result.images_per_second, 1),
        "steps": result.step,
        "batch_size": config.optim.batch_size,
        "parameters": parameter_count(trainer.model),
        "data": data.name,
        "model": config.model.name,
        "objective": config.to_dict()["objective"]["name"],
        "seed": config.run.seed,
        "device": str(device),
        "precision": config.run.precision,
        "cuda_graphs": trainer.recorded,
        "processes": trainer.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **(data.left_out.figures() if data.left_out is not None else {}),
    }
    folder.write_report(report)
    log_report(trainer.accelerator, report, result.step)
