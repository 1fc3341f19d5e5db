"""Networks by name: this package's, registered ones, and other people's by the name of a function that makes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from mfkernels import dualize

from .. import registry
from ..errors import UsageError
from .spectral import spectral_norm_linears

_CONTRACT = (
    "a function of input_size=, in_channels=, num_classes= (and of every size given beside the name) that returns a "
    "torch.nn.Module with forward(z, r, t, y)"
)


def create_model(name: str, *, spectral_norm: bool = False, **config: Any) -> nn.Module:
    """A backbone by name, with any of its sizes changed, or a network of yours.

    "DiT-B/2" (sizes S, B, M, L, XL; patches 2, 4, 8), "iMF-DiT-B/2" (sizes B, M, L, XL), or "DiT", "iMF-DiT", "MLP" and
    the baselines "Affine" and "LowRank" with every size given; whatever else is registered; or
    "package.module:function", which is looked for in the working directory first.

    `config` holds input_size (side of the square images), in_channels and num_classes, and the sizes given beside the
    name. A network that is not this package's has a forward that takes z (B, C, H, W), r and t (B,) in [0, 1] and
    labels y (B,), where num_classes means "no label", and returns the average velocity (B, C, H, W). It is dualized
    unless it is dual-aware already, and gets the attribute `num_classes` if it has none.

    With `spectral_norm` the weight of every linear outside of embedders has no singular value above 1, see
    `spectral_norm_linears`; `config_of` has it then.

    Raises:
        ValueError: there is no model of that name, or what it makes is no such network.
    """
    net = _made(name, config)
    if spectral_norm:
        spectral_norm_linears(net)
        net.__dict__["factory_config"] = {**config_of(net), "spectral_norm": True}
    return net


def _made(name: str, config: dict[str, Any]) -> nn.Module:
    if ":" not in name:
        net: nn.Module = registry.find("models", name)(**config)
        return net if hasattr(net, "config") else _adopted(net, name, config)
    with registry.working_directory_first():  # what the function itself imports as well
        function = _function(name)
        _check_takes(function, name, config)
        net = function(**config)
    return _adopted(net, name, config)


def _adopted(net: Any, name: str, config: dict[str, Any]) -> nn.Module:
    """Somebody's network as one of ours, which remembers what it was made of."""
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
    if not registry.is_code(name):
        raise ValueError(f'name: expected "package.module:function", got {name!r}')
    try:
        found: Any = registry.find("models", name)
    except UsageError as error:
        raise ValueError(f"name: {error.message}; expected {_CONTRACT}") from error
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
