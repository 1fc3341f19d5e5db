"""Which backend serves which call.

In this order: what the caller asked for (`use_backend`, or the environment variable MFKERNELS_BACKEND); on CUDA tensors
the fastest backend that supports the call; else `reference`, plain PyTorch, which on CUDA is logged once an op. A
request that a backend cannot serve is an error that says what is supported, never a silent detour.

A request is a backend ("triton"), or one for a single op ("attention=cuda"), or several with commas between them
("triton,attention=cuda"). Attention's backward is chosen by itself: "attention_backward=cudnn".
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

# What each op that has a choice has beside the reference, fastest first, and the parts of ops that are chosen under a
# name of their own, of which a request for every op says nothing. Both are filled where the ops are declared.
OPS: dict[str, tuple[str, ...]] = {}
PARTS: dict[str, tuple[str, ...]] = {}
_RULES: dict[str, tuple[str, ...]] = {}

MAX_WIDTH = 16384  # of a row that one block of a row-wise kernel holds in registers

# Answers for one call: None when the backend can serve it, else why it cannot ("head dim 7: expected …").
Support = Callable[[], str | None]

_log = logging.getLogger("mfkernels")
_said: set[str] = set()  # ops whose slower way has been told

# A plain global, not a context variable: autograd runs backward on threads of its own, and Dynamo guards on globals.
_requested: str | None = os.environ.get("MFKERNELS_BACKEND") or None


def register(op: str, backends: Iterable[str]) -> None:
    """Let requests name this op, which has these backends beside the reference."""
    OPS[op] = tuple(backends)


def register_part(part: str, names: Iterable[str], rules: Iterable[str] = ()) -> None:
    """Let requests name this part of an op; a rule may be asked for in place of a name, and gives one at each call."""
    PARTS[part], _RULES[part] = tuple(names), tuple(rules)


def backends() -> tuple[str, ...]:
    """All that an op has."""
    return ("reference", *dict.fromkeys(name for names in OPS.values() for name in names))


_F = TypeVar("_F", bound=Callable[..., Any])


def _remembered(run: _F) -> _F:
    """`functools.cache` in eager alone: Dynamo warns of one, and looks through it."""
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


@_remembered
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


def unsupported_dtype(name: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot serve `dtype`; None where they can."""
    if dtype in (torch.float16, torch.bfloat16, torch.float32):
        return None
    return f"{name}: expected float16, bfloat16 or float32, got {dtype}"


def rows_unsupported(**tensors: torch.Tensor | None) -> str | None:
    """Why the row-wise Triton kernels (rowwise.py) cannot serve these arguments, by name; None where they can."""
    given = {name: x for name, x in tensors.items() if x is not None}
    reason = triton_unavailable(next(iter(given.values())).device)
    for name, x in given.items():
        reason = reason or unsupported_dtype(name, x.dtype)
        if reason is None and not 1 <= x.shape[-1] <= MAX_WIDTH:
            reason = f"{name}: expected a width from 1 to {MAX_WIDTH}, got {x.shape[-1]}"
    return reason


@_remembered
def _parsed(request: str | None, source: str) -> Mapping[str, str]:
    """Backends by op; "" is every op that the request does not name."""
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
            by-length for the one that is expected to be fastest, for the backward of attention that its triton and cuda
            forwards have; several with commas between them; None restores the automatic choice. What holds when an op's
            forward is called holds for its backward too; a checkpoint calls the forward again in the backward, so that
            has to be in the block as well.

    Raises:
        ValueError: the name is unknown. Inside the block: `NotImplementedError` by ops that this backend does not have.
    """
    global _requested
    before = _requested
    _parsed(name, "name")
    _requested = name
    try:
        yield
    finally:
        _requested = before


def circumstances() -> tuple[str | None, bool]:
    """All that `choose` looks at beside a call's own arguments."""
    return _requested, _INTERPRETED


def requested_backend(op: str = "") -> str | None:
    """The backend that the caller asked for (for this op), or None for the automatic choice."""
    wanted = _parsed(_requested, "MFKERNELS_BACKEND")
    return wanted.get(op, wanted.get(""))


def requested_part(name: str) -> str | None:
    """What the caller asked for by this name of `PARTS`, or None."""
    return _parsed(_requested, "MFKERNELS_BACKEND").get(name) if _requested else None


# What `choose` answered, by op, while `recorded_choices` is open.
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


def choose(op: str, device: torch.device, supports: Mapping[str, Support], *, on_request: Collection[str] = ()) -> str:
    """The backend that serves this call of `op`.

    Args:
        op: the op's name, for messages.
        device: where the op's tensors are.
        supports: the op's backends other than "reference", fastest first, each with its answer for this call. An op
            that has none (a library GEMM serves every backend) does not ask.
        on_request: those of them that serve only calls which ask for them by name.

    Raises:
        NotImplementedError: the requested backend does not serve this call.
    """
    return recorded(op, _choose(op, device, supports, on_request))


def recorded(op: str, backend: str) -> str:
    """`backend`, which `recorded_choices` will tell for this op or part of one."""
    if _record is not None:
        _record[op] = backend
    return backend


def _choose(op: str, device: torch.device, supports: Mapping[str, Support], on_request: Collection[str]) -> str:
    asked = requested_backend(op)
    if asked == "reference":
        return "reference"
    if asked is not None:
        if asked not in supports:
            has = ", ".join(["reference", *supports])
            raise NotImplementedError(
                f"{op}: no {asked} backend (it has: {has}), which use_backend or MFKERNELS_BACKEND asked for"
            )
        why_not = supports[asked]()
        if why_not is not None:
            raise NotImplementedError(f"{op}: the {asked} backend cannot serve this call: {why_not}")
        return asked
    if device.type == "cuda":
        reasons = []
        for name, why in supports.items():
            if name not in on_request:
                reason = why()
                if reason is None:
                    return name
                reasons.append(f"{name}: {reason}")
        if not torch.compiler.is_compiling():
            _say_once(op, reasons)
    return "reference"


def _say_once(op: str, reasons: list[str]) -> None:
    if op not in _said:
        _said.add(op)
        _log.warning("%s runs on plain PyTorch, which is slower on a GPU (%s)", op, "; ".join(reasons))
