"""A trained network from a run, a checkpoint or a weight file, and images from it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import Autoencoder, Codec, Pixels, absolute_if_there, identity_of
from ..config import RUNS, Trust, check_code, words_in
from ..data import Stream, generator_for
from ..errors import UsageError
from ..files import parse_json, reason, shown
from ..models import config_of, create_model
from ..models.spectral import names_of_bounded
from ..models.two_times import is_of_one_time, is_told_gap, told_both_times
from ..objectives import Objective
from ..objectives.arguments import check_sampler
from ..registry import is_code
from ..sampling import Sampling, chosen
from .checkpoint import (
    check_weights,
    cure_for_damage,
    list_checkpoints,
    load_metadata,
    load_shapes,
    load_tensors,
    load_weights,
    parted,
)
from .power_ema import PREFIX
from .snapshots import post_hoc
from .state import STATE, check_files, check_model, has_file, load_state, objective_for, saved_codec, saved_objective

CHUNK = 500  # images per network evaluation
_log = logging.getLogger("meanflow")


@dataclass(frozen=True)
class LoadedNetwork:
    """A network and what is needed to draw from it.

    net: in evaluation mode.
    objective: what it was trained with, which knows how to sample.
    class_names: one per label.
    step: optimiser steps it was trained for; None for a weight file.
    source: where it came from.
    codec: turns what it makes into images.
    """

    net: nn.Module
    objective: Objective
    class_names: tuple[str, ...]
    step: int | None
    source: Path
    codec: Codec = field(default_factory=Pixels)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network makes."""
        config = config_of(self.net)
        return config["in_channels"], config["input_size"], config["input_size"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its images."""
        if hasattr(self.codec, "image_shape"):
            return self.codec.image_shape(self.latent_shape)
        with torch.device("meta"):
            return tuple(self.codec.decode(torch.empty(1, *self.latent_shape)).shape[1:])  # type: ignore[return-value]

    def sampling(self, **options: Any) -> Sampling:
        """How images are drawn, with other values for some of its options: `sampler`, the name of another, and its own.

        Raises:
            UsageError: there is no such sampler or option, or a value is out of its range.
        """
        sampling: Sampling = chosen(self.objective.sampling, **options)
        check_sampler(self.objective, sampling)
        return sampling

    def with_autoencoder(self, pretrained: str) -> LoadedNetwork:
        """The same with its autoencoder loaded from another place; other weights than it was trained with are refused.

        Raises:
            UsageError: it was trained without one.
        """
        if not isinstance(self.codec, Autoencoder):
            raise UsageError(f"expected only with a network of latents; {self.source} makes pixels", field="codec")
        return replace(self, codec=replace(self.codec, pretrained=absolute_if_there(pretrained), subfolder=""))

    @torch.no_grad()
    def generate(self, labels: Tensor, *, seed: int = 0, device: torch.device | str = "cpu", **options: Any) -> Tensor:
        """Images of the given labels; all that is random depends on `seed` alone, not on the device.

        Args:
            labels: (n,) integer labels.
            device: where the network is.
            options: of the objective's sampling, such as steps=, where they are others than its own; sampler= names
                another one, which starts from its own defaults.

        Returns:
            (n, C, H, W) float32 on the CPU, not cut to [-1, 1].

        Raises:
            UsageError: the backend that was asked for cannot serve the network.
        """
        generator = generator_for(seed, Stream.SAMPLES)
        noise = torch.randn(len(labels), *self.latent_shape, generator=generator)
        sampling = self.sampling(**options)
        images = []
        for z, y in zip(noise.split(CHUNK), labels.split(CHUNK), strict=True):
            try:
                z, y = z.to(device), y.to(device)
                drawn = self.objective.generate(self.net, z, y, sampling, generator=generator)  # [CHUNK, C, H, W]
                x = self.codec.decode(drawn)  # [CHUNK, C, H, W]
            except NotImplementedError as error:
                raise UsageError(f"this network cannot be served: {error}", field="backend") from error
            images.append(x.float().cpu())
        return torch.cat(images)


def load_network(
    source: Path, weights: str = "ema", device: str = "cpu", *, trust_code: Trust = False
) -> LoadedNetwork:
    """The network of a run folder (its newest checkpoint), of one checkpoint folder, or of a safetensors file.

    Args:
        source: the folder or file.
        weights: "ema", averaged ones; "raw", those of the last step; a decay of `ema_decays`, such as "0.999"; or
            an average of any length, such as "power:0.07", of the snapshots of a run with `power_ema`.
        device: where to put it.
        trust_code: whether a function "package.module:function" that the file names as its network's may be imported
            and called; or the name of the one that may, or names of those that may. It runs as any code of yours.

    Raises:
        UsageError: there is none, it is damaged, or names a function that is not trusted; the message says which.
    """
    if not source.is_file():
        return _of_checkpoint(source, weights, device, trust_code)
    if weights != "ema":
        raise UsageError(
            f"{source} holds one set of weights; a run or a checkpoint has ema and raw ones", field="weights"
        )
    metadata = load_metadata(source)
    if "model" not in metadata:
        raise UsageError(f"{source}: expected a weight file written by `meanflow convert`, which names its model")
    try:
        model = parse_json(metadata["model"])
        check_model("model", model)
    except ValueError as error:
        raise UsageError(
            f"{source}: its metadata names no model ({error}); convert it anew with `meanflow convert`"
        ) from error
    net = _network(model, load_tensors(source), source, trust_code)
    return LoadedNetwork(
        net.to(device).eval(),
        objective=objective_for(net),
        class_names=tuple(str(label) for label in range(model["config"]["num_classes"])),
        step=None,
        source=source,
    )


def _of_checkpoint(folder: Path, weights: str, device: str, trust_code: Trust) -> LoadedNetwork:
    path = find_checkpoint(folder)
    source = path / f"{'model' if weights == 'raw' else 'ema'}.safetensors"
    further = path / "averages.safetensors"
    averages: dict[str, dict[str, Tensor]] = {}
    try:
        state = load_state(path, "model", "objective", "class_names")
        check_files(path, state, [source.name])
        tensors = load_tensors(source)
        if weights not in ("ema", "raw") and has_file(path, state, further.name):
            check_files(path, state, [further.name])
            averages = parted(load_tensors(further))
    except UsageError as error:
        cure = "" if path == folder else cure_for_damage(path.parent, path)
        raise UsageError(f"{error}{cure}") from error
    check_code(words_in(state), source, trust_code)
    if weights not in ("ema", "raw"):
        if weights.startswith(PREFIX):
            averages = {weights: post_hoc(path, state, averages, weights)}
        decay = _decay(weights)
        if decay not in averages:
            raise UsageError(
                f"{path} has {', '.join(('ema', 'raw', *averages))}; expected one of them, got {weights}",
                field="weights",
            )
        source, tensors = further, tensors | averages[decay]  # buffers are not averaged
    return LoadedNetwork(
        _network(state["model"], tensors, source, trust_code).to(device).eval(),
        saved_objective(state),
        tuple(state["class_names"]),
        state["step"],
        source,
        saved_codec(state),
    )


def _decay(text: str) -> str:
    """A decay as the averages of a checkpoint are named."""
    try:
        return str(float(text))
    except ValueError:
        return text


def _network(model: Mapping[str, Any], weights: Mapping[str, Tensor], source: Path, trust_code: Trust) -> nn.Module:
    """The network that a file names, with its weights."""
    name, config = model["name"], model["config"]
    check_code([name], source, trust_code)
    _check_sizes(model, weights, source)
    with _building(source):
        net = create_model(name, **config)
    load_weights(net, weights, source)
    return net


def _check_sizes(model: Mapping[str, Any], weights: Mapping[str, Tensor], source: Path) -> None:
    """Raise where a registered model has other sizes than its weights; takes no memory, however large they are."""
    name, config = model["name"], model["config"]
    if is_code(name):
        return
    with _building(source):
        blocks = max(config.get("depth", 0), config.get("aux_head_depth", 0))
        if blocks > len(weights):
            raise ValueError(f"depth: expected no more than there are tensors, {len(weights)}, got {shown(blocks)}")
        with torch.device("meta"):
            draft = create_model(name, **config)
        check_weights(draft.state_dict(), weights, source)


@contextmanager
def _building(source: Path) -> Iterator[None]:
    """Errors of a network's own as a UsageError."""
    try:
        yield
    except UsageError:
        raise
    # RuntimeError, OverflowError: sizes that no tensor has
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
        raise UsageError(f"{source}: cannot build its model: {reason(error)}") from error


def check_resumed(path: Path, sizes: Mapping[str, Any]) -> None:
    """Raise before a network of these sizes is built to go on from the checkpoint `path` where its own differ."""
    try:
        model = load_state(path, "model")["model"]
        _check_sizes(model, load_shapes(path / "model.safetensors"), path)
    except UsageError as error:
        raise UsageError(f"{error}{cure_for_damage(path.parent, path)}") from error
    for name, value in sizes.items():
        before = model["config"].get(name, False if name == "spectral_norm" else value)
        if before != value:
            raise UsageError(f"{path} holds another model's weights: expected {before}, got {value}", field=name)


def load_initial_weights(
    net: nn.Module, source: Path, *, codec: Codec | None = None, trust_code: Trust = False
) -> None:
    """Start `net` from the weights of a run folder (averages of its newest checkpoint), of a checkpoint, or of a file.

    Where they were trained at r = t alone, by flow matching for instance, and `net` is told both times, it is the same
    network at every r to begin with (see `told_both_times`).

    Args:
        codec: what `net` is to train on; that the weights were trained on what another one makes is said.

    Raises:
        UsageError: there are none, they are damaged or of another network, or were trained with code that is not
            trusted.
    """
    path = source if source.is_file() else find_checkpoint(source) / "ema.safetensors"
    weights, folder = load_tensors(path), path.parent
    one_time = is_of_one_time(weights)
    if (folder / STATE).is_file():
        state = load_state(folder, "objective")
        check_files(folder, state, [path.name])
        check_code(words_in({"objective": state["objective"]}), folder, trust_code)
        one_time = one_time or not saved_objective(state).two_times
        if codec is not None and identity_of(saved_codec(state)) != identity_of(codec):
            _log.warning("init: %s was trained on what %s makes of images, not %s", path, saved_codec(state), codec)
    if one_time and not is_told_gap(net) and not is_told_gap(weights):
        _log.warning(
            "init: %s was trained at r = t alone, and %s has no r_embedder that could start silent: at r < t it is as "
            "its weights have it",
            path,
            type(net).__name__,
        )
    weights = names_of_bounded(weights, net)
    load_weights(net, told_both_times(weights, net) if one_time else weights, path)


def source_of(text: str) -> Path:
    """A run folder, checkpoint or file at that path, or else the run of that name under runs/."""
    path = Path(text)
    there = path.is_file() or (path / "checkpoints").is_dir() or (path / "state.json").is_file()
    return RUNS / text if not there and (RUNS / text).is_dir() else path


def find_checkpoint(source: Path) -> Path:
    """The checkpoint folder that `source` is, or the newest one of the run folder that it is.

    Raises:
        UsageError: there is none.
    """
    if (source / "state.json").is_file():
        return source
    found = list_checkpoints(source / "checkpoints")
    if not found:
        what = "has no checkpoint yet" if source.is_dir() else "does not exist"
        raise UsageError(f"{source} {what}; expected a run folder such as runs/digits, a checkpoint, or a weight file")
    return found[-1]
