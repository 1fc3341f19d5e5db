"""The shards/ of a checkpoint: tensors that are sharded over processes, each process's shards in a file of its own.

torch.distributed.checkpoint writes and reads them. Its index, shards/.metadata, is a pickle, which can run any code: an
unpickler here makes plain records of it, which are checked and given to PyTorch's reader. PyTorch reads the tensors
with `weights_only=True`.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ..errors import UsageError
from ..files import check_regular, reason, shown
from .state import check_files, checksum

T = TypeVar("T")
FOLDER = "shards"
OLDER = "shares"  # its name in older checkpoints
METADATA = ".metadata"
_LARGEST = 2**30  # bytes of .metadata: about 5 million shards
_DEEPEST = 10_000  # a list or dict counts one more for each thousand items
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


@dataclass(frozen=True)
class Place:
    """Where a shard is; the attributes that PyTorch's reader asks for."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


def folder_of(path: Path) -> Path | None:
    """The folder of shards in the checkpoint `path`; None where there is none."""
    return next((path / name for name in (FOLDER, OLDER) if (path / name).is_dir()), None)


def save_shards(path: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write tensors into the folder `path`, by all processes; returns the files' checksums.

    Each process reads back what it has written itself, which on a network file system it still has in memory.

    Raises:
        OSError: that cannot be done.
    """
    try:
        dcp.save(tensors, checkpoint_id=path)
    except CheckpointException as error:
        raise OSError(f"cannot write {path}: {_cause(error)}") from error
    rank, _ = _process()
    sums = dict(from_all([(file.name, checksum(file)) for file in path.glob(f"__{rank}_*")]))
    if rank == 0:  # the index, and what PyTorch may name otherwise
        sums |= {file.name: checksum(file) for file in path.iterdir() if file.name not in sums}
    return {f"{path.name}/{name}": value for name, value in sums.items()}


def _process() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def from_all(own: list[T]) -> list[T]:
    """The items of all processes, in each of them."""
    _, world = _process()
    if world == 1:
        return own
    lists: list[list[T]] = [[] for _ in range(world)]
    dist.all_gather_object(lists, own)
    return [item for items in lists for item in items]


def load_shards(path: Path, state: Mapping[str, Any], held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in a checkpoint's folder of shards, read by all processes.

    Args:
        path: the folder of shards.
        state: the checkpoint's state.json.
        held: tensors that are sharded over the processes; those of the same name and shape come back sharded alike.

    Raises:
        UsageError: they are missing or damaged.
    """
    metadata = _check_shards(path, state)
    tensors: dict[str, Any] = {}
    for key, saved in metadata.state_dict_metadata.items():
        assert isinstance(saved, TensorStorageMetadata)
        dtype = saved.properties.dtype
        if key in held and held[key].shape == saved.size and held[key].is_floating_point() == dtype.is_floating_point:
            tensors[key] = torch.empty_like(held[key])
        else:
            tensors[key] = torch.empty(saved.size, dtype=dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # a single process: that is meant
            dcp.load(tensors, storage_reader=_Reader(path, metadata))
    except CheckpointException as error:
        raise UsageError(f"cannot read {path}: {_cause(error)}") from error
    return tensors


def _check_shards(path: Path, state: Mapping[str, Any]) -> Metadata:
    """The index, if the files are those that were saved: each process reads some of them, and all raise alike."""
    check_files(path.parent, state, [f"{path.name}/{METADATA}"])
    metadata = read_metadata(path)
    rank, world = _process()
    damage = []
    try:
        check_files(path.parent, state, files_of(path, metadata)[rank::world])
    except UsageError as error:
        damage.append(str(error))
    for words in from_all(damage):
        raise UsageError(words)
    return metadata


def files_of(path: Path, metadata: Metadata) -> list[str]:
    """The files of the folder `path`, as the checksums name them."""
    return sorted({f"{path.name}/{place.relative_path}" for place in metadata.storage_data.values()})


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader with metadata that was read and checked before."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


def _cause(error: CheckpointException) -> str:
    """The first of the processes' errors, without its traceback."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"{reason(cause)} (process {rank})"


def read_metadata(path: Path) -> Metadata:
    """The index of the folder of shards `path`, without running any of it.

    Raises:
        UsageError: it is missing, damaged or no index of tensors, or the files are shorter than it says.
    """
    file = path / METADATA
    try:
        check_regular(file)
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"expected at most {_LARGEST} bytes, got {file.stat().st_size}")
        pickled = file.read_bytes()
        _check_nesting(pickled)
        return _metadata(_Unpickler(io.BytesIO(pickled)).load(), path)
    # a damaged pickle raises what it happens to run into
    except Exception as error:
        raise UsageError(f"cannot read {file}: {reason(error)}") from error


def _check_nesting(pickled: bytes) -> None:
    """Raise a ValueError where objects are so deep in each other that comparing them would end the process."""
    stack: list[Any] = []  # as the unpickler's: how deep each object is at most
    memo: dict[Any, int] = {}
    for opcode, argument, position in pickletools.genops(pickled):
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif "PUT" in opcode.name:
            memo[argument] = stack[-1]
        elif "GET" in opcode.name:
            stack.append(memo[argument])
        else:
            taken, before = [0], opcode.stack_before
            if pickletools.markobject in before:
                while stack[-1] is not None:
                    taken.append(stack.pop())
                stack.pop()
                before = before[: before.index(pickletools.markobject)]
            taken += [stack.pop() for _ in before]
            if max(taken) > _DEEPEST:
                raise ValueError(f"expected at most {_DEEPEST} objects in each other, got more at byte {position}")
            stack += [None if kind is pickletools.markobject else max(taken) + 1 for kind in opcode.stack_after]


class _Record:
    """A pickled object: its class by name, and its state."""

    state: Any = None

    def __new__(cls, *ignored: Any) -> _Record:
        return super().__new__(cls)

    def __init__(self, *ignored: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Makes records of the classes in PyTorch's metadata (2.6 to 2.15), and nothing else."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        # classes of this pickle alone: what it may write to them ends with it
        self.known: dict[tuple[str, str], Any] = {
            (module, name): type(name, (_Record,), {})
            for module, names in {
                "torch.distributed.checkpoint.metadata": (
                    "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata MetadataIndex "
                    "TensorProperties StorageMeta _MEM_FORMAT_ENCODING"
                ),
                "torch.distributed.checkpoint.filesystem": "_StorageInfo",
                "torch.serialization": "_get_layout",
                "pathlib": "Path PosixPath WindowsPath",
                "pathlib._local": "Path PosixPath WindowsPath",  # Python 3.13
            }.items()
            for name in names.split()
        }
        self.known |= {("torch", name): dtype for name, dtype in _DTYPES.items()}
        self.known["torch", "Size"] = tuple

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint holds") from None

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to an object outside of it")


def _metadata(pickled: Any, path: Path) -> Metadata:
    """PyTorch's metadata of a record of it; a ValueError says what does not fit."""
    fields = _fields(pickled, "Metadata")
    tensors, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(tensors, dict) or not isinstance(stored, dict):
        raise ValueError(f"expected tensors and their places by name, got {shown(tensors)} and {shown(stored)}")
    places = dict(_place(index, place) for index, place in stored.items())
    lengths: Counter[str] = Counter()
    for place in places.values():
        lengths[place.relative_path] += place.length
    sizes = {name: _size_of(path / name) for name in lengths}
    for place in places.values():
        size = sizes[place.relative_path]
        if size < place.offset + place.length or size < lengths[place.relative_path]:
            raise ValueError(f"{place.relative_path} is {size} bytes long, and should have {place}")
    saved: dict[str, Any] = {name: _tensor(name, tensor, places) for name, tensor in tensors.items()}
    return Metadata(state_dict_metadata=saved, planner_data={name: (name,) for name in saved}, storage_data=places)


def _fields(record: Any, kind: str) -> dict[str, Any]:
    if not isinstance(record, _Record) or type(record).__name__ != kind:
        raise ValueError(f"expected {kind}, got {type(record).__name__}")
    if not isinstance(record.state, dict):
        raise ValueError(f"{kind}: expected its fields, got {shown(record.state)}")
    return record.state


def _size(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(size) is int and 0 <= size < 2**63 for size in value):
        raise ValueError(f"expected sizes, got {shown(value)}")
    return value


def _size_of(path: Path) -> int:
    check_regular(path)
    return path.stat().st_size


def _place(index: Any, record: Any) -> tuple[MetadataIndex, Place]:
    """A shard and where it is."""
    of, fields = _fields(index, "MetadataIndex"), _fields(record, "_StorageInfo")
    name, file = of.get("fqn"), fields.get("relative_path")
    if not isinstance(name, str):
        raise ValueError(f"expected a tensor's name, got {shown(name)}")
    if not isinstance(file, str) or Path(file).name != file or "\0" in file:
        raise ValueError(f"{name}: expected the name of a file beside it, got {shown(file)}")
    if fields.get("transform_descriptors"):
        raise ValueError(f"{name}: expected it as it is, got transforms {shown(fields['transform_descriptors'])}")
    offset, length = _size((fields.get("offset"), fields.get("length")))
    return MetadataIndex(name, _size(of.get("offset"))), Place(file, offset, length)


def _tensor(name: Any, record: Any, places: Mapping[MetadataIndex, Place]) -> TensorStorageMetadata:
    """A tensor whose shards are in files, as long as they must be, and make all of it."""
    if not isinstance(name, str):
        raise ValueError(f"expected a tensor's name, got {shown(name)}")
    fields = _fields(record, "TensorStorageMetadata")  # what else there may be, PyTorch would unpickle
    size, properties, shards = _size(fields.get("size")), fields.get("properties"), fields.get("chunks")
    state = properties.state if isinstance(properties, _Record) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, torch.dtype) or not isinstance(shards, list):
        raise ValueError(f"{name}: expected a dtype and shards, got {shown(dtype)} and {shown(shards)}")
    chunks = []
    for shard in shards:
        of = _fields(shard, "ChunkStorageMetadata")
        offsets, sizes = _size(of.get("offsets")), _size(of.get("sizes"))
        place = places.get(MetadataIndex(name, offsets))
        if place is None or place.length < math.prod(sizes) * dtype.itemsize:
            raise ValueError(f"{name}: expected {sizes} of {dtype} at {offsets}, got {place}")
        chunks.append((offsets, sizes))
    if not _make(size, chunks):
        raise ValueError(f"{name}: its shards do not make a tensor of size {size}")
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype),
        size=torch.Size(size),
        chunks=[ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks],
    )


def _make(size: tuple[int, ...], shards: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether shards (offsets, sizes), cut along the first dimension as FSDP2 does, make a tensor of this size."""
    end = 0
    for offsets, sizes in sorted(shards):
        first, length = (offsets[0], sizes[0]) if size and offsets and sizes else (0, 1)
        if len(offsets) != len(size) or first != end or any(offsets[1:]) or sizes[1:] != size[1:]:
            return False
        end += length
    return end == (size[0] if size else 1)
