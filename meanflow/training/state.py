"""state.json of a checkpoint: what it may hold, and the checksums of the files beside it.

A checksum is the CRC-32 of a file. It finds what disks and copies do: any changed bit, any burst of 32 of them, other
damage with a chance of 1 − 2⁻³². It takes 0.4 s per GiB, where BLAKE2 takes 1.7 and SHA-256 3. It does not stop
anybody who changes a file and its checksum. Checkpoints without checksums load as well.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .. import registry
from ..codecs import Codec
from ..config import Config, merged, words_in
from ..errors import UsageError
from ..files import checksum, is_number, parse_json, read_text, shown
from ..models.options import model_options
from ..objectives import Objective
from ..options import flattened

FORMAT = 2
READ = (1, 2)  # 1: an objective is a word, and its sampling options are beside it as guidance
STATE = "state.json"
_CHECKSUMS = "checksums"
_LARGEST = 2**31  # of a size; a step may be larger


def save_state(path: Path, state: Mapping[str, Any], checksums: Mapping[str, str]) -> None:
    """Write state.json into the folder `path` with the checksums of the files in it, and its own."""
    state = {"format": FORMAT, **state, _CHECKSUMS: dict(checksums)}
    state[_CHECKSUMS][STATE] = _own_checksum(state)
    (path / STATE).write_text(json.dumps(state, indent=2) + "\n")


def _own_checksum(state: Mapping[str, Any]) -> str:
    """Of what state.json says, without this checksum, however it is laid out."""
    others = {name: value for name, value in state[_CHECKSUMS].items() if name != STATE}
    words = json.dumps({**state, _CHECKSUMS: others}, sort_keys=True)
    return f"{zlib.crc32(words.encode()):08x}"


def check_files(path: Path, state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise a UsageError unless the files `names` of the checkpoint `path` are those that were saved with `state`."""
    sums = state.get(_CHECKSUMS, {})
    for name in names if sums else ():
        try:
            found = checksum(path / name)
        except OSError as error:
            raise UsageError(f"cannot read {path / name}: {error}") from error
        expected = sums.get(name, "(none)")
        if found != expected:
            raise UsageError(
                f"cannot read {path / name}: it is damaged: expected the checksum {expected} of {STATE}, got {found}"
            )


def has_file(path: Path, state: Mapping[str, Any], name: str) -> bool:
    """Whether the file `name` was saved in the checkpoint `path` with `state`."""
    return name in state[_CHECKSUMS] if _CHECKSUMS in state else (path / name).exists()


def load_state(path: Path, *names: str) -> dict[str, Any]:
    """state.json of a checkpoint, which has these names besides step and format.

    Raises:
        UsageError: there is no checkpoint that this version can read, or a value is none that a run saves.
    """
    try:
        state = parse_json(read_text(path / STATE))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a checkpoint: cannot read its state.json: {error}") from error
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if type(found) is not int or found not in READ:
        raise UsageError(f"{path}: expected a checkpoint of format {FORMAT}, got {shown(found)}")
    missing = [name for name in ("step", *names) if name not in state]
    if missing:
        raise UsageError(f"{path} is not a checkpoint: its state.json lacks {', '.join(missing)}")
    unknown = [name for name in state if name not in ("format", _CHECKSUMS, *_CHECKS)]
    if unknown:  # a damaged name of the checksums would be one
        raise UsageError(f"{path / STATE}: expected {', '.join(_CHECKS)} and {_CHECKSUMS}, got {shown(unknown[0])}")
    try:
        if _CHECKSUMS in state:
            _check_checksums(state)
        for name, check in _CHECKS.items():
            if name in state:
                check(name, state[name])
        if "model" in state:
            _check_together(state)
    except ValueError as error:  # a UsageError is one
        raise UsageError(f"{path / STATE}: {error}") from error
    return state


def check_model(name: str, model: Any) -> None:
    """Raise a ValueError unless `model` is a model's name and sizes, such as a file may give."""
    if (
        not isinstance(model, dict)
        or not isinstance(model.get("name"), str)
        or not isinstance(model.get("config"), dict)
    ):
        raise ValueError(f"{name}: expected a name and a config, got {shown(model)}")
    config = dict(model["config"])
    bounded = config.pop("spectral_norm", True)  # left out where it is not
    if bounded is not True:
        raise ValueError(f"{name}.config.spectral_norm: expected true, got {shown(bounded)}")
    for key in ("input_size", "in_channels", "num_classes"):
        _check_whole(f"{name}.config.{key}", config.get(key), 1, _LARGEST)
    if config["in_channels"] * config["input_size"] ** 2 >= _LARGEST:
        raise ValueError(f"{name}.config.input_size: expected images of less than 2**31 values, got {shown(config)}")
    if registry.is_code(model["name"]):
        return
    try:
        sizes = inspect.signature(registry.find("models", model["name"])).parameters
    except UsageError as error:
        raise ValueError(f"{name}.name: {error.message}") from error
    for key, value in config.items():
        if key not in sizes:
            raise ValueError(f"{name}.config: expected {', '.join(sizes)}, got {shown(key)}")
        kind = sizes[key].annotation
        kind = kind if isinstance(kind, str) else getattr(kind, "__name__", "")  # "int", "float" or "bool"
        if not (is_number(value) if kind == "float" else type(value).__name__ == kind):
            raise ValueError(f"{name}.config.{key}: expected {kind}, got {shown(value)}")


def check_number(name: str, value: Any, low: float) -> None:
    """Raise a ValueError unless `value` is a finite number that is not lower than `low`."""
    if not is_number(value) or not math.isfinite(value) or value < low:
        raise ValueError(f"{name}: expected a finite number of at least {low:g}, got {shown(value)}")


def _check_texts(name: str, value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{name}: expected checksums by name, got {shown(value)}")


def _check_snapshots(name: str, value: Any) -> None:
    _check_texts(name, value)
    for file in value:
        if not re.fullmatch(r"step_\d{8,18}\.safetensors", file):
            raise ValueError(f"{name}: expected names such as step_00001000.safetensors, got {shown(file)}")


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value < high:
        raise ValueError(f"{name}: expected an integer from {low} to {high - 1}, got {shown(value)}")


def _check_checksums(state: Mapping[str, Any]) -> None:
    sums = state[_CHECKSUMS]
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise ValueError(f"{_CHECKSUMS}: expected one by file name, got {shown(sums)}")
    if sums.get(STATE) != _own_checksum(state):
        raise ValueError(
            f"it was changed after it had been saved (its checksum is {_own_checksum(state)}, and it says "
            f"{shown(sums.get(STATE))}); if you changed it yourself, take {_CHECKSUMS} out of it"
        )


def _check_class_names(name: str, names: Any) -> None:
    if not isinstance(names, list) or not all(isinstance(word, str) for word in names) or len(set(names)) < len(names):
        raise ValueError(f"{name}: expected a list of different names, got {shown(names)}")


def _check_component(name: str, component: Any) -> None:
    """Raise unless `component` is a tree of options with a name."""
    if not isinstance(component, dict) or not isinstance(component.get("name"), str):
        raise ValueError(f"{name}: expected a name and its options, got {shown(component)}")


def _check_objective(name: str, objective: Any) -> None:
    if not isinstance(objective, str):
        _check_component(name, objective)


def _check_guidance(name: str, guidance: Any) -> None:
    if not isinstance(guidance, dict) or guidance.keys() not in (set(), {"omega", "t_min", "t_max"}):
        raise ValueError(f"{name}: expected omega, t_min and t_max, or nothing, got {shown(guidance)}")
    for key, value in guidance.items():
        check_number(f"{name}.{key}", value, 1.0 if key == "omega" else 0.0)


def _check_scaler(name: str, scaler: Any) -> None:
    if scaler is not None and not isinstance(scaler, dict):
        raise ValueError(f"{name}: expected numbers by name, or null, got {shown(scaler)}")
    for key, value in (scaler or {}).items():
        check_number(f"{name}.{key}", value, 0.0)


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "step": lambda name, step: _check_whole(name, step, 0, 2**63),
    "seconds": lambda name, seconds: check_number(name, seconds, 0.0),
    "model": check_model,
    "class_names": _check_class_names,
    "objective": _check_objective,
    "guidance": _check_guidance,
    "codec": _check_component,
    "scaler": _check_scaler,
    "teachers": _check_texts,
    "snapshots": _check_snapshots,
}


def _check_together(state: Mapping[str, Any]) -> None:
    """Raise unless classes, objective and codec fit the model. Components that are named as code are not checked."""
    name, config = state["model"]["name"], state["model"]["config"]
    if "class_names" in state and len(state["class_names"]) != config["num_classes"]:
        raise ValueError(
            f"class_names: expected {config['num_classes']}, num_classes of the model, got {len(state['class_names'])}"
        )
    if any(map(registry.is_code, words_in(state))):
        return
    if "codec" in state:
        saved_codec(state)
    if "objective" in state:
        outputs, objective = model_options(name).outputs, saved_objective(state)
        if outputs is not None and outputs != objective.outputs:
            raise ValueError(f"objective: expected one of a network that returns {', '.join(outputs)}, such as {name}")


def saved_objective(state: Mapping[str, Any]) -> Objective:
    """The objective that a checkpoint was trained with.

    Raises:
        UsageError: there is none of its name, or an option is none of its or out of its range.
    """
    values = flattened(Config, {"objective": state["objective"]})
    values |= {f"sample_{name}": value for name, value in state.get("guidance", {}).items()}
    return merged(Config(), {}, values).objective


def saved_codec(state: Mapping[str, Any]) -> Codec:
    """The codec that a checkpoint was trained with; pixels where it says nothing."""
    return merged(Config(), {}, flattened(Config, {"codec": state["codec"]} if "codec" in state else {})).codec


def objective_for(net: nn.Module) -> Objective:
    """An objective that samples from a network of which only the weights are known, without guidance of its own."""
    outputs = getattr(net, "outputs", ("u",))
    fitting = [name for name, objective in registry.available("objectives") if objective.outputs == outputs]
    fitting.sort(key=lambda name: name != "meanflow")
    if not fitting:
        raise UsageError(f"no objective is of a network that returns ({', '.join(outputs)})", field="objective")
    config = Config().replace(objective=fitting[0])
    return config.replace(sample_omega=1.0).objective if "sample_omega" in config.values() else config.objective


def check_scaler(saved: Mapping[str, float], own: Mapping[str, Any], path: Path) -> None:
    """Raise a UsageError unless the gradient scaler's state in the checkpoint `path` has the names of this run's."""
    if saved.keys() != own.keys():
        raise UsageError(f"{path / STATE}: scaler: expected {', '.join(own)}, got {', '.join(saved)}")
