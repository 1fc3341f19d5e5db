"""A run from its folder to its report."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from ..data import ImageData, load_data, located
from ..errors import UsageError
from ..evaluation import Evaluation, evaluate_images, evaluation_labels, too_large
from ..files import parse_json, read_text, remove_folder, remove_partials, shown, write_text
from .build import model_sizes
from .checkpoint import list_checkpoints, remove_partial
from .config import EVALUATION_SAMPLES, RUNS, TrainConfig
from .config_file import PRESET, read_values
from .graphs import described
from .log import read_log
from .loop import Trainer, TrainResult, make_accelerator, parameter_count
from .network import LoadedNetwork, check_resumed, generate, load_network
from .owner import owned
from .parallel import BLOCKS, is_sharded, transformer_blocks
from .pictures import image_grid, save_loss_curve, save_picture
from .state import check_number

WRITTEN = ("config.yaml", "log.jsonl", "loss.png", "samples.png", "report.json")  # in a run folder
GRID_ROWS, GRID_COLUMNS = 10, 10
OMEGAS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # rows of an iMF-DiT's grid, and of its report
# figures of a report that are read again; those of images may be null
MAY_LACK = tuple(f"{held}{name}" for held in ("", "held_out_") for name in ("class_accuracy", "frechet_distance"))
REPORTED = (*MAY_LACK, "seconds", "training_seconds")


def run_folder(name: str) -> Path:
    """runs/NAME under the working directory.

    Raises:
        UsageError: the name is not one of a folder, or runs/ is a file.
    """
    if not re.fullmatch(r"[\w][\w.\-]*", name):
        raise UsageError(f"name: expected letters, digits, '_', '-' and '.', got {name!r}")
    if RUNS.exists() and not RUNS.is_dir():
        raise UsageError(f"{RUNS.absolute()} is a file; expected a folder, which runs are written to")
    return RUNS / name


def prepare_folder(folder: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """Check that a run may use `folder`; returns the checkpoint to resume from. Nothing is changed yet.

    Raises:
        UsageError: it would overwrite something, or has nothing to resume from.
    """
    if resume and overwrite:
        raise UsageError("resume, overwrite: choose one of them")
    if resume:
        found = list_checkpoints(folder / "checkpoints")
        if not found:
            what = "has no checkpoint" if folder.exists() else "does not exist"
            raise UsageError(f"resume: {folder} {what}; start the run without --resume")
        return found[-1]
    if folder.exists() and not _is_stillborn(folder):
        if not overwrite:
            raise UsageError(
                f"{folder} exists already. Choose another name with --name NAME, continue it with --resume, or replace "
                "it with --overwrite"
            )
        if not (folder / "config.yaml").is_file():
            raise UsageError(f"overwrite: {folder} does not look like a run (no config.yaml), so it is left alone")
    return None


def _is_stillborn(folder: Path) -> bool:
    """Whether a run was killed before its config.yaml was written."""
    return folder.is_dir() and all(entry.match(".config.*.partial.yaml") for entry in folder.iterdir())


def changed_values(config: TrainConfig, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What a resumed run is to do otherwise than it did: the value now, and the saved one, by name.

    Raises:
        UsageError: it would be another run.
    """
    before = {**saved, "data": located(saved.get("data", ""))}
    after = {**vars(config), "data": located(config.data)}
    changes = {
        name: (value, before[name])
        for name, value in after.items()
        if name != "name" and name in before and value != before[name]
    }
    for name in ("data", "objective", "init"):
        if name in changes:
            now, then = changes[name]
            raise UsageError(
                f"{name}: expected the resumed run's own, {then}, got {now}; start another run with --name"
                + (", or write the new place of the same images into its config.yaml" if name == "data" else "")
            )
    return changes


def read_report(folder: Path) -> dict[str, Any]:
    """report.json of a run; empty where there is none.

    Raises:
        UsageError: it is damaged.
    """
    path = folder / "report.json"
    try:
        report = parse_json(read_text(path)) if os.path.lexists(path) else {}
        if not isinstance(report, dict):
            raise ValueError(f"expected figures by name, got {shown(report)}")
        for name in REPORTED:
            if report.get(name) is not None or name not in MAY_LACK:
                check_number(name, report.get(name, 0.0), 0.0)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path} ({error}); remove it, and evaluate the run again") from error
    return report


def update_report(folder: Path, figures: Mapping[str, Any], step: int | None) -> None:
    """Write the figures of a standard evaluation after `step` steps; what a report says of other steps goes."""
    report = read_report(folder)
    kept = {key: value for key, value in report.items() if key != "note"} if report.get("steps") == step else {}
    write_text(folder / "report.json", json.dumps({**kept, **figures, "steps": step}, indent=2) + "\n")


def run_training(
    config: TrainConfig, *, preset: str | None = None, resume: bool = False, overwrite: bool = False
) -> TrainResult:
    """Train, and leave config.yaml, log.jsonl, loss.png, samples.png, report.json and checkpoints/ in the run folder.

    Args:
        config: the run.
        preset: what its values started from, noted in config.yaml. A resumed run keeps its own.
        resume: go on from the newest checkpoint in the run folder.
        overwrite: replace the run folder.

    Raises:
        UsageError: something does not fit; a run folder is created or replaced only after every check has passed.
        TrainingError: the run cannot go on.
    """
    threads = torch.get_num_threads()
    try:
        if config.threads:
            torch.set_num_threads(config.threads)
        with tensor_float32(config.precision == "tf32"):
            return _run_training(config, preset=preset, resume=resume, overwrite=overwrite)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """Whether float32 products and convolutions on a GPU are rounded to TF32; PyTorch by itself rounds convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    newer = getattr(matmul, "fp32_precision", None)  # torch 2.9; where it alone was set, the older question is an error
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "highest"
    convolutions = cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        if newer is not None:
            matmul.fp32_precision = newer
        cudnn.allow_tf32 = convolutions


def _run_training(config: TrainConfig, *, preset: str | None, resume: bool, overwrite: bool) -> TrainResult:
    started = time.perf_counter()
    folder = run_folder(config.name)
    if resume and config.precision == "auto" and (folder / "config.yaml").is_file():  # its own, on any device
        saved = read_values(folder / "config.yaml")
        config = dataclasses.replace(config, precision=saved.get("precision", "auto"))
    accelerator = make_accelerator(config, folder)
    try:
        with owned_by_all(folder, accelerator):
            checkpoint = prepare_folder(folder, resume=resume, overwrite=overwrite)
            return _run_owned(config, folder, checkpoint, accelerator, started, preset=preset, overwrite=overwrite)
    finally:
        _keep_process_group()
        accelerator.end_training()  # closes TensorBoard and the process group


@contextmanager
def owned_by_all(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Own the run for all its processes; where the first one cannot, each raises its UsageError."""
    with ExitStack() as stack:
        refusal = [""]
        if accelerator.is_main_process:
            try:
                stack.enter_context(owned(folder))
            except UsageError as error:
                refusal = [str(error)]
        broadcast_object_list(refusal)
        if refusal[0]:
            raise UsageError(refusal[0])
        yield


def _run_owned(
    config: TrainConfig,
    folder: Path,
    checkpoint: Path | None,
    accelerator: Accelerator,
    started: float,
    *,
    preset: str | None,
    overwrite: bool,
) -> TrainResult:
    saved, report, changes = {PRESET: preset}, {}, {}
    if checkpoint is not None:  # damage is told before anything is written
        saved, report = read_values(folder / "config.yaml"), read_report(folder)
        read_log(folder / "log.jsonl")
        changes = changed_values(config, saved)
        check_resumed(checkpoint, model_sizes(config))
    data = load_data(
        config.data,
        image_size=config.image_size,
        grey=config.grey,
        held_out=config.held_out,
        skip_unreadable=config.skip_unreadable,
    )
    if not len(data.train):
        raise UsageError(f"held_out: {config.held_out} leaves nothing to train on")

    def on_samples(net: nn.Module, step: int) -> None:
        save_samples(net, config, data, folder / "samples.png", device=accelerator.device)

    fresh = config if checkpoint is None else dataclasses.replace(config, init=None)  # a checkpoint has all weights
    trainer = Trainer(fresh, data, folder, accelerator, on_samples)
    if checkpoint is not None:
        trainer.resume(checkpoint)
        # as if the sessions had followed without a break
        started -= trainer.seconds + report.get("seconds", 0.0) - report.get("training_seconds", 0.0)
    finished = trainer.step >= config.steps
    with trainer.naming_lost_processes():
        before = None
        if accelerator.is_main_process:
            before = _begin(trainer, {PRESET: saved.get(PRESET)}, changes, overwrite=overwrite)
        accelerator.wait_for_everyone()
        try:
            result = trainer.run()
        except Exception:
            if before is not None and trainer.last_checkpoint() == checkpoint:
                write_text(folder / "config.yaml", before)  # what this session was asked for led nowhere
            raise
        if data.left_out is not None:  # each process has met its own
            data.left_out.add_named(gather_object(list(data.left_out.reasons.items())))
        if accelerator.is_main_process:
            _end(trainer, result, started, finished=finished)
            if data.left_out is not None and data.left_out.reasons:
                print(data.left_out.summary(), file=sys.stderr, flush=True)
        accelerator.wait_for_everyone()
        return result


def _begin(
    trainer: Trainer, values: Mapping[str, Any], changes: Mapping[str, tuple[Any, Any]], *, overwrite: bool
) -> str | None:
    """Make the run folder ready, and say what is trained; returns the config.yaml of a resumed run as it was."""
    config, folder = trainer.config, trainer.folder
    resumed = trainer.step > 0
    if overwrite and folder.exists():
        remove_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if trainer.step >= config.steps:  # config.yaml keeps the values that the run was trained with
        return None
    path = folder / "config.yaml"
    before = path.read_text() if resumed else None
    written = {**values, **config.to_dict(), "data": located(config.data)}
    write_text(path, yaml.safe_dump(written, sort_keys=False))
    _say_start(trainer, changes)
    return before


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this run had begun to write. Only its owner may do this."""
    shutil.rmtree(folder.with_name(f".{folder.name}.removed.partial"), ignore_errors=True)  # of an --overwrite
    remove_partials(folder, *WRITTEN)
    remove_partial(folder / "checkpoints")


def _end(trainer: Trainer, result: TrainResult, started: float, *, finished: bool) -> None:
    """loss.png, and samples.png and report.json of a run that is at its last step, unless they are there."""
    config, folder = trainer.config, trainer.folder
    save_loss_curve(read_log(folder / "log.jsonl"), folder / "loss.png")
    current = read_report(folder).get("steps") == result.step
    if not current:  # of a checkpoint that is no longer the newest
        (folder / "report.json").unlink(missing_ok=True)
    reported = not config.evaluate or current
    if result.signal is not None or (finished and reported):
        return
    try:
        _finish(trainer, result, started)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"all {result.step} steps are saved, samples.png and report.json are not written; --resume --name "
            f"{config.name} writes them"
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
    model = f"{config.model}, {parameter_count(trainer.model):,} parameters"
    machine = f"{trainer.accelerator.device}, precision {config.precision}{' (auto)' if trainer.auto_precision else ''}"
    if trainer.accelerator.device.type == "cuda":
        machine += f", {described(config, trainer.accelerator)}"
    print(f"{data.name}: {images}{kept}{skipped}; {model}; {machine}; {trainer.folder}", file=sys.stderr, flush=True)
    if is_sharded(config, trainer.accelerator) and not transformer_blocks(trainer.model):
        print(
            f"strategy: {config.model} has no blocks, so fsdp gathers all of it at once in each process: {BLOCKS}",
            file=sys.stderr,
            flush=True,
        )
    if changes:
        words = ", ".join(f"{name} {now} (was {then})" for name, (now, then) in changes.items())
        print(f"resumed after step {trainer.step} with {words}", file=sys.stderr, flush=True)


def _finish(trainer: Trainer, result: TrainResult, started: float) -> None:
    """samples.png and report.json, from the last checkpoint: just what `meanflow sample` and `evaluate` would give."""
    config, data, folder, device = trainer.config, trainer.data, trainer.folder, trainer.accelerator.device
    loaded = load_network(folder, device=str(device), trust_code=config.model)
    save_samples(loaded.net, config, data, folder / "samples.png", device=device)
    if not config.evaluate:
        return
    figures, sampler = evaluate_network(loaded, data, device=device)
    report = {
        **report_figures(figures, sampler),
        **({"guidance": _by_omega(loaded, data, device)} if config.objective == "imf" else {}),
        "seconds": round(time.perf_counter() - started, 3),
        "training_seconds": round(result.seconds, 3),
        "images_per_second": round(result.images_per_second, 1),
        "steps": result.step,
        "batch_size": config.batch_size,
        "parameters": parameter_count(trainer.model),
        "data": data.name,
        "model": config.model,
        "objective": config.objective,
        "seed": config.seed,
        "device": str(device),
        "precision": config.precision,
        "cuda_graphs": trainer.recorded,
        "processes": trainer.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **(data.left_out.figures() if data.left_out is not None else {}),
    }
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")


def _by_omega(loaded: LoadedNetwork, data: ImageData, device: torch.device | str) -> list[dict[str, Any]]:
    """The report's figures at each of `OMEGAS`."""
    rows = []
    for omega in OMEGAS:
        figures, _ = evaluate_network(loaded, data, guidance={**loaded.guidance, "omega": omega}, device=device)
        values = report_figures(figures, "")
        rows.append({"omega": omega, **{key: values[key] for key in ("class_accuracy", "frechet_distance")}})
    return rows


def save_samples(
    net: Callable[..., Any], config: TrainConfig, data: ImageData, path: Path, *, device: torch.device | str
) -> None:
    """A grid of generated images, one row per class (the first ten classes).

    For an iMF-DiT: one row per guidance scale of `OMEGAS` and one column per class, the noise of a column the same.
    """
    shape = (data.channels, data.image_size, data.image_size)
    of_all: dict[str, Any] = {"objective": config.objective, "seed": config.seed, "device": device}
    if config.objective == "imf":
        labels = torch.arange(GRID_COLUMNS) % data.num_classes  # [columns]
        rows = [generate(net, labels, shape, guidance={**config.guidance, "omega": w}, **of_all) for w in OMEGAS]
        images = torch.cat(rows)  # [rows·columns, C, H, W]
    else:
        labels = torch.arange(min(GRID_ROWS, data.num_classes)).repeat_interleave(GRID_COLUMNS)  # [rows·columns]
        images = generate(net, labels, shape, **of_all)  # [rows·columns, C, H, W]
    save_picture(image_grid(images, GRID_COLUMNS), path)


def evaluate_network(
    loaded: LoadedNetwork,
    data: ImageData,
    *,
    samples: int = EVALUATION_SAMPLES,
    steps: int | None = None,
    seed: int = 0,
    guidance: Mapping[str, float] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Evaluation, str]:
    """Figures of `samples` images, their labels in the training set's proportions; and the sampler in words.

    Raises:
        UsageError: the data are of another shape or of other classes than the network's.
    """
    guidance = loaded.guidance if guidance is None else guidance
    labels = evaluation_labels(data.train.labels, samples)
    shape = (data.channels, data.image_size, data.image_size)
    if loaded.image_shape != shape:
        raise UsageError(f"data: {loaded.source} makes images of shape {loaded.image_shape}, {data.name} has {shape}")
    data.check_classes(loaded.class_names, loaded.source)
    if loaded.objective in ("meanflow", "imf"):
        sampler = f"MeanFlow, {steps or 1} network evaluation{'s' if (steps or 1) > 1 else ''}"
        if guidance:
            sampler += f", omega {guidance['omega']:g} on [{guidance['t_min']:g}, {guidance['t_max']:g}]"
    else:
        sampler = f"Heun's method, {steps or 50} steps, {2 * (steps or 50)} network evaluations"
    if too_large(shape):
        return Evaluation(None, None, None, None, samples=0, note=too_large(shape)), sampler
    images = generate(
        loaded.net,
        labels,
        shape,
        objective=loaded.objective,
        guidance=guidance,
        steps=steps,
        seed=seed,
        device=device,
    )  # [n, C, H, W]
    evaluation = evaluate_images(images, labels, data)
    if data.left_out is not None:
        data.left_out.name_new()
    return evaluation, sampler


def report_figures(figures: Evaluation, sampler: str) -> dict[str, Any]:
    """An evaluation as report.json has it."""
    values: dict[str, Any] = {
        key: round(value, 4) if isinstance(value, float) else value
        for key, value in dataclasses.asdict(figures).items()
    }
    values["sampler"] = sampler
    if not values["note"]:
        del values["note"]
    return values
