"""The jobs of `python -m mfkernels.check` on this machine, and the outcome of each case."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ..attention import backward, cuda
from ..backend import OPS, PARTS, triton_unavailable, use_backend
from ..mlp import cublaslt
from ..timing import busy_time
from .case import FLOOR, Case, cases_of, timed_case
from .processes import DeviceLostError, first_line

# In eps, the bound where plain PyTorch gives none: float64, whose formula is the oracle itself, and what it cannot run.
FIXED = 16.0

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# ------------------------------------------------------------------------------------------- what this machine can run


@dataclass(frozen=True)
class Backend:
    """name: in the table. request: for `use_backend`. poison: whether `torch.empty` gives NaN while it runs."""

    name: str
    request: str
    poison: bool


def this_device() -> torch.device:
    """The current CUDA device; the CPU where there is none, or where TRITON_INTERPRET=1 asks for the interpreter."""
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def missing_backward(name: str, device: torch.device) -> str | None:
    """Why this backward of attention serves no call on the device; None where it serves one."""
    reasons = []
    for dtype in (torch.float16, torch.float32):
        q = torch.empty((2, 100, 2, 64), device=device, dtype=dtype)  # [B, N, H, d]
        reasons.append(backward.unsupported(name, q, q, causal=False))
    return None if None in reasons else reasons[0]


@functools.cache
def missing(device: torch.device) -> dict[str, str]:
    """The backends that this machine does not have, and why."""
    reasons = {
        "triton": triton_unavailable(device),
        "cuda": cuda.unavailable(device),
        "cublaslt": cublaslt.unavailable(device),
    }
    for name in PARTS["attention_backward"]:
        reasons[f"backward {name}"] = missing_backward(name, device)
    return {name: reason for name, reason in reasons.items() if reason is not None}


def backends(op: str, device: torch.device) -> list[Backend]:
    """The backends of the op that this machine has."""
    found = [Backend("reference", "reference", poison=False)]
    own_backward = ",attention_backward=triton" if op == "attention" else ""
    for name in OPS[op]:
        if name not in missing(device):
            found.append(Backend(name, name + own_backward, poison=True))
    if op == "attention" and "triton" not in missing(device):
        for name in PARTS["attention_backward"]:
            if name != "triton" and f"backward {name}" not in missing(device):
                found.append(Backend(f"triton, backward {name}", f"triton,attention_backward={name}", poison=False))
    return found


def may_refuse(op: str, backend: str, dtype: str, device: str) -> bool:
    """Whether this backend is documented not to serve some calls; any other `BackendError` is a failure."""
    if backend == "cublaslt":
        return True  # float32 and sizes that 8 does not divide
    if op != "attention":
        return False
    if ", backward " in backend:
        return True  # other packages' kernels, which have limits of their own and serve on request only
    if backend == "cuda":
        return dtype == "float32"
    return backend == "triton" and dtype == "bfloat16" and device == "cpu"  # the interpreter's products are wrong there


# ------------------------------------------------------------------------------------------------- one process's work


@dataclass(frozen=True)
class Job:
    """Cases of one op, backend, dtype and part; or, `timed`, the timings of that row of the table."""

    op: str
    backend: Backend
    dtype: str
    device: str
    part: str = ""
    timed: bool = False


@dataclass(frozen=True)
class Outcome:
    """Of one case with one number of tangent rows: (error, bound) by quantity; or why there are none."""

    case: str
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    failure: str = ""
    not_served: str = ""
    note: str = ""


@dataclass(frozen=True)
class Timed:
    """Microseconds by the name of what was timed."""

    case: str
    microseconds: dict[str, float]


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """`torch.empty` gives NaN, so that an element which a kernel does not write is an error."""
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def run_job(job: Job) -> Iterator[Outcome | Timed]:
    """The results of a job, one at a time.

    Raises:
        DeviceLostError: the rest of the job cannot be run.
    """
    if job.timed:
        yield timing(job)
        return
    for case in cases_of(job.op, job.device, job.part):
        for rows, batch in case.rows():
            outcome = check_case(job, case, rows, f"{case.size}, {rows} of {batch} rows")
            yield outcome
            if outcome.failure and job.device != "cpu":
                try:
                    torch.cuda.synchronize()
                except RuntimeError as error:
                    raise DeviceLostError("the GPU refuses to go on after this error; the rest was not run") from error


def check_case(job: Job, case: Case, rows: int, name: str) -> Outcome:
    """One case's errors, and the bounds that plain PyTorch's give."""
    dtype, device = DTYPES[job.dtype], torch.device(job.device)
    try:
        with use_backend(job.backend.request), poisoned_empty() if job.backend.poison else contextlib.nullcontext():
            ours = case.errors(rows, dtype, device, plain=False)
    except Exception as error:
        return failed(job, name, error)
    plain, note = {}, ""
    if dtype != torch.float64:
        try:
            plain = case.errors(rows, dtype, device, plain=True)
        except RuntimeError as error:
            note = f"bounds of {FIXED:g} eps, because plain PyTorch cannot run this: {first_line(error)}"
    eps = torch.finfo(dtype).eps
    floor = FLOOR * eps + case.noise * min(eps, torch.finfo(torch.float32).eps)
    bounds = {quantity: 2 * plain.get(quantity, math.inf) + floor for quantity in ours}
    infinite = [quantity for quantity, bound in bounds.items() if not math.isfinite(bound)]
    if plain and infinite:
        note = f"bounds of {FIXED:g} eps for {', '.join(infinite)}, because plain PyTorch's are not finite"
    bounds |= dict.fromkeys(infinite, FIXED * eps)
    errors = {quantity: (error, bounds[quantity]) for quantity, error in ours.items()}
    wrong = [
        f"{quantity}: error {e:.2g}, bound {bound:.2g}" for quantity, (e, bound) in errors.items() if not e <= bound
    ]
    return Outcome(name, errors, failure="; ".join(wrong), note=note)


def failed(job: Job, name: str, error: Exception) -> Outcome:
    """A failure, unless it is one of the documented limits."""
    if isinstance(error, NotImplementedError) and may_refuse(job.op, job.backend.name, job.dtype, job.device):
        return Outcome(name, not_served=str(error).strip().splitlines()[0])
    return Outcome(name, failure=first_line(error))


def timing(job: Job) -> Outcome | Timed:
    """Microseconds of one row at a realistic size."""
    case = timed_case(job.op, torch.device(job.device))
    name = f"timing, {case.size}"
    try:
        with use_backend(job.backend.request):
            calls = case.calls(DTYPES[job.dtype], torch.device(job.device))
            ours = {what: _microseconds(getattr(calls, what)) for what in ("dual_forward", "forward_backward")}
    except Exception as error:
        return failed(job, name, error)
    return Timed(name, {**ours, **_plain_timing(job.op, job.dtype, job.device)})


@functools.cache
def _plain_timing(op: str, dtype: str, device: str) -> dict[str, float]:
    calls = timed_case(op, torch.device(device)).calls(DTYPES[dtype], torch.device(device))
    with contextlib.suppress(RuntimeError):  # out of memory, or not implemented in this dtype: no figure
        return {what: _microseconds(getattr(calls, what)) for what in ("plain_jvp", "plain_forward_backward")}
    return {}


def _microseconds(fn: Callable[[], object]) -> float:
    return 1e6 * busy_time(fn, milliseconds=2.0, rounds=3).seconds
