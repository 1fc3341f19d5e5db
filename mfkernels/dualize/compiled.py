"""A dual pass inside a compiled region.

Dynamo does not follow the pass: it puts one call into its graph, and AOTAutograd traces the operations that the pass
executes, primal and tangent, so that the compiler sees a flat graph of both.
"""

from __future__ import annotations

from typing import Any

import torch

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


def _run(module: Any, args: Any, kwargs: Any) -> Any:
    from .op import dual_call

    return _encoded(dual_call(module, tuple(_decoded(args)), _decoded(kwargs)))


_nonstrict_trace = getattr(torch._dynamo, "nonstrict_trace", None)
_traced = None if _nonstrict_trace is None else _nonstrict_trace(_run)


def call_compiled(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _traced is None:
        raise NotImplementedError(
            f"dualize: torch.compile of a dualized module needs torch 2.7 or newer, got {torch.__version__}"
        )
    return _decoded(_traced(module, _encoded(args), _encoded(kwargs)))
