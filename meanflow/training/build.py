"""The objects that a configuration names."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..data import ImageData
from ..errors import UsageError
from ..models import create_model
from ..objectives import FlowMatching, ImprovedMeanFlow, LogitNormal, MeanFlow, TimeSampler, Uniform
from .config import TrainConfig


def model_sizes(config: TrainConfig) -> dict[str, Any]:
    """The sizes of the network that were given beside its name."""
    sizes: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("hidden_size", "depth", "num_heads", "patch_size", "aux_head_depth")
        if getattr(config, name) is not None
    }
    if config.prefix_tokens is not None:
        names = ("num_class_tokens", "num_time_tokens", "num_cfg_tokens", "num_interval_tokens")
        sizes.update(zip(names, config.prefix_tokens, strict=True))
    return sizes


def build_model(config: TrainConfig, data: ImageData) -> nn.Module:
    """The network for this data, with fresh weights.

    Raises:
        UsageError: the sizes do not fit each other.
    """
    if config.model.startswith("iMF-DiT") != (config.objective == "imf"):
        raise UsageError(
            "objective: imf trains an iMF-DiT (such as --model iMF-DiT-B/2), and no other objective does; got "
            f"objective {config.objective} with model {config.model}"
        )
    try:
        return create_model(
            config.model,
            input_size=data.image_size,
            in_channels=data.channels,
            num_classes=data.num_classes,
            **model_sizes(config),
        )
    except (TypeError, ValueError) as error:  # TypeError: a size that this model does not have
        raise UsageError(f"model: {config.model} cannot be built for {data.name}: {error}") from error


def build_objective(config: TrainConfig) -> MeanFlow | ImprovedMeanFlow | FlowMatching:
    """The training objective.

    Raises:
        UsageError: a value is out of its range.
    """
    plain = config.objective == "flow_matching"
    mean = (0.0 if plain else -0.4) if config.time_mean is None else config.time_mean
    norm_p = (0.0 if plain else 1.0) if config.norm_p is None else config.norm_p
    ratio = (0.5 if config.objective == "imf" else 0.25) if config.ratio is None else config.ratio
    try:
        times: TimeSampler = Uniform() if config.time_sampler == "uniform" else LogitNormal(mean, config.time_std)
        if plain:
            return FlowMatching(
                label_dropout=config.label_dropout, norm_p=norm_p, norm_eps=config.norm_eps, time_sampler=times
            )
        if config.objective == "imf":
            return ImprovedMeanFlow(
                ratio=ratio,
                cfg_beta=config.cfg_beta,
                omega_max=config.omega_max,
                label_dropout=config.label_dropout,
                norm_p=norm_p,
                norm_eps=config.norm_eps,
                time_sampler=times,
            )
        return MeanFlow(
            ratio=ratio,
            omega=config.omega,
            kappa=config.kappa,
            guidance_interval=config.guidance_interval,
            label_dropout=config.label_dropout,
            norm_p=norm_p,
            norm_eps=config.norm_eps,
            time_sampler=times,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
