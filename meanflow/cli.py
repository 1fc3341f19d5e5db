"""The command line: train, sample, evaluate, convert, data, info."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypedDict, get_type_hints

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional
from tyro.constructors import PrimitiveConstructorSpec

from . import __version__
from .errors import TrainingError, UsageError
from .files import replaced
from .merge import merged
from .output import survives_its_readers
from .presets import PRESETS, preset_name
from .processes import is_first, world_size
from .training.config import EVALUATION_SAMPLES, RUNS, TrainConfig
from .training.config_file import PRESET, read_config, read_values

if TYPE_CHECKING:
    from .training.network import LoadedNetwork

# PyTorch takes two seconds and matplotlib one, so each command imports what it needs.

Flag = FlagCreatePairsOff[bool]
# Not `Literal[…] | None`: tyro would take the word "None" for a preset.
Preset = Annotated[
    str | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(PRESETS) + "}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [value or "none"],
        choices=tuple(PRESETS),
    ),
]
Device = Literal["auto", "cpu", "cuda"]


@dataclasses.dataclass(frozen=True)
class _Start:
    # values to start from. digits: 8x8 digits, a minute and a half (--objective imf: three, for any guidance scale);
    # others: the papers' recipes
    preset: Positional[Preset] = None
    config: Path | None = None  # YAML file of values (`steps: 1000`), for the preset and every option below --overwrite
    resume: Flag = False  # continue the run of this name from its newest checkpoint
    overwrite: Flag = False  # replace the run of this name, if there is one
    trust_code: Flag = False  # run the function that a file, not --model, names as the model


@dataclasses.dataclass(frozen=True)
class _Settings(TrainConfig):
    # record the whole step as a CUDA graph: without the flag, on one GPU, where nothing in the run keeps it from that
    cuda_graphs: bool = True


@dataclasses.dataclass(frozen=True)
class Train(_Start):
    """Train a network; everything it writes is in runs/NAME under the working directory.

    Values come from, later ones first: flags, the YAML file, the saved run (with --resume) or else the preset, the
    defaults.
    """

    settings: OmitArgPrefixes[_Settings] = dataclasses.field(default_factory=_Settings)


# The same, but `settings` has the flags that were given and no others: tyro leaves out what a TypedDict may lack.
_Flags: Any = TypedDict("_Flags", get_type_hints(_Settings), total=False)  # type: ignore[misc]
_Given = dataclasses.make_dataclass(
    "_Given", [("settings", OmitArgPrefixes[_Flags])], bases=(_Start,), frozen=True, kw_only=True
)


def train(args: Sequence[str]) -> int:
    """Train a network"""
    asked = _parse(_Given, [a for a in args if a not in ("-h", "--help")], prog="train")
    file = read_values(asked.config) if asked.config else {}
    word = asked.preset or file.get(PRESET)
    if word and word not in PRESETS:
        raise UsageError(f"config: {asked.config}: {PRESET}: expected one of {', '.join(PRESETS)}, got {word!r}")
    file.pop(PRESET, None)
    given = {**file, **asked.settings}
    if asked.resume:
        base, preset = _saved_run(word, given, overwrite=asked.overwrite)
    else:
        preset = preset_name(word, given.get("objective")) if word else None
        base = PRESETS[preset] if preset else TrainConfig()
    config = merged(base, file, asked.settings, path=asked.config)
    if {"-h", "--help"} & set(args):  # shows the values that all the rest of the line gives
        shown = {**vars(config), "cuda_graphs": config.cuda_graphs is not False}
        _parse(Train, ["--help"], prog="train", default=Train(settings=_Settings(**shown)))
    from .training.network import check_trusted
    from .training.run import read_report, run_folder, run_training

    if asked.settings.get("model") != config.model:  # a file or a preset named it
        source = asked.config if file.get("model") == config.model else run_folder(config.name) / "config.yaml"
        check_trusted(config.model, source, asked.trust_code)
    result = run_training(config, preset=preset, resume=asked.resume, overwrite=asked.overwrite)
    folder = run_folder(config.name)
    if result.signal is not None:
        _say(
            f"Stopped by {signal.Signals(result.signal).name} after step {result.step} of {config.steps}; "
            f"everything is saved in {result.checkpoint}. Continue with: meanflow train --resume --name {config.name}"
        )
        return 128 + result.signal
    if result.new_steps == 0:
        _say(f"{folder} has {result.step} steps already, and --steps asks for {config.steps}: nothing was trained")
    else:
        _say(f"Trained {result.step} steps in {result.seconds:.0f} s. Samples: {folder / 'samples.png'}")
    if config.evaluate:
        _say_report(read_report(folder))
    return 0


def _saved_run(word: str | None, given: dict[str, Any], *, overwrite: bool) -> tuple[TrainConfig, str | None]:
    """What the run to resume was started with, and its preset; `word` is the preset that was asked for."""
    from .training.run import prepare_folder, run_folder

    of_preset = PRESETS[preset_name(word, given.get("objective"))] if word else TrainConfig()
    folder = run_folder(given.get("name", of_preset.name))
    prepare_folder(folder, resume=True, overwrite=overwrite)
    config, values = read_config(folder / "config.yaml"), read_values(folder / "config.yaml")
    preset = values.get(PRESET)
    if word and PRESET in values and preset_name(word, config.objective) != preset:
        raise UsageError(
            f"preset: {folder} was started from {preset or 'no preset'}, and a resumed run keeps its values; got {word}"
        )
    return dataclasses.replace(config, name=folder.name), preset


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw images from a trained network."""

    run: Positional[str]  # a run folder or its name, a checkpoint folder, or a weight file of `meanflow convert`
    steps: int | None = None  # network steps; None: 1 for meanflow, 50 (of an ODE solver) for flow_matching
    labels: str = ""  # labels or class names, separated by commas; empty: every class, at most ten
    count: int = 10  # images per label
    seed: int = 0  # of the noise
    out: Path = Path("grid.png")  # where to: a picture, or an array (n, C, H, W) with the suffix .npy
    weights: Literal["ema", "raw"] = "ema"  # averaged weights, or those of the last step
    method: Literal["heun", "euler"] = "heun"  # flow_matching: the ODE solver
    guidance_scale: float = 1.0  # flow_matching: classifier-free guidance; 1 is none
    omega: float | None = None  # imf: guidance scale, 1 is none; None: as the run's configuration says
    t_min: float | None = None  # imf: guided times, from; None: as the run's configuration says
    t_max: float | None = None  # imf: guided times, to; None: as the run's configuration says
    trust_code: Flag = False  # run the function "package.module:function" that the run names as its model
    device: Device = "auto"  # auto: a GPU if there is one


def sample_command(args: Sequence[str]) -> int:
    """Draw images from a trained network"""
    options = _parse(Sample, args, prog="sample")
    import numpy as np
    import torch

    from .training.network import generate, load_network
    from .training.pictures import image_grid, save_picture

    _check_at_least(1, options, "count", "steps")
    _check_finite(options, "guidance_scale", "omega")
    _check_out(options.out)
    _check_backend()
    device = _device(options.device)
    loaded = load_network(_source(options.run), options.weights, device, trust_code=options.trust_code)
    guidance = _guidance(options, loaded)
    given = [name for name in ("method", "guidance_scale") if getattr(options, name) != getattr(Sample, name)]
    if given and loaded.objective != "flow_matching":
        raise UsageError(
            f"{', '.join(given)}: only a network trained with --objective flow_matching takes an ODE solver and its "
            f"guidance; {loaded.source} is of {loaded.objective}"
        )
    labels = _labels(options.labels, loaded)
    channels = loaded.image_shape[0]
    if options.out.suffix != ".npy" and channels not in (1, 3):
        raise UsageError(
            f"out: {channels} channels make no picture; write an array instead, with --out {options.out.stem}.npy"
        )
    images = generate(
        loaded.net,
        torch.tensor(labels).repeat_interleave(options.count),
        loaded.image_shape,
        objective=loaded.objective,
        guidance=guidance,
        steps=options.steps,
        seed=options.seed,
        method=options.method,
        guidance_scale=options.guidance_scale,
        device=device,
    )  # [labels·count, C, H, W]
    if options.out.suffix == ".npy":
        with replaced(options.out) as partial:
            np.save(partial, images.numpy())
    else:
        try:
            save_picture(image_grid(images, options.count), options.out)
        except (OSError, ValueError) as error:
            raise UsageError(f"out: cannot write {options.out}: {error}") from error
    _say(f"{len(images)} images from {loaded.source}: {options.out}")
    return 0


def _check_at_least(least: int, options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"{name}: expected at least {least}, got {value}")


def _check_finite(options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not math.isfinite(value):
            raise UsageError(f"{name}: expected a finite number, got {value}")


def _check_backend() -> None:
    """Raise where MFKERNELS_BACKEND names none."""
    from mfkernels.backend import requested_backend

    try:
        requested_backend()
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_out(path: Path) -> None:
    """Raise before any work where `path` cannot be written."""
    if path.is_dir():
        raise UsageError(f"out: expected a file, got the folder {path}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"out: no folder {path.absolute().parent}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"out: cannot write {path}: the folder {path.absolute().parent} is read-only")
    from PIL import Image

    formats = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE}
    if path.suffix != ".npy" and path.suffix.lower() not in formats:
        raise UsageError(f"out: cannot write {path}: expected the suffix of a picture, such as .png, or .npy")


def _guidance(options: Sample | Evaluate, loaded: LoadedNetwork) -> dict[str, float]:
    """The network's guidance with what was asked for instead."""
    asked = {name: getattr(options, name) for name in ("omega", "t_min", "t_max")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked and loaded.objective != "imf":
        raise UsageError(
            f"{', '.join(asked)}: {loaded.source} has its guidance built in; only a network trained with "
            "--objective imf can be asked for another"
        )
    guidance = {**loaded.guidance, **asked}
    if guidance and not guidance["omega"] >= 1.0:
        raise UsageError(f"omega: expected a number >= 1, got {guidance['omega']}")
    if guidance and not 0.0 <= guidance["t_min"] <= guidance["t_max"] <= 1.0:
        raise UsageError(
            f"t_min, t_max: expected 0 <= t_min <= t_max <= 1, got {guidance['t_min']} and {guidance['t_max']}"
        )
    return guidance


def _labels(text: str, loaded: LoadedNetwork) -> list[int]:
    names = loaded.class_names
    if not text:
        return list(range(min(10, len(names))))
    by_number = not any(name.isdecimal() for name in names)  # else "3" could be either
    labels = []
    for word in text.split(","):
        word = word.strip()
        if word in names:
            labels.append(names.index(word))
        elif by_number and word.isdecimal() and int(word) < len(names):
            labels.append(int(word))
        else:
            shown = ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
            numbers = f" or numbers below {len(names)}" if by_number else ""
            raise UsageError(f"labels: expected class names{numbers} ({shown}), got {word!r}")
    return labels


def _source(text: str) -> Path:
    """A run folder, checkpoint or file at that path, or else the run of that name under runs/."""
    path = Path(text)
    there = path.is_file() or (path / "checkpoints").is_dir() or (path / "state.json").is_file()
    return RUNS / text if not there and (RUNS / text).is_dir() else path


def _device(name: str) -> str:
    import torch

    from .checks import check_device

    check_device(name)
    return "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Compare generated images with the real ones: class accuracy and pixel-space Frechet distance, in report.json."""

    run: Positional[str]  # a run folder or its name
    steps: int | None = None  # network steps; None: 1 for meanflow, 50 (of an ODE solver) for flow_matching
    samples: int = EVALUATION_SAMPLES  # generated images
    seed: int = 0  # of the noise
    weights: Literal["ema", "raw"] = "ema"  # averaged weights, or those of the last step
    data: str | None = None  # another folder of images to compare with; None: what the run was trained on
    omega: float | None = None  # imf: guidance scale, 1 is none; None: as the run's configuration says
    t_min: float | None = None  # imf: guided times, from; None: as the run's configuration says
    t_max: float | None = None  # imf: guided times, to; None: as the run's configuration says
    trust_code: Flag = False  # run the function "package.module:function" that the run names as its model
    device: Device = "auto"  # auto: a GPU if there is one


def evaluate(args: Sequence[str]) -> int:
    """Class accuracy and Frechet distance of a run"""
    options = _parse(Evaluate, args, prog="evaluate")
    from .data import load_data
    from .training.network import load_network
    from .training.run import evaluate_network, report_figures, update_report

    _check_at_least(2, options, "samples")
    _check_at_least(1, options, "steps")
    _check_finite(options, "omega")
    _check_backend()
    folder = _source(options.run)
    if folder.is_file() or (folder / "state.json").is_file():
        raise UsageError(f"run: expected a run folder such as runs/digits, got {folder}")
    device = _device(options.device)
    loaded = load_network(folder, options.weights, device, trust_code=options.trust_code)
    guidance = _guidance(options, loaded)
    config = read_config(folder / "config.yaml")
    channels, side, _ = loaded.image_shape
    data = load_data(
        options.data or config.data,
        image_size=side,
        grey=channels == 1,
        held_out=config.held_out,
        skip_unreadable=config.skip_unreadable,
    )
    figures, sampler = evaluate_network(
        loaded,
        data,
        samples=options.samples,
        steps=options.steps,
        seed=options.seed,
        guidance=guidance,
        device=device,
    )
    report = report_figures(figures, sampler)
    if data.left_out is not None and data.left_out.reasons:
        report |= data.left_out.figures()
        _say(data.left_out.summary())
    _say_report(report)
    standard = Evaluate(run=options.run, device=options.device, trust_code=options.trust_code)
    asked = dataclasses.replace(options, omega=None, t_min=None, t_max=None)
    if asked == standard and guidance == loaded.guidance:
        update_report(folder, report, loaded.step)
    else:
        _say(
            f"{folder / 'report.json'} keeps the figures of the standard evaluation: {standard.samples} samples, "
            "default options."
        )
    return 0


def _say_report(report: dict[str, Any]) -> None:
    for key, title in (("class_accuracy", "class accuracy"), ("frechet_distance", "pixel-space Frechet distance")):
        value, reference = report.get(key), report.get(f"held_out_{key}")
        if value is not None:
            beside = "" if reference is None else f"  (held-out real images: {reference:.3f})"
            _say(f"{title}: {value:.3f}{beside}")
    if "note" in report:
        _say(report["note"])


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turn other programs' weights into a safetensors file for `meanflow sample` and `meanflow train --init`.

    Reads the MeanFlow and improved MeanFlow authors' JAX weights as .npz of '/'-joined names, and PyTorch weights (.pt,
    .pth, .safetensors) of the improved MeanFlow authors, DiT and SiT. The last two predict other quantities: they are a
    start for training, not a MeanFlow model.
    """

    weights: Positional[Path]  # .npz, .pt, .pth or .safetensors
    out: Path  # the safetensors file to write
    num_heads: int | None = None  # attention heads; None: 16 at width 1152, else width / 64
    input_size: int | None = None  # side of the image or latent; None: from the positions, else 32
    overwrite: Flag = False  # replace the file if it exists


def convert_command(args: Sequence[str]) -> int:
    """Weights of other programs as a safetensors file"""
    options = _parse(Convert, args, prog="convert")
    from .weight_files import convert_file

    if options.out.is_dir():
        raise UsageError(f"out: expected a file, got the folder {options.out}")
    if options.out.exists() and not options.overwrite:
        raise UsageError(f"out: {options.out} exists already; choose another name or add --overwrite")
    _say(convert_file(options.weights, options.out, num_heads=options.num_heads, input_size=options.input_size))
    return 0


@dataclasses.dataclass(frozen=True)
class Info:
    """Print versions, devices, and which backend serves each operation on each device."""

    device: Device = "auto"  # auto: every device there is


def info(args: Sequence[str]) -> int:
    """Versions, devices, and which backend serves which operation"""
    options = _parse(Info, args, prog="info")
    from .diagnosis import describe

    _check_backend()
    print(describe(None if options.device == "auto" else _device(options.device)))
    return 0


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """Read every image of a folder as training would, and name those that cannot be read.

    The exit code is 0 if every image can be read, 1 if not.
    """

    folder: Positional[Path]  # one sub-folder per class
    image_size: int = TrainConfig.image_size  # side in pixels that images are scaled to
    grey: Flag = False  # one grey channel instead of RGB


def data_command(args: Sequence[str]) -> int:
    """Read every image of a folder: meanflow data check FOLDER"""
    options = tyro.extras.subcommand_cli_from_dict(
        {"check": DataCheck}, args=list(args), prog="meanflow data", description=data_command.__doc__
    )
    _check_at_least(1, options, "image_size")
    from .data.check import check_folder

    found = check_folder(options.folder.expanduser(), image_size=options.image_size, grey=options.grey)
    for line in found.lines():
        _say(line)
    return 1 if found.unreadable else 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "sample": sample_command,
    "evaluate": evaluate,
    "convert": convert_command,
    "data": data_command,
    "info": info,
}


# What needs less memory, by command.
LESS = {
    "train": "a smaller --batch-size, a larger --accumulate, or --checkpoint-blocks all",
    "sample": "a smaller --count, or fewer --labels",
    "evaluate": "fewer --samples",
    "data": "a smaller --image-size",
    "convert": "nothing here can; use a machine with more",
    "info": "--device cpu",
}


def _parse(cls: type[Any], args: Sequence[str], *, prog: str, default: Any = None) -> Any:
    defaults = {} if default is None else {"default": default}
    return tyro.cli(cls, args=list(args), prog=f"meanflow {prog}", **defaults)


def _say(text: str) -> None:
    if is_first():
        print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 training failed (or `data check` found something), 2 a mistake
    to mend, 130 after Ctrl-C, 141 where nobody reads the output any more.

    One of several processes (torchrun, accelerate launch) whose program this is (`argv` is None) ends here.
    """
    if argv is None and os.environ.get("WORLD_SIZE", "1") != "1":
        _run_and_leave(sys.argv[1:])
    return _run(list(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    with survives_its_readers():
        return _command(argv)


def _command(argv: list[str]) -> int:
    commands = "\n".join(f"  {name:<10}{function.__doc__}" for name, function in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="meanflow",
        description="Train one-step generative models, and draw images from them.",
        epilog=f"commands:\n{commands}\n\n`meanflow COMMAND --help` lists its options. Try: meanflow train digits",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"meanflow {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    if not argv:
        parser.print_help()
        return 0
    options = parser.parse_args(argv[:1])
    try:
        if options.command not in ("train", "info") and world_size() > 1:
            raise UsageError(
                f"WORLD_SIZE: this command works in one process, and {world_size()} were started; start it without "
                "torchrun"
            )
        return COMMANDS[options.command](argv[1:])
    except KeyboardInterrupt as error:
        code, words = 130, str(error) or "interrupted"
    except TrainingError as error:
        code, words = 1, str(error)
    except (UsageError, OSError) as error:  # OSError: what the disk or its permissions refuse
        code, words = 2, str(error)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        code, words = 2, f"out of memory: {str(error).splitlines()[0]}. Ask for less at a time: {LESS[options.command]}"
    print(f"meanflow {options.command}: {words}", file=sys.stderr)
    return code


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "DefaultCPUAllocator" in str(error)  # PyTorch's on a CPU is a plain RuntimeError


def _run_and_leave(argv: list[str]) -> NoReturn:
    """Leave without tearing the interpreter down: a process group's threads can abort that, and hide the exit code."""
    try:
        code = _run(argv)
    except SystemExit as stop:  # the parsers' way out
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
