"""Everything a training run depends on: one tree, each of whose groups is its component's own dataclass."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from . import registry
from .codecs import Codec, Pixels, absolute_if_there, identity_of, is_drawn
from .data import DataSource, ImageData, ImageFolder, LatentIndex, is_latents
from .errors import UsageError
from .evaluation import Evaluator, PixelStatistics
from .files import shown
from .models.options import ModelOptions, default_model, model_options
from .objectives import MeanFlow, Objective
from .options import Options, build, choice, group, option, options_of, owners_of, tree_of, values_of

RUNS = Path("runs")
Trust = bool | str | Collection[str]  # whether code that only a file names may be imported, or the names that may
# One flag of the command line for several options.
TOGETHER = {
    "prefix_tokens": ("num_class_tokens", "num_time_tokens", "num_cfg_tokens", "num_interval_tokens"),
    "sample_interval": ("sample_t_min", "sample_t_max"),
}
FOLDERS = ("folder", "latents")  # data sources that are a folder, whose name alone is that of such a folder


@dataclass(frozen=True)
class Optim(Options):
    """The optimiser, AdamW, and its schedule.

    Args:
        steps: optimiser steps
        batch_size: samples of one optimiser step, over all processes and accumulated parts
        accumulate: micro-batches into which each process cuts its part of a batch, to save memory
        lr: peak learning rate of AdamW
        warmup_steps: steps of linear warm-up
        schedule: after the warm-up: stay, or fall to zero at the last step
        beta1, beta2: of AdamW
        weight_decay: of AdamW
        grad_clip: largest gradient norm; 0: no clipping
        ema_decay: of the averaged weights, min(this, (1 + step) / (10 + step)); 0: no averaging
        ema_decays: of further averages, which are kept beside it; see --weights of meanflow sample
        power_ema: lengths (sigma_rel) of averages with power-function profiles, two or more; of their snapshots one of
            any length is made afterwards, by --weights power:LENGTH
    """

    steps: int = option(100_000, low=1)
    batch_size: int = option(256, low=1, high=2**24)
    accumulate: int = option(1, low=1)
    lr: float = option(1e-4, low=0.0, above=True)
    warmup_steps: int = option(0, low=0)
    schedule: Literal["constant", "cosine"] = "constant"
    beta1: float = option(0.9, low=0.0, high=1.0, below=True)
    beta2: float = option(0.95, low=0.0, high=1.0, below=True)
    weight_decay: float = option(0.0, low=0.0)
    grad_clip: float = option(1.0, low=0.0)
    ema_decay: float = option(0.9999, low=0.0, high=1.0, below=True)
    ema_decays: tuple[float, ...] = option((), low=0.0, high=1.0, below=True)
    power_ema: tuple[float, ...] = option((), low=0.0, high=12**-0.5, above=True, below=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulate != 0:
            raise UsageError(
                f"expected a multiple of accumulate = {self.accumulate}, got {self.batch_size}", field="batch_size"
            )
        if len(set(self.ema_decays)) < len(self.ema_decays):
            raise UsageError(f"expected different ones, got {self.ema_decays}", field="ema_decays")
        if self.power_ema and len(set(self.power_ema)) < max(2, len(self.power_ema)):
            raise UsageError(f"expected two different lengths or more, got {self.power_ema}", field="power_ema")


@dataclass(frozen=True)
class Run(Options):
    """The machine that a run uses, and what it writes.

    Args:
        device: auto: what accelerate finds, a CPU where there is no GPU
        threads: CPU threads of each process; 0: one per core. One is best for small networks
        strategy: several processes: a copy of the network in each, or a shard (FSDP2)
        checkpoint_blocks: blocks recomputed in the backward instead of kept, from the first on
        compile: torch.compile of the whole objective, as one graph; under fsdp of each block
        compile_mode: reduce-overhead: with CUDA graphs, needs a GPU
        cuda_graphs: record the whole step as a CUDA graph; without the flag, on one GPU, where nothing prevents it
        precision: auto: bf16 on a GPU that has it, else no. no: float32. tf32: its products on tensor cores. bf16,
            fp16: autocast. bf16-weights: weights and optimiser too
        init: weights to start from: a run, a checkpoint or a safetensors file (see meanflow convert), of a run the
            averages of its newest checkpoint; None: random. Weights that were trained at r = t alone give the same
            network at every r
        teacher, weak_teacher: pretrained networks to learn from: a run, a checkpoint or a weight file, as init. Of an
            objective whose targets start from a velocity, a teacher's then is that velocity
        name: the run folder is runs/NAME under the working directory
        seed: of weights, data order and every draw
        log_every: steps between lines of log.jsonl
        sample_every: steps between sample grids; 0: at the end only
        checkpoint_every: steps between checkpoints
        power_ema_every: steps between snapshots of --power-ema, all of which are kept
        keep_checkpoints: newest checkpoints that are kept; 1 needs room for two while one is written
        log_with: trackers to log with too, separated by commas: tensorboard, wandb, and all that accelerate knows
        tensorboard: also log for TensorBoard, in the run folder, as --log-with tensorboard does
        evaluate: at the end, write report.json (accuracy and Frechet distance of generated images)
        evaluator: what measures the generated images
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = option(0, low=0, high=1024)
    strategy: Literal["ddp", "fsdp"] = "ddp"
    checkpoint_blocks: Literal["all"] | int = option(0, low=0)
    compile: bool = False
    compile_mode: Literal["default", "reduce-overhead"] = "default"
    cuda_graphs: Literal["auto"] | bool = option("auto", flag=bool)
    precision: Literal["auto", "no", "tf32", "bf16", "bf16-weights", "fp16"] = "auto"
    init: str | None = None
    teacher: str | None = None
    weak_teacher: str | None = None
    name: str = "default"
    seed: int = option(0, low=0)
    log_every: int = option(20, low=1)
    sample_every: int = option(1000, low=0)
    checkpoint_every: int = option(1000, low=1)
    power_ema_every: int = option(1000, low=1)
    keep_checkpoints: int = option(2, low=1)
    log_with: str = ""
    tensorboard: bool = False
    evaluate: bool = True
    evaluator: Evaluator = choice("evaluators", PixelStatistics, methods=("titles", "refusal", "evaluate"))

    def __post_init__(self) -> None:
        if self.checkpoint_blocks != "all" and self.checkpoint_blocks < 0:
            raise UsageError(f"expected 'all' or at least 0, got {self.checkpoint_blocks}", field="checkpoint_blocks")
        super().__post_init__()
        if self.seed >= 2**32:  # what NumPy takes
            raise UsageError(f"expected less than 2**32, got {self.seed}", field="seed")
        if self.compile_mode != "default" and not self.compile:
            raise UsageError("expected only with compile", field="compile_mode")


@dataclass(frozen=True)
class Config:
    """A training run. Every option is a flag of `meanflow train` and a key of its YAML file, by its flat name.

    Args:
        data: "digits" (comes with scikit-learn), a folder of images with one sub-folder per class, wds:PATTERN
            (WebDataset tar files), hf:NAME_OR_PATH (Hugging Face datasets), or a folder of latents, as `meanflow
            encode` writes it
        codec: what the network trains on: pixels as they are, or latents: a pretrained AutoencoderKL, by its repository
            on the Hugging Face hub or its folder. Folders of latents know their own
        model: DiT-{S,B,M,L,XL}/{2,4,8}, iMF-DiT-{B,M,L,XL}/2; or your own "package.module:function"
        objective: average velocity (one step), the same at any guidance scale (improved MeanFlow), or plain velocity
            (ODE)
    """

    data: DataSource = choice("data", ImageFolder, methods=("load", "located"), kept=("flip", "held_out", "workers"))
    codec: Codec = choice("codecs", Pixels, methods=("latent_shape", "encode", "decode"))
    model: ModelOptions = choice("models", default_model, find=model_options, name=lambda model: model.name)
    objective: Objective = choice("objectives", MeanFlow, methods=("terms", "draw", "loss"))
    optim: Optim = group(Optim)
    run: Run = group(Run)

    @classmethod
    def of(cls, **values: Any) -> Config:
        """A configuration by flat names: `Config.of(data="digits", model="DiT-B/4", steps=1000)`.

        Raises:
            UsageError: there is no such option, a value is out of its range, or it would have no effect.
        """
        return cls().replace(**values)

    def replace(self, **values: Any) -> Config:
        """This configuration with other values, by flat names; another component starts from its own defaults."""
        return merged(self, {}, values)

    def values(self) -> dict[str, Any]:
        """Every option by its flat name."""
        return values_of(self)

    def network(self, data: ImageData) -> nn.Module:
        """The network for these data, with fresh weights.

        Raises:
            UsageError: its sizes do not fit each other, or it does not return what the objective needs.
        """
        self.check_fit()
        channels, side, other = self.codec.latent_shape(data.image_shape)
        if side != other:
            raise UsageError(f"expected square images, got {side}×{other}", field="data")
        return self.model.build(input_size=side, in_channels=channels, num_classes=data.num_classes, source=data.name)

    def check_codec(self, data: ImageData) -> None:
        """Raise a UsageError where the data are encoded, and not by this codec."""
        if data.codec is None:
            return
        if identity_of(data.codec) != identity_of(self.codec):
            raise UsageError(f"expected that of {data.name}, {data.codec}, got {self.codec}", field="codec")
        channels, *sides = self.codec.latent_shape(data.image_shape)
        expected = [channels * (2 if is_drawn(self.codec) else 1), *sides]  # means and standard deviations
        found = list(data.train[0][0].shape)
        if found != expected:
            raise UsageError(
                f"{data.name} says that it is of images of shape {data.image_shape}, of which its codec makes "
                f"{expected}, and holds {found}; encode the images anew",
                field="data",
            )

    def check_fit(self) -> None:
        """Raise a UsageError where the network is known not to return what the objective needs."""
        needed, found = self.objective.outputs, self.model.outputs
        if found is None or needed == found:
            return
        fitting = [name for name, model in registry.available("models", model_options) if model.outputs == needed]
        example = f", such as {fitting[0]}" if fitting else ""
        raise UsageError(
            f"{self.values()['objective']} trains a network that returns ({', '.join(needed)}){example}; got model "
            f"{self.model.name}, which returns ({', '.join(found)})",
            field="objective",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values in groups, as YAML and JSON hold them."""
        return tree_of(self)


GROUPS = tuple(Config.__dataclass_fields__)


def spelled_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flat values with short forms written out: a folder or PREFIX:PLACE as `data`, and one option for several."""
    out = dict(values)
    for short, names in TOGETHER.items():
        several = out.pop(short, None)
        if several is not None:
            if not isinstance(several, list | tuple) or len(several) != len(names):
                raise UsageError(f"expected {len(names)} numbers, got {shown(several)}", field=short)
            out = {**dict(zip(names, several, strict=True)), **out}
    if "data" in out and isinstance(out["data"], str | int | Path):
        out |= _data_of(str(out["data"]), out)
        if out["data"] == "latents" and "codec" not in out and is_latents(out.get("folder", "")):
            codec = dict(LatentIndex.read(Path(out["folder"]).expanduser()).codec)
            out = {"codec": codec.pop("name"), **codec, **out}
    if isinstance(out.get("codec"), str) and out["codec"] not in registry.names("codecs"):
        word = out["codec"]
        if not registry.is_code(word) or Path(word).is_dir():
            out |= {"codec": "autoencoder", "pretrained": word}
    if isinstance(out.get("pretrained"), str):
        out["pretrained"] = absolute_if_there(out["pretrained"])
    return out


def _data_of(word: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The data source that `--data WORD` is, and where its data are."""
    prefix, colon, place = word.partition(":")
    if colon and prefix in registry.DATA_PREFIXES:
        return {"data": prefix, **registry.find("data", prefix).named(place)}
    named = word in registry.names("data") and (word not in FOLDERS or "folder" in given)
    if named or (registry.is_code(word) and not Path(word).is_dir()):
        return {"data": word}
    return {"data": "latents" if is_latents(word) else "folder", "folder": word}


def merged(
    base: Config,
    file: Mapping[str, Any],
    flags: Mapping[str, Any],
    *,
    path: Path | None = None,
    saved: bool = False,
) -> Config:
    """`base` with the flat values of a file, and then those of flags.

    Options in the file of a component that flags put another in the place of do not apply.

    Args:
        base: a recipe, or what a saved run was started with.
        path: of the file, for messages.
        saved: whether the file is a run's own, which may be shorter than its warm-up.

    Raises:
        UsageError: a value is out of its range, the values do not fit each other, or one that was given would have no
            effect.
    """
    written = file
    try:
        file = spelled_out(file)
        flags = spelled_out(flags)
        file = _without_replaced(file, flags)
        given = {**file, **flags}
        used: set[str] = set()
        config: Config = build(Config, base, given, set())
        given = {**given, **_taught(config, given, flags)}
        config = build(Config, base, given, used)
        for name in given:
            if name not in used:
                _refuse(config, name, given[name], asked=name in flags)
        _refuse_collisions(config)
        optim = config.optim
        chosen = "warmup_steps" in flags or ("warmup_steps" in file and "steps" not in flags)
        if chosen and not saved and optim.warmup_steps >= optim.steps:
            raise UsageError(
                f"expected less than steps = {optim.steps}, got {optim.warmup_steps}", field="warmup_steps"
            )
    except UsageError as error:
        if path is not None and _is_of(error.field, written, flags):
            raise UsageError(f"{path}: {error}", field="config") from error
        raise
    return config


def _taught(config: Config, given: Mapping[str, Any], flags: Mapping[str, Any]) -> Mapping[str, Any]:
    """What makes an objective learn from a teacher that is given, where nobody has said otherwise."""
    objective, asked = config.objective, config.objective.taught
    if given.get("teacher") is None or "frozen" in objective.teachers:
        return {}
    usual, now = values_of(type(objective)()), values_of(objective)
    said = any(name in flags or now[name] != usual[name] for name in asked)
    return {} if said else asked


def _is_of(field: str | None, file: Mapping[str, Any], flags: Mapping[str, Any]) -> bool:
    """Whether an option that is wrong came from the file."""
    short = next((short for short, names in TOGETHER.items() if field in names), field)
    return (field in file or short in file) and field not in flags


def _without_replaced(file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    left = dict(file)
    for field in Config.__dataclass_fields__.values():
        here, there = file.get(field.name), flags.get(field.name)
        if "kind" in field.metadata and here is not None and there is not None and here != there:
            own = {option.name for option in options_of(field.metadata["find"](here))}
            if field.name != "model":  # sizes are those of one model; what two of another kind share is meant for both
                own -= {option.name for option in options_of(field.metadata["find"](there))}
            left = {name: value for name, value in left.items() if name not in own}
    return left


def _refuse_collisions(config: Config) -> None:
    """Raise where two options of a configuration have one name."""
    names = [option.name for option in options_of(Config, config)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(
            f"expected one option of this name, got {names.count(twice[0])}: call that of the component otherwise",
            field=twice[0],
        )


def _refuse(config: Config, name: str, value: Any, *, asked: bool) -> None:
    """Raise unless an option that has no place in `config` has the value that it has where nobody gives one."""
    owners = owners_of(Config, name)
    if not owners:
        known = {option.name for option in options_of(Config, config)}
        close = difflib.get_close_matches(name, known, n=1)
        raise UsageError(f"unknown option{f'; is it {close[0]}?' if close else ''}", field=name)
    values = config.values()
    others = [(where, word, option) for where, word, option in owners if values.get(where) != word]
    where = others[-1][0]  # the innermost
    near = [(word, option.default) for place, word, option in others if place == where]
    defaults = [default for _, default in near]
    if not asked and (value is None or value in defaults or (isinstance(value, list) and tuple(value) in defaults)):
        return  # a file may be a whole configuration, which asks for what differs
    words = " or ".join(dict.fromkeys(word for word, _ in near))
    raise UsageError(f"expected only with {where} {words}, got {where} {values.get(where)}", field=name)


def words_in(tree: Mapping[str, Any]) -> Iterator[str]:
    """Every word in a tree of plain values, such as a file may give: any of them may name a component."""
    for value in tree.values():
        if isinstance(value, Mapping):
            yield from words_in(value)
        elif isinstance(value, str):
            yield value


def check_code(names: Iterable[str], source: Path, trust: Trust) -> None:
    """Raise where `source`, a file, names code that is not to be run.

    Args:
        trust: whether all may be, or the names of those that may.
    """
    trusted = (trust,) if isinstance(trust, str) else trust
    for name in names:
        if registry.is_code(name) and trusted is not True and (trusted is False or name not in trusted):
            raise UsageError(
                f"{source} names the function {shown(name)}. It is not run because only a file names it: if you trust "
                "it, add --trust-code, or name it yourself (--model, --objective); in Python: trust_code=True"
            )
