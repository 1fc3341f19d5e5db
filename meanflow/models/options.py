"""Options of a network: the sizes that its constructor takes beside those that the data give."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import MISSING, dataclass
from functools import cache, partial
from typing import Any, ClassVar, get_type_hints

from torch import nn

from .. import registry
from ..errors import UsageError
from ..options import Options, option
from .factory import create_model

OF_DATA = ("input_size", "in_channels", "num_classes")
_SIMPLE = {int: "int", float: "float", bool: "bool", str: "str"}


@dataclass(frozen=True)
class ModelOptions(Options):
    """Sizes of a network whose others the data give; `model_options` makes a subclass for each name.

    name: of the model.
    outputs: what the network returns, such as ("u",); None: not known before it runs.

    Args:
        spectral_norm: scale each linear of the network, embedders apart, so that no singular value is above 1
    """

    spectral_norm: bool = False
    name: ClassVar[str] = ""
    outputs: ClassVar[tuple[str, ...] | None] = None

    def sizes(self) -> dict[str, Any]:
        """What `create_model` takes beside the data's sizes; of "package.module:function" what was given."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def build(self, *, input_size: int, in_channels: int, num_classes: int, source: str) -> nn.Module:
        """The network for images of this side and these channels, with fresh weights.

        Args:
            source: where the images are from, for messages.

        Raises:
            UsageError: the sizes do not fit each other.
        """
        given: dict[str, Any] = {"input_size": input_size, "in_channels": in_channels, "num_classes": num_classes}
        try:
            return create_model(self.name, **given, **self.sizes())
        except (TypeError, ValueError) as error:  # TypeError: a size that this model does not have
            raise UsageError(f"{self.name} cannot be built for {source}: {error}", field="model") from error


@cache
def model_options(name: str) -> type[ModelOptions]:
    """The options of a model: the sizes that its constructor takes, with its defaults.

    Of a function "package.module:function", which is not imported for that: every size that a registered model has.

    Raises:
        UsageError: there is no model of that name.
    """
    if registry.is_code(name):
        every = {field.name: field for _, fields in registry.available("models", _fields) for field in fields}
        sizes = [(field.name, f"{field.type} | None", _sized(field.name, None)) for field in every.values()]
        return _made(name, sizes, None, "A network of yours.")
    make = registry.find("models", name)
    cls = make.func if isinstance(make, partial) else make
    outputs = getattr(cls, "outputs", ("u",)) if isinstance(cls, type) else None
    return _made(name, [(field.name, field.type, field) for field in _fields(name)], outputs, cls.__doc__)


def _made(name: str, fields: list[Any], outputs: tuple[str, ...] | None, doc: str | None) -> type[ModelOptions]:
    namespace = {"name": name, "outputs": outputs, "__doc__": doc, "__module__": __name__}
    return dataclasses.make_dataclass(
        "ModelOptions", fields, bases=(ModelOptions,), namespace=namespace, frozen=True, kw_only=True
    )


def _fields(name: str) -> list[dataclasses.Field[Any]]:
    make = registry.find("models", name)
    cls = make.func if isinstance(make, partial) else make
    hints = get_type_hints(getattr(cls, "__init__") if isinstance(cls, type) else cls)  # noqa: B009
    fields = []
    for parameter in inspect.signature(make).parameters.values():
        kind = hints.get(parameter.name)
        if parameter.name in (*OF_DATA, *getattr(cls, "not_options", ())) or kind not in _SIMPLE:
            continue
        field = _sized(parameter.name, MISSING if parameter.default is parameter.empty else parameter.default)
        field.name, field.type = parameter.name, _SIMPLE[kind]
        fields.append(field)
    return fields


def _sized(name: str, default: Any) -> Any:
    """A size; more than so large would be a slip that takes all memory before anything is said."""
    whole = default is None or (isinstance(default, int) and not isinstance(default, bool))
    return option(default, low=1, high=10_000 if "depth" in name else 2**20) if whole else option(default)


def default_model() -> ModelOptions:
    """DiT-S/4."""
    return model_options("DiT-S/4")()
