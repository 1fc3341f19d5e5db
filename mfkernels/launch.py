"""Launch configurations from a table, and the launch itself. Every Triton op of the library goes through here.

The table is a list of rows, each `{"op": ..., <conditions>, "config": {...}}`. Of the conditions, `arch` ("sm_90"),
`triton` ("3.6"), `dtype` and `precision` (of the products of float32 operands: "ieee" or "tf32") must equal the
request or be a list that holds it, and the request's `<size>` must not lie above `max_<size>` or below `min_<size>`. A
condition that a row leaves out holds for everything, so the shortest row of an op is its safe default. Of the rows that
hold, one that names the arch goes before one that does not; then the one with the tightest sizes wins, then the one
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

PACKAGE = Path(__file__).parent
EXACT = ("arch", "triton", "dtype", "precision")

# Triton 3.9 warns where it has to choose this itself, and 3.10 is to choose the other: a·b + c in two instructions.
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
    """The rows of a table; none where the file does not exist; ValueError naming the file where it is not one."""
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
    """The row that holds for the request and fits it most tightly, by the rule above."""

    def holds(row: Row) -> bool:
        named = [(row[key], request.get(key)) for key in EXACT if key in row]
        sizes = [(key[:4], row[key], request.get(key[4:])) for key in row if key.startswith(("max_", "min_"))]
        return (
            row["op"] == request["op"]
            and all(asked == value or (isinstance(value, list) and asked in value) for value, asked in named)
            and all(
                isinstance(asked, int) and (asked <= bound if end == "max_" else asked >= bound)
                for end, bound, asked in sizes
            )
        )

    def rank(row: Row) -> tuple[float, ...]:
        sizes = [row.get(f"max_{key}", math.inf) for key in request if key not in EXACT and key != "op"]
        return ("arch" not in row, *sizes, -sum(key in row for key in EXACT))

    return min(filter(holds, rows), key=rank, default=None)


def triton_minor() -> str:
    return ".".join(triton.__version__.split(".")[:2])


def shipped() -> list[Row]:
    """The package's own rows: each op's lie in its folder, those of what ops share beside this file."""
    return [
        row for path in (PACKAGE / "launch.json", *sorted(PACKAGE.glob("*/launch.json"))) for row in read_table(path)
    ]


@functools.cache
def _rows() -> list[Row]:
    return read_table(user_table()) + shipped()


@functools.cache
def _lookup(request: tuple[tuple[str, str | int], ...]) -> Config:
    row = best_row(_rows(), dict(request))
    if row is None:
        raise LookupError(f"no launch configuration for {dict(request)} in {PACKAGE}/*/launch.json")
    return row["config"]


_cleared_too: list[Callable[[], None]] = []


def on_clear(clear: Callable[[], None]) -> None:
    """Have `clear` called by `clear_cache`."""
    _cleared_too.append(clear)


def clear_cache() -> None:
    """Forget the tables read so far (they are read once a process)."""
    _rows.cache_clear()
    _lookup.cache_clear()
    _config.cache_clear()
    for clear in _cleared_too:
        clear()


@functools.cache
def _arch(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 0 for the interpreter, where the size of a chunk does not matter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


BLOCKS_A_MULTIPROCESSOR, LEAST_CHUNK = 8, 8


def with_fitting_chunk(config: Config, device: torch.device, blocks: int, length: int) -> Config:
    """`config` with a CHUNK, at most its own, of which about eight chunks come to a multiprocessor.

    Longer chunks leave a small batch on few multiprocessors; shorter ones write more partial sums than they must.

    Args:
        blocks: launched for each chunk of `length` rows (samples, or blocks of columns).
        length: what chunks are cut from.
    """
    chunks = BLOCKS_A_MULTIPROCESSOR * multiprocessors(device)
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
    """Every launch of `op` within takes `config` instead of the tables': how the tuner compares candidates."""
    _forced[op] = config
    try:
        yield
    finally:
        del _forced[op]


def launch_config(
    op: str, device: torch.device, dtype: torch.dtype, *, precision: str | None = None, **sizes: int
) -> Config:
    """Block sizes, warps and stages for one call; on any device but CUDA (the interpreter) the arch is "cpu".

    `precision` is asked for by ops whose products of float32 operands may be "ieee" or "tf32".
    """
    if op in _forced:
        return _forced[op]
    return _config(op, device, dtype, precision, tuple(sizes.items()))


@functools.lru_cache(maxsize=1024)
def _config(
    op: str, device: torch.device, dtype: torch.dtype, precision: str | None, sizes: tuple[tuple[str, int], ...]
) -> Config:
    arch = _arch(device) if device.type == "cuda" else "cpu"
    return find_config(op, arch, dtype, precision=precision, **dict(sizes))


def find_config(op: str, arch: str, dtype: torch.dtype, *, precision: str | None = None, **sizes: int) -> Config:
    """The same for an architecture by name."""
    exact = {"op": op, "arch": arch, "triton": triton_minor(), "dtype": str(dtype).removeprefix("torch.")}
    if precision is not None:
        exact["precision"] = precision
    return _lookup((*exact.items(), *sizes.items()))


@dataclass(frozen=True)
class Launch:
    """A kernel and all it is called with: the same object is run, compiled ahead of time and tuned."""

    kernel: Any
    grid: Callable[[Config], tuple[int, ...]]
    config: Config
    device: torch.device
    arguments: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        kernel: Any,
        grid: Callable[[Config], tuple[int, ...]],
        config: Config,
        device: torch.device,
        /,
        **arguments: Any,
    ) -> Launch:
        return cls(kernel, grid, config, device, arguments)

    def values(self) -> list[Any]:
        """What the kernel is called with, in its order."""
        bound = {**self.arguments, **self.config}
        return [bound[name] for name in self.kernel.arg_names]

    def run(self) -> None:
        with on_device(self.device):
            compiled = self.kernel[self.grid(self.config)](**self.arguments, **self.config, **OPTIONS)
        record = getattr(_recording, "launches", None)
        if record is not None:
            record.append((self, compiled))  # None in the interpreter


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where a launch to `device` may be made; the interpreter's tensors are on the CPU."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


_HERE = contextlib.nullcontext()
_recording = threading.local()


@contextlib.contextmanager
def recorded(launches: list[tuple[Launch, Any]]) -> Iterator[None]:
    """Put each launch of the block in this thread into `launches`, with the kernel that Triton compiled for it."""
    before, _recording.launches = getattr(_recording, "launches", None), launches
    try:
        yield
    finally:
        _recording.launches = before


def started(start: Callable[..., None], arguments: list[Any]) -> None:
    """A launch that has been made before, with other addresses (see plan.py)."""
    start(*arguments)


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉; Triton's own takes ten times as long."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
