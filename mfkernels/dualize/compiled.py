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
        return type(x)([_encoded(v) for v in x]) if type(x) in (list, tuple) else [_encoded(v) for v in x]
    return x


def _decoded(x: Any) -> Any:
    if isinstance(x, dict):
        if _NONE in x:
            return None
        if _DUAL in x:
            return Dual(*x[_DUAL])
        return {k: _decoded(v) for k, v in x.items()}
    if type(x) in (list, tuple):
        return type(x)([_decoded(v) for v in x])
    return x


def holds_dual(x: Any) -> bool:
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return isinstance(x, Dual) or any(map(holds_dual, parts))


def settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """(submodule, attribute) of the numbers, flags and words that a forward may read, `training` among them."""
    return tuple(
        (path, name)
        for path, part in module.named_modules()
        for name, value in part.__dict__.items()
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_")
    )


def loose_tensors(module: nn.Module) -> tuple[tuple[str, str, Any], ...]:
    """(submodule, attribute, key in it or None) of the tensors that are neither parameters nor buffers.

    Tables of positions are often kept so. Dynamo hands parameters and buffers over with the module; these it must be
    told of, or the graph would have them as constants, which no backward can be traced through.
    """
    found: list[tuple[str, str, Any]] = []
    for path, part in module.named_modules():
        for name, value in part.__dict__.items():
            if name.startswith("_"):
                continue
            items = value.items() if type(value) is dict else enumerate(value) if type(value) is list else ()
            found += [(path, name, None)] if isinstance(value, Tensor) else []
            found += [(path, name, key) for key, x in items if isinstance(x, Tensor)]
    return tuple(found)


def _get(module: nn.Module, path: str, name: str, key: Any) -> Any:
    value = getattr(module.get_submodule(path), name)
    return value if key is None else value[key]


def _set(module: nn.Module, x: Any, path: str, name: str, key: Any) -> None:
    part = module.get_submodule(path)
    if key is None:
        part.__dict__[name] = x
    else:
        part.__dict__[name][key] = x


def _run(module: Any, watched: Any, loose: Any, args: Any, kwargs: Any) -> Any:
    from .op import dual_call  # it imports this module

    places = [*module.loose_tensors, *((path, name, None) for path, name in module.settings)]
    before = [_get(module, *place) for place in places]
    buffers = dict(module.named_buffers())
    for place, x in zip(places, (*loose, *watched), strict=True):
        _set(module, x, *place)
    try:
        out = _encoded(dual_call(module, tuple(_decoded(args)), _decoded(kwargs)))
    finally:
        for place, x in zip(places, before, strict=True):
            _set(module, x, *place)
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
    loose = [_get(module, path, name, key) for path, name, key in module.loose_tensors]
    # what is read here makes Dynamo compile anew when it changes, or is an input of the graph: numbers like 0.5
    watched = [_get(module, path, name, None) for path, name in module.settings]
    return _decoded(_traced(module, watched, loose, _encoded(args), _encoded(kwargs)))
