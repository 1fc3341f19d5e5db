"""Other people's networks, by the name of a function that makes them."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mfkernels import dualize

_CONTRACT = (
    "a function of input_size=, in_channels=, num_classes= (and of every size given beside the name) that returns a "
    "torch.nn.Module with forward(z, r, t, y)"
)


def is_factory(name: str) -> bool:
    """Whether `name` is of the form "package.module:function"."""
    return ":" in name


def model_from_factory(name: str, config: dict[str, Any]) -> nn.Module:
    """The network that `package.module:function` makes of `config`, dualized unless it is dual-aware already.

    The module is looked for in the working directory first. `config` holds input_size (side of the square images),
    in_channels and num_classes, and the sizes given beside the name. The network's forward takes z (B, C, H, W), r and
    t (B,) in [0, 1] and labels y (B,), where num_classes means "no label", and returns the average velocity
    (B, C, H, W). It gets the attribute `num_classes` if it has none.

    Raises:
        ValueError: the name leads to no such function, or what it returns is no such network.
    """
    with _working_directory_first():  # what the function itself imports as well
        function = _function(name)
        _check_takes(function, name, config)
        net = function(**config)
    if not isinstance(net, nn.Module):
        raise ValueError(f"name: expected {name} to return a torch.nn.Module, got {type(net).__name__}")
    try:
        inspect.signature(net.forward).bind(*"zrty")
    except TypeError as error:
        raise ValueError(
            f"name: expected {name} to return a network with forward(z, r, t, y), got "
            f"{type(net).__name__}.forward{inspect.signature(net.forward)}: {error}"
        ) from error
    net = dualize(net)
    if "num_classes" in config:
        own = getattr(net, "num_classes", None)
        if isinstance(own, int) and own != config["num_classes"]:
            raise ValueError(
                f'name: the network of {name} has num_classes = {own}, which would be its label for "no label"; '
                f"expected {config['num_classes']}, or no such attribute"
            )
        net.__dict__["num_classes"] = config["num_classes"]
    net.__dict__["factory_config"] = dict(config)
    return net


def config_of(net: nn.Module) -> dict[str, Any]:
    """What the network was made of: `create_model(name, **config_of(net))` makes another."""
    made_of = net.__dict__.get("factory_config")
    return dict(getattr(net, "config", {}) if made_of is None else made_of)


def _function(name: str) -> Callable[..., Any]:
    module_name, _, function = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *function.split("."))):
        raise ValueError(f'name: expected "package.module:function", got {name!r}')
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"name: cannot import {module_name} of {name!r}: {error}") from error
    for part in function.split("."):
        if not hasattr(found, part):
            raise ValueError(f"name: {module_name} has no {function!r}; expected {_CONTRACT}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"name: {name} is a {type(found).__name__}; expected {_CONTRACT}")
    return found


def _check_takes(function: Callable[..., Any], name: str, config: dict[str, Any]) -> None:
    """Raise before the call where `function` does not take the sizes."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:  # of code that is not Python
        raise ValueError(f"name: {name} does not say what it takes ({error}); expected {_CONTRACT}") from error
    try:
        signature.bind(**config)
    except TypeError as error:
        raise ValueError(f"name: {name}{signature} does not take {', '.join(config)}: {error}") from error


@contextmanager
def _working_directory_first() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)  # the first of them; what was imported may have put its own before it
