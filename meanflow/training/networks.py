"""The networks beside the one in training: the averaged copy that makes targets, and pretrained teachers.

Their parameters are fixed in a step, and they are in evaluation mode. Each process holds what it holds of the network
in training: a copy, or a shard (FSDP2).
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from .. import registry
from ..checks import check_takes
from ..codecs import identity_of
from ..config import Config, Trust
from ..data import ImageData
from ..errors import NetworkError, UsageError
from ..models import config_of
from ..objectives import LinearPath, Networks, Objective
from .network import LoadedNetwork, find_checkpoint, load_network, source_of
from .parallel import checkpoint_blocks, in_bfloat16, place_network, transformer_blocks
from .state import checksum

TEACHERS = {"frozen": "teacher", "weak": "weak_teacher"}  # an objective's word for a teacher, and the option of a run


def networks_beside(
    config: Config, data: ImageData, model: nn.Module, accelerator: Accelerator, trust_code: Trust = False
) -> Networks:
    """What the objective evaluates beside `model`, on the run's device and in its precision.

    Args:
        model: the network in training, with its first weights, and not on the device yet.
        trust_code: as of `load_network`.

    Raises:
        UsageError: a teacher is missing, not needed, damaged, or of other images or classes than the data.
    """
    objective = config.objective
    learned = objective.learned_module()
    for role, field in TEACHERS.items():
        name = config.values()["objective"]
        if role in objective.teachers and getattr(config.run, field) is None:
            raise UsageError(
                f"{name} learns from a pretrained network: expected a run, a checkpoint or a weight file", field=field
            )
        if role not in objective.teachers and getattr(config.run, field) is not None:
            raise UsageError(
                f"expected only with an objective that learns from one, and {name} does not{_hint(role, objective)}; "
                f"got {getattr(config.run, field)}",
                field=field,
            )
    target = None if objective.target_decay(0) is None else _target(config, data, model, accelerator)
    teachers = {}
    for role in objective.teachers:
        loaded = _teacher(config, data, TEACHERS[role], trust_code)
        if config.run.precision == "bf16-weights":
            in_bfloat16(loaded.net)
        fixed(loaded.net, config, accelerator)
        teachers[role] = loaded.objective.sampled(loaded.net)
    return Networks(ema=target, learned=learned, **teachers)


def _hint(role: str, objective: Objective) -> str:
    """What would learn from a teacher, in words."""
    if role != "frozen":
        return ""
    if objective.taught:
        return "".join(f" unless {option} is {value}" for option, value in objective.taught.items())
    found = registry.available("objectives")
    others = [name for name, cls in found if issubclass(cls, type(objective)) and cls().teachers]
    return f" (its like with a teacher: {', '.join(others)})" if others else ""


def checksums_of_teachers(config: Config) -> dict[str, str]:
    """Checksums of the files that the weights of a run's teachers come from, by option."""
    found = {}
    for field in TEACHERS.values():
        if getattr(config.run, field) is not None:
            source = source_of(getattr(config.run, field))
            found[field] = checksum(source if source.is_file() else find_checkpoint(source) / "ema.safetensors")
    return found


def _target(config: Config, data: ImageData, model: nn.Module, accelerator: Accelerator) -> nn.Module:
    if config.run.precision == "bf16-weights":
        raise UsageError(
            f"bf16-weights keeps no float32 weights, and {config.values()['objective']} makes targets by an average of "
            "the network, which would lose its updates in bfloat16; expected bf16 or no",
            field="precision",
        )
    target = config.network(data)
    target.load_state_dict(model.state_dict())
    fixed(target, config, accelerator)
    return target


def _teacher(config: Config, data: ImageData, field: str, trust_code: Trust) -> LoadedNetwork:
    """A pretrained network, if it fits the data."""
    try:
        loaded = load_network(source_of(getattr(config.run, field)), trust_code=trust_code)
        if loaded.step is not None:  # a weight file has no names of classes
            data.check_classes(loaded.class_names, loaded.source)
        if loaded.objective.outputs != ("u",):
            raise UsageError(
                f"{loaded.source} returns ({', '.join(loaded.objective.outputs)}); expected a network u(z, r, t, y)"
            )
        if not loaded.objective.instantaneous:
            raise UsageError(
                f"{loaded.source} was trained for jumps alone; expected a network whose u(z, t, t) is a velocity, "
                "such as one of flow_matching or meanflow"
            )
        if type(loaded.objective.path) is not LinearPath:
            raise UsageError(
                f"{loaded.source} was trained on another path, {type(loaded.objective.path).__name__}; expected the "
                "linear one, without a bridge"
            )
        if loaded.step is not None and identity_of(loaded.codec) != identity_of(config.codec):
            raise UsageError(
                f"{loaded.source} was trained on what {loaded.codec} makes of images; expected {config.codec}"
            )
        check_takes(loaded.net, "y")
    except (UsageError, NetworkError) as error:
        raise UsageError(str(error), field=field) from error
    shape = config.codec.latent_shape(data.image_shape)
    for name, expected, got in (
        ("images of shape", tuple(shape), loaded.latent_shape),
        ("classes:", data.num_classes, config_of(loaded.net)["num_classes"]),
    ):
        if expected != got:
            raise UsageError(f"{loaded.source} is of {name} {got}; expected {expected}, as of {data.name}", field=field)
    return loaded


def fixed(net: nn.Module, config: Config, accelerator: Accelerator) -> None:
    """Make a network one that is evaluated only, in place."""
    net.requires_grad_(False).eval()
    blocks, count = len(transformer_blocks(net)), config.run.checkpoint_blocks
    # of use where a gradient passes through the network to its input
    checkpoint_blocks(net, min(blocks, count if isinstance(count, int) else blocks))
    place_network(net, config, accelerator)
