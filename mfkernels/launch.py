"""Launch configurations from a table, and the launch itself. Every Triton op of the library goes through here.

The table is a list of rows, each `{"op": ..., <conditions>, "config": {...}}`. Of the conditions, `arch` ("sm_90"),
`triton` ("3.6"), `dtype` and `precision` (of the products of float32 operands: "ieee" or "tf32") must equal the
request or be a list that holds it, and the request's `<size>` must not lie above `max_<size>` or below `min_<size>`. A
condition that a row leaves out matches everything, so the shortest row of an op is its safe default. Of the rows that
match, one that names the arch goes before one that does not; then the one with the tightest sizes wins, then the one
that names more, then a row of the user's own table, which `python -m mfkernels.tune` writes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

PACKAGE = Path(__file__).parent
EXACT = ("arch", "triton", "dtype", "precision")

# Triton 3.9 warns where this is left to its default, which 3.10 changes: a·b + c would be two instructions.
OPTIONS = {"enable_fp_fusion": True}

Row = Mapping[str, Any]
Config = Mapping[str, int]


def user_table() -> Path:
    """Where `python -m mfkernels.tune` writes: $MFKERNELS_CACHE_DIR, else $XDG_CACHE_HOME/mfkernels, else ~/.cache."""
    own = os.environ.get("MFKERNELS_CACHE_DIR")
    if own:
        return Path(own) / "launch.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mfkernels" / "launch.json"


def read_table(path: Path) -> list[Row]:
    """The rows of a table; none where the file does not exist; ValueError where it is not a table."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it or run `python -m mfkernels.tune` again") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"op", "config"} <= row.keys() for row in rows):
        raise ValueError(f'{path} must be a list of {{"op": ..., "config": ...}}; delete it or tune again')
    return rows


def best_row(rows: Sequence[Row], request: Mapping[str, str | int]) -> Row | None:
    """The row that matches the request most tightly, by the rule above."""

    def matches(row: Row) -> bool:
        exact = [(row[key], request.get(key)) for key in EXACT if key in row]
        sizes = [(key[:4], row[key], request.get(key[4:])) for key in row if key.startswith(("max_", "min_"))]
        return (
            row["op"] == request["op"]
            and all(given == value or (isinstance(value, list) and given in value) for value, given in exact)
            and all(
                isinstance(given, int) and (given <= bound if end == "max_" else given >= bound)
                for end, bound, given in sizes
            )
        )

    def rank(row: Row) -> tuple[float, ...]:
        sizes = [row.get(f"max_{key}", math.inf) for key in request if key not in EXACT and key != "op"]
        return ("arch" not in row, *sizes, -sum(key in row for key in EXACT))

    return min(filter(matches, rows), key=rank, default=None)


def triton_minor() -> str:
    return ".".join(triton.__version__.split(".")[:2])


def shipped() -> list[Row]:
    """The package's own rows: an op's are in its folder, those of shared kernels beside this file."""
    tables = (PACKAGE / "launch.json", *sorted(PACKAGE.glob("*/launch.json")))
    return [row for table in tables for row in read_table(table)]


@functools.cache
def _rows() -> list[Row]:
    return read_table(user_table()) + shipped()


@functools.cache
def _lookup(request: tuple[tuple[str, str | int], ...]) -> Config:
    row = best_row(_rows(), dict(request))
    if row is None:
        raise LookupError(f"no launch configuration for {dict(request)} in {PACKAGE}/*/launch.json")
    return row["config"]


def clear_cache() -> None:
    """Read the tables again, which are read once per process, and record every plan again."""
    for clear in _clear_functions:
        clear()


@functools.cache
def arch_of(device: torch.device) -> str:
    """The architecture in launch tables, as "sm_90"; "cpu" for the interpreter."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a GPU; 0 for the interpreter, where the size of a chunk does not matter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


BLOCKS_PER_MULTIPROCESSOR, LEAST_CHUNK = 8, 8


def with_fitting_chunk(config: Config, device: torch.device, blocks: int, length: int) -> Config:
    """`config` with a CHUNK of at most its own size, so that each multiprocessor gets about eight chunks.

    Longer chunks leave a small batch on few multiprocessors; shorter ones write more partial sums than they must.

    Args:
        blocks: launched for each chunk (samples, or blocks of columns).
        length: the number of rows that are cut into chunks.
    """
    chunks = BLOCKS_PER_MULTIPROCESSOR * multiprocessors(device)
    if chunks == 0:
        return config
    fitting = 2 ** round(math.log2(max(blocks * length / chunks, 1)))
    least = max(LEAST_CHUNK, config.get("BLOCK_N", 1), config.get("BLOCK_M", 1))  # whole blocks
    return {**config, "CHUNK": min(config["CHUNK"], max(least, fitting))}


_forced: dict[str, Config] = {}


def any_forced() -> bool:
    return bool(_forced)


@contextlib.contextmanager
def forced_config(op: str, config: Config) -> Iterator[None]:
    """Every launch of `op` in the block takes `config` instead of the tables': how the tuner compares candidates."""
    _forced[op] = config
    try:
        yield
    finally:
        del _forced[op]


def launch_config(
    op: str, device: torch.device, dtype: torch.dtype, *, precision: str | None = None, **sizes: int
) -> Config:
    """Block sizes, warps and stages for one call; `precision` is "ieee" or "tf32" for products of float32 operands."""
    if op in _forced:
        return _forced[op]
    return _config(op, device, dtype, precision, tuple(sizes.items()))


@functools.lru_cache(maxsize=1024)
def _config(
    op: str, device: torch.device, dtype: torch.dtype, precision: str | None, sizes: tuple[tuple[str, int], ...]
) -> Config:
    return find_config(op, arch_of(device), dtype, precision=precision, **dict(sizes))


def find_config(op: str, arch: str, dtype: torch.dtype, *, precision: str | None = None, **sizes: int) -> Config:
    """The same for an architecture by name."""
    exact = {"op": op, "arch": arch, "triton": triton_minor(), "dtype": str(dtype).removeprefix("torch.")}
    if precision is not None:
        exact["precision"] = precision
    return _lookup((*exact.items(), *sizes.items()))


_clear_functions: list[Callable[[], None]] = [_rows.cache_clear, _lookup.cache_clear, _config.cache_clear]


def on_clear(clear: Callable[[], None]) -> None:
    """Have `clear` called by `clear_cache`."""
    _clear_functions.append(clear)


class Launch:
    """A kernel and its arguments: the same object is run, compiled ahead of time and tuned."""

    def __init__(
        self,
        kernel: Any,
        grid: Callable[[Config], tuple[int, ...]],
        config: Config,
        device: torch.device,
        /,
        **arguments: Any,
    ) -> None:
        self.kernel, self.grid, self.config, self.device, self.arguments = kernel, grid, config, device, arguments

    def values(self) -> list[Any]:
        """The kernel's arguments in the order of its parameters."""
        bound = {**self.arguments, **self.config}
        return [bound[name] for name in self.kernel.arg_names]

    def run(self) -> None:
        with on_device(self.device):
            compiled = self.kernel[self.grid(self.config)](**self.arguments, **self.config, **OPTIONS)
        record = getattr(_recording, "launches", None)
        if record is not None:
            record.append((self, compiled))  # None in the interpreter


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """`device` as the current CUDA device; nothing to do for the interpreter's CPU tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device(device)


_NO_CONTEXT = contextlib.nullcontext()
_recording = threading.local()


@contextlib.contextmanager
def recorded(launches: list[tuple[Launch, Any]]) -> Iterator[None]:
    """Put each launch of the block in this thread into `launches`, with the kernel that Triton compiled for it."""
    before, _recording.launches = getattr(_recording, "launches", None), launches
    try:
        yield
    finally:
        _recording.launches = before


def replay(start: Callable[..., None], arguments: list[Any]) -> None:
    """A recorded launch with new addresses (see plan.py)."""
    start(*arguments)


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉; Triton's own takes ten times as long."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
