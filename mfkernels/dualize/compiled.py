"""A dual pass inside a compiled region.

Dynamo does not follow the pass: it puts one call into its graph, and AOTAutograd traces the operations that the pass
executes, primal and tangent, so that the compiler sees a flat graph of both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import _torch
from ..dual import Dual

# what crosses the call is made of lists, dicts and tensors alone: no named tuples, no None
_DUAL, _NONE = "mfkernels.Dual", "mfkernels.None"


def _encoded(x: Any) -> Any:
    if isinstance(x, Dual):
        return {_DUAL: [x.primal] if x.tangent is None else [x.primal, x.tangent]}
    if x is None:
        return {_NONE: []}
    if isinstance(x, dict):
        return {k: _encoded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        parts = [_encoded(v) for v in x]
        return tuple(parts) if type(x) is tuple else parts
    return x


def _decoded(x: Any) -> Any:
    if isinstance(x, dict):
        if _NONE in x:
            return None
        return Dual(*x[_DUAL]) if _DUAL in x else {k: _decoded(v) for k, v in x.items()}
    return type(x)([_decoded(v) for v in x]) if type(x) in (list, tuple) else x


def holds_dual(x: Any) -> bool:
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return isinstance(x, Dual) or any(map(holds_dual, parts))


Place = tuple[str, str, Any]  # submodule, attribute, key in it or None


def places(module: nn.Module) -> tuple[Place, ...]:
    """Where a forward may find what Dynamo does not hand over with the module, as it does parameters and buffers.

    Tensors, alone or in a list or dict, as tables of positions often are: the graph would have them as constants, which
    no backward can be traced through. Numbers, flags and words, `training` among them: read before the call, they make
    Dynamo compile anew when they change, or are inputs of the graph.
    """
    found: list[Place] = []
    for path, part in module.named_modules():
        for name, value in part.__dict__.items():
            if not name.startswith("_"):
                items = value.items() if type(value) is dict else enumerate(value) if type(value) is list else ()
                found += [(path, name, None)] if isinstance(value, (Tensor, bool, int, float, str)) else []
                found += [(path, name, key) for key, x in items if isinstance(x, Tensor)]
    return tuple(found)


def _holds(module: nn.Module, place: Place) -> bool:
    """Whether it is still there."""
    path, name, key = place
    value = getattr(module.get_submodule(path), name, None)
    if key is None:
        return value is not None
    return key in value if isinstance(value, dict) else isinstance(value, list) and key < len(value)


def _get(module: nn.Module, place: Place) -> Any:
    path, name, key = place
    value = getattr(module.get_submodule(path), name)
    return value if key is None else value[key]


def _set(module: nn.Module, places: list[Place], values: list[Any]) -> None:
    for (path, name, key), x in zip(places, values, strict=True):
        table = module.get_submodule(path).__dict__
        if key is None:
            table[name] = x
        else:
            table[name][key] = x


def _run(module: Any, held: list[int], values: Any, args: Any, kwargs: Any) -> Any:
    from .op import dual_call  # it imports this module

    places = [module._dualized_places[i] for i in held]
    before, buffers = [_get(module, place) for place in places], dict(module.named_buffers())
    _set(module, places, values)
    try:
        out = _encoded(dual_call(module, tuple(_decoded(args)), _decoded(kwargs)))
    finally:
        _set(module, places, before)
    assigned = [name for name, x in module.named_buffers() if buffers.get(name) is not x]
    if assigned:
        raise NotImplementedError(
            f"dualize: the forward assigns the buffer {assigned[0]}, which a compiled graph would not do again; write "
            "into it in place (copy_)"
        )
    return out


_traced: Any = None


def prepare() -> None:
    """Before the first compilation, which cannot do it itself; not at import, for Dynamo takes a second to load."""
    global _traced
    if _traced is None:
        _traced = _torch.nonstrict_trace(_run)


def call_compiled(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    held = [i for i, place in enumerate(module._dualized_places) if _holds(module, place)]
    values = [_get(module, module._dualized_places[i]) for i in held]
    return _decoded(_traced(module, held, values, _encoded(args), _encoded(kwargs)))
