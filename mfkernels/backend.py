"""Dispatch: which backend serves which call.

In this order: the requested backend (`use_backend`, or the environment variable MFKERNELS_BACKEND); on CUDA tensors the
fastest backend that supports the call; else `reference`, plain PyTorch, which on CUDA is logged once per op. A request
that a backend cannot serve raises `BackendError`, which says what is supported; there is no silent fallback.

A request is a backend ("triton"), or one for a single op ("attention=cuda"), or several with commas between them
("triton,attention=cuda"). Attention's backward is chosen separately: "attention_backward=cudnn".
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch

# The backends of each op other than the reference, fastest first; and those of each part of an op that is requested by
# a name of its own (a request for all ops does not apply to it). Filled where the ops are declared.
OPS: dict[str, tuple[str, ...]] = {}
PARTS: dict[str, tuple[str, ...]] = {}
_RULES: dict[str, tuple[str, ...]] = {}

MAX_WIDTH = 16384  # of a row that one block of a row-wise kernel holds in registers

# For one call: None when the backend can serve it, else the reason why not ("head dim 7: expected …").
Support = Callable[[], str | None]

_log = logging.getLogger("mfkernels")
_warned: set[str] = set()  # ops already warned about

# A plain global, not a context variable: autograd runs backward on threads of its own, and Dynamo guards on globals.
_requested: str | None = os.environ.get("MFKERNELS_BACKEND") or None


class BackendError(NotImplementedError):
    """A requested backend cannot serve a call.

    Attributes:
        op: the op, or the part of one, by the name that requests use.
        backend: the requested backend.
        reason: why it cannot serve the call.
    """

    # no __init__ of its own: Dynamo does not trace one, and would hide the message

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def op(self) -> str:
        return str(self.args[1])

    @property
    def backend(self) -> str:
        return str(self.args[2])

    @property
    def reason(self) -> str:
        return str(self.args[3])


def register(op: str, backends: Iterable[str]) -> None:
    """Declare an op that requests may name, and its backends other than the reference."""
    OPS[op] = tuple(backends)


def register_part(part: str, names: Iterable[str], rules: Iterable[str] = ()) -> None:
    """Declare a part of an op that requests may name, its backends, and rules that select one of them at each call."""
    PARTS[part], _RULES[part] = tuple(names), tuple(rules)


def backends() -> tuple[str, ...]:
    """Every backend that some op has."""
    return ("reference", *dict.fromkeys(name for names in OPS.values() for name in names))


_F = TypeVar("_F", bound=Callable[..., Any])


def _cached_in_eager(run: _F) -> _F:
    """`functools.cache`, bypassed under a compiler: Dynamo warns about cached functions and traces through them."""
    cached = functools.cache(run)

    @functools.wraps(run)
    def call(*args: Any) -> Any:
        return run(*args) if torch.compiler.is_compiling() else cached(*args)

    return call  # type: ignore[return-value]


def _triton_missing() -> str | None:
    """Looked up, not imported: importing this package stays cheap and quiet."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'triton>=3.4'"
    for name in ("triton", "pytorch-triton"):
        with suppress(PackageNotFoundError):
            found = version(name)
            if tuple(map(int, re.findall(r"\d+", found)[:2])) < (3, 4):
                return f"expected Triton 3.4 or newer, found {found}"
    return None


_NO_TRITON = _triton_missing()
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@_cached_in_eager
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def triton_unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device` in this process, and what to do about it; None where they can."""
    if _NO_TRITON is not None:
        return _NO_TRITON
    if device.type == "cuda":
        major, minor = capability(device)
        return None if major >= 8 else f"device: expected compute capability 8.0 or newer, got {major}.{minor}"
    if device.type == "cpu" and _INTERPRETED:
        return None
    return f"device: expected a CUDA device (on the CPU: TRITON_INTERPRET=1 set before Python starts), got {device}"


def triton_unsupported(**tensors: torch.Tensor | None) -> str | None:
    """Why Triton kernels cannot serve the device or a dtype of these arguments; None where they can."""
    given = {name: x for name, x in tensors.items() if x is not None}
    reason = triton_unavailable(next(iter(given.values())).device)
    for name, x in given.items():
        if reason is None and x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            reason = f"{name}: expected float16, bfloat16 or float32, got {x.dtype}"
    return reason


def rows_unsupported(**tensors: torch.Tensor | None) -> str | None:
    """Why the row-wise Triton kernels (rowwise.py) cannot serve these arguments; None where they can."""
    reason = triton_unsupported(**tensors)
    for name, x in tensors.items():
        if reason is None and x is not None and not 1 <= x.shape[-1] <= MAX_WIDTH:
            reason = f"{name}: expected a width from 1 to {MAX_WIDTH}, got {x.shape[-1]}"
    return reason


@_cached_in_eager
def _parsed(request: str | None, source: str) -> Mapping[str, str]:
    """The requested backends by op; "" stands for every op that the request does not name."""
    wanted: dict[str, str] = {}
    for part in (request or "").split(","):
        op, _, name = part.strip().rpartition("=")
        if op in PARTS:
            names = (*PARTS[op], *_RULES[op])
            if name not in names:
                raise ValueError(f"{source}: {op} has the backends {', '.join(names)}, got {name!r}")
            wanted[op] = name
            continue
        if request and name not in backends():
            raise ValueError(f"{source}: expected one of {', '.join(backends())}, got {name!r}")
        if op and op not in OPS:
            expected = ", ".join((*OPS, *PARTS))
            raise ValueError(f"{source}: expected one of the ops {expected} before '=', got {op!r}")
        if op and name not in ("reference", *OPS[op]):
            raise ValueError(f"{source}: {op} has the backends {', '.join(('reference', *OPS[op]))}, got {name!r}")
        if name:
            wanted[op] = name
    return wanted


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Serve every call of the block (in all threads) by one backend.

    Args:
        name: "reference", "triton", "cuda" or "cublaslt"; "attention=cuda" or "mlp=cublaslt" for one op;
            "attention_backward=" and one of triton, cudnn, flash, flash-attn-2, flash-attn-3 and flash-attn-4, or
            by-length for the one that is expected to be fastest, for the backward of attention's triton and cuda
            forwards; several with commas between them; None restores the automatic choice. The choice made when an op's
            forward is called holds for its backward too; a checkpoint calls the forward again in the backward, so that
            has to be in the block as well.

    Raises:
        ValueError: the name is unknown. Inside the block: `BackendError` by calls that this backend cannot serve.
    """
    global _requested
    before = _requested
    _parsed(name, "name")
    _requested = name
    try:
        yield
    finally:
        _requested = before


def dispatch_state() -> tuple[str | None, bool]:
    """The global state that `choose` depends on: part of every cache key."""
    return _requested, _INTERPRETED


def requested_backend(op: str = "") -> str | None:
    """The requested backend (of this op), or None for the automatic choice."""
    wanted = _parsed(_requested, "MFKERNELS_BACKEND")
    return wanted.get(op, wanted.get(""))


def requested_part(part: str) -> str | None:
    """The requested backend or rule of a part of an op (see `PARTS`), or None."""
    return _parsed(_requested, "MFKERNELS_BACKEND").get(part) if _requested else None


# The backend of each op, while `recorded_choices` is open.
_record: dict[str, str] | None = None


@contextmanager
def recorded_choices() -> Iterator[dict[str, str]]:
    """The backend that served each op of the block, and each of its parts, by name."""
    global _record
    before, _record = _record, {}
    try:
        yield _record
    finally:
        _record = before


def choose(op: str, device: torch.device, supports: Mapping[str, Support], *, opt_in: Collection[str] = ()) -> str:
    """The backend that serves this call of `op`.

    Args:
        op: the op's name, for messages.
        device: where the op's tensors are.
        supports: the op's backends other than "reference", fastest first, each with its answer for this call.
        opt_in: those of them that serve only calls which request them by name.

    Raises:
        BackendError: the requested backend cannot serve this call.
    """
    return recorded(op, _choose(op, device, supports, opt_in))


def recorded(op: str, backend: str) -> str:
    """`backend`, recorded for `recorded_choices` as the one that serves this op or part of one."""
    if _record is not None:
        _record[op] = backend
    return backend


def _choose(op: str, device: torch.device, supports: Mapping[str, Support], opt_in: Collection[str]) -> str:
    requested = requested_backend(op)
    if requested == "reference":
        return "reference"
    if requested is not None:
        if requested not in supports:
            has = ", ".join(["reference", *supports])
            missing = f"no {requested} backend (it has: {has}), which use_backend or MFKERNELS_BACKEND asked for"
            raise BackendError(f"{op}: {missing}", op, requested, missing)
        why_not = supports[requested]()
        if why_not is not None:
            message = f"{op}: the {requested} backend cannot serve this call: {why_not}"
            raise BackendError(message, op, requested, why_not)
        return requested
    if device.type == "cuda":
        reasons = []
        for name, why in supports.items():
            if name not in opt_in:
                reason = why()
                if reason is None:
                    return name
                reasons.append(f"{name}: {reason}")
        if not torch.compiler.is_compiling():
            _warn_once(op, reasons)
    return "reference"


def _warn_once(op: str, reasons: list[str]) -> None:
    if op not in _warned:
        _warned.add(op)
        _log.warning("%s runs on plain PyTorch, which is slower on a GPU (%s)", op, "; ".join(reasons))
