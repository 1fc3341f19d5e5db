"""The command line: train, sample, evaluate, convert, info."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch
import tyro
import yaml
from accelerate import PartialState
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional
from tyro.constructors import PrimitiveConstructorSpec

from .data import load_data
from .errors import UsageError
from .presets import PRESETS, find_preset
from .training.config import TrainConfig
from .training.loop import TrainingError
from .training.network import LoadedNetwork, generate, load_network
from .training.pictures import image_grid, save_picture
from .training.run import (
    EVALUATION_SAMPLES,
    RUNS,
    evaluate_network,
    prepare_folder,
    read_config,
    report_figures,
    run_folder,
    run_training,
    write_text,
)

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
class Train:
    """Train a network; everything it writes is in runs/NAME under the working directory.

    Values come from, later ones first: flags, the YAML file, the saved run (with --resume), the preset, the defaults.
    """

    # values to start from. digits: 8x8 digits, a minute and a half (--objective imf: three, for any guidance scale);
    # others: the papers' recipes
    preset: Positional[Preset] = None
    config: Path | None = None  # YAML file with values for any of the options below
    resume: Flag = False  # continue the run of this name from its newest checkpoint
    overwrite: Flag = False  # replace the run of this name, if there is one
    settings: OmitArgPrefixes[TrainConfig] = dataclasses.field(default_factory=TrainConfig)


def train(args: Sequence[str]) -> int:
    """Train a network"""
    # The defaults that --help shows, and that flags override, depend on the preset and files named among the arguments.
    first = _parse(Train, [a for a in args if a not in ("-h", "--help")], prog="train")
    base = TrainConfig()
    if first.preset:
        asked = first.settings.objective  # "meanflow" is the flag's default: then the preset and the file decide
        base = find_preset(first.preset, None if asked == base.objective else asked)
    given = _values_of_file(first.config, base) if first.config else {}
    if first.preset and "objective" in given and first.settings.objective == TrainConfig().objective:
        base = find_preset(first.preset, given["objective"])
    if first.resume:
        name = _given_name(args) or given.get("name") or base.name
        prepare_folder(run_folder(name), resume=True, overwrite=first.overwrite)
        saved = read_config(run_folder(name))
        base = _configured(base, saved, run_folder(name) / "config.yaml")
        base = dataclasses.replace(base, name=name)
    if first.config:
        base = _configured(base, given, first.config)
    if {"-h", "--help"} & set(args):
        args = ["--help"]  # alone: a preset before it would be left out of the text
    final = _parse(Train, args, prog="train", default=Train(preset=first.preset, settings=base))
    result = run_training(final.settings, resume=final.resume, overwrite=final.overwrite)
    name, folder = final.settings.name, run_folder(final.settings.name)
    if result.signal is not None:
        _say(
            f"Stopped by {signal.Signals(result.signal).name} after step {result.step} of {final.settings.steps}; "
            f"everything is saved in {result.checkpoint}. Continue with: meanflow train --resume --name {name}"
        )
        return 128 + result.signal
    if result.new_steps == 0:
        asked = final.settings.steps
        _say(f"{folder} has {result.step} steps already, and --steps asks for {asked}: nothing was trained")
        return 0
    _say(f"Trained {result.step} steps in {result.seconds:.0f} s. Samples: {folder / 'samples.png'}")
    report = folder / "report.json"
    if final.settings.evaluate and report.is_file():
        _say_report(json.loads(report.read_text()))
    return 0


def _given_name(args: Sequence[str]) -> str | None:
    """The value of --name among the arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--name")
    return parser.parse_known_args(list(args))[0].name


def _values_of_file(path: Path, base: TrainConfig) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"config: cannot read {path}: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UsageError(f"config: {path}: expected keys and values, such as `steps: 1000`, got {values!r}")
    _configured(base, values, path)
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _configured(base: TrainConfig, values: dict[str, Any], path: Path) -> TrainConfig:
    """`base` with the values of a file, checked as flags are."""
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    flags: dict[str, list[str]] = {}
    for written, value in values.items():
        key = str(written).replace("-", "_")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise UsageError(f"config: {path} has an unknown key {written!r}{f'; is it {close[0]}?' if close else ''}")
        flag = "--" + key.replace("_", "-")
        if isinstance(getattr(base, key), bool):
            if not isinstance(value, bool):
                raise UsageError(f"config: {path}: {key}: expected true or false, got {value!r}")
            flags[key] = [flag if value else flag.replace("--", "--no-", 1)]
        else:
            flags[key] = [flag, *(str(item) for item in (value if isinstance(value, list) else [value]))]
    try:
        together = list(itertools.chain.from_iterable(flags.values()))
        return tyro.cli(TrainConfig, args=together, default=base, console_outputs=False)
    except SystemExit as error:
        types = {f.name: f.type for f in dataclasses.fields(TrainConfig)}
        plain = {str(key).replace("-", "_"): value for key, value in values.items()}
        for some in [{key: value} for key, value in plain.items()] + [plain]:  # which of them was it?
            try:
                dataclasses.replace(base, **some)
            except UsageError as reason:
                raise UsageError(f"config: {path}: {reason}") from error
            except TypeError:
                pass  # text where a number belongs; said below
        for key, one in flags.items():
            try:
                tyro.cli(TrainConfig, args=one, default=base, console_outputs=False)
            except SystemExit:
                raise UsageError(f"config: {path}: {key}: expected {types[key]}, got {plain[key]!r}") from error
        raise UsageError(f"config: {path}: its values do not fit each other") from error


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
    device: Device = "auto"  # auto: a GPU if there is one


def sample_command(args: Sequence[str]) -> int:
    """Draw images from a trained network"""
    options = _parse(Sample, args, prog="sample")
    if options.count < 1 or (options.steps is not None and options.steps < 1):
        raise UsageError(f"count, steps: expected at least 1, got {options.count} and {options.steps}")
    device = _device(options.device)
    loaded = load_network(_source(options.run), options.weights, device)
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
    if not options.out.absolute().parent.is_dir():
        raise UsageError(f"out: no folder {options.out.absolute().parent}")
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
        import numpy as np

        np.save(options.out, images.numpy())
    else:
        try:
            save_picture(image_grid(images, options.count), options.out)
        except (OSError, ValueError) as error:
            raise UsageError(f"out: cannot write {options.out}: {error}") from error
    _say(f"{len(images)} images from {loaded.source}: {options.out}")
    return 0


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
    labels = []
    for word in text.split(","):
        word = word.strip()
        if word in names:
            labels.append(names.index(word))
        elif word.isdigit() and int(word) < len(names):
            labels.append(int(word))
        else:
            shown = ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
            raise UsageError(f"labels: expected class names or numbers below {len(names)} ({shown}), got {word!r}")
    return labels


def _source(text: str) -> Path:
    """A run folder, checkpoint or file at that path, or else the run of that name under runs/."""
    path = Path(text)
    there = path.is_file() or (path / "checkpoints").is_dir() or (path / "state.json").is_file()
    return RUNS / text if not there and (RUNS / text).is_dir() else path


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device: cuda was asked for, but PyTorch sees no GPU here (`meanflow info` shows what it sees)"
        )
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
    device: Device = "auto"  # auto: a GPU if there is one


def evaluate(args: Sequence[str]) -> int:
    """Class accuracy and Frechet distance of a run"""
    options = _parse(Evaluate, args, prog="evaluate")
    if options.samples < 2 or (options.steps is not None and options.steps < 1):
        raise UsageError(f"samples, steps: expected at least 2 and 1, got {options.samples} and {options.steps}")
    folder = _source(options.run)
    device = _device(options.device)
    loaded = load_network(folder, options.weights, device)
    guidance = _guidance(options, loaded)
    config = _configured(TrainConfig(), read_config(folder), folder / "config.yaml")
    data = load_data(
        options.data or config.data, image_size=config.image_size, grey=config.grey, held_out=config.held_out
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
    _say_report(report)
    path = folder / "report.json"
    standard = Evaluate(run=options.run, device=options.device)
    asked = dataclasses.replace(options, omega=None, t_min=None, t_max=None)
    if asked == standard and guidance == loaded.guidance:
        before = json.loads(path.read_text()) if path.is_file() else {}
        before.pop("note", None)
        write_text(path, json.dumps({**before, **report}, indent=2) + "\n")
    else:
        _say(f"{path} keeps the figures of the standard evaluation: {standard.samples} samples, default options.")
    return 0


def _say_report(report: dict[str, Any]) -> None:
    for key, title in (("class_accuracy", "class accuracy"), ("frechet_distance", "Frechet distance")):
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
    from .weight_files import convert_file

    options = _parse(Convert, args, prog="convert")
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
    from .diagnosis import describe

    options = _parse(Info, args, prog="info")
    print(describe(None if options.device == "auto" else _device(options.device)))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "sample": sample_command,
    "evaluate": evaluate,
    "convert": convert_command,
    "info": info,
}


def _parse(cls: type[Any], args: Sequence[str], *, prog: str, default: Any = None) -> Any:
    defaults = {} if default is None else {"default": default}
    return tyro.cli(cls, args=list(args), prog=f"meanflow {prog}", **defaults)


def _say(text: str) -> None:
    if PartialState().is_main_process:
        print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 training failed, 2 a mistake to mend, 130 after Ctrl-C.

    One of several processes (torchrun, accelerate launch) whose program this is (`argv` is None) ends here.
    """
    if argv is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _run_and_leave(sys.argv[1:])
    return _run(list(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    commands = "\n".join(f"  {name:<10}{function.__doc__}" for name, function in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="meanflow",
        description="Train one-step generative models, and draw images from them.",
        epilog=f"commands:\n{commands}\n\n`meanflow COMMAND --help` lists its options. Try: meanflow train digits",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    options = parser.parse_args(argv[:1])
    try:
        return COMMANDS[options.command](argv[1:])
    except UsageError as error:
        print(f"meanflow {options.command}: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"meanflow {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"meanflow {options.command}: interrupted", file=sys.stderr)
        return 130


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
