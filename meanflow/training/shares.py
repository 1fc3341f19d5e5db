"""The shares/ of a checkpoint: tensors that are spread over processes, each process's pieces in a file of its own.

torch.distributed.checkpoint writes and reads them. Its list of them, shares/.metadata, is a pickle, which can run any
code: it is read here by an unpickler that makes plain records of it, is checked, and PyTorch's reader is given the
result. The tensors themselves PyTorch reads with `weights_only=True`.
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
from typing import Any, NoReturn

import torch
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import gather_object
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

FOLDER = "shares"
METADATA = ".metadata"
_LARGEST = 2**30  # bytes of .metadata: about 5 million pieces
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


@dataclass(frozen=True)
class Place:
    """Where a piece is; the attributes that PyTorch's reader asks for."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


def save_shares(path: Path, shares: dict[str, Tensor]) -> dict[str, str]:
    """Write tensors into the folder `path`, by all processes; returns the files' checksums.

    Each process reads back what it has written itself, which on a network file system it still has in memory.

    Raises:
        OSError: that cannot be done.
    """
    try:
        dcp.save(shares, checkpoint_id=path)
    except CheckpointException as error:
        raise OSError(f"cannot write {path}: {_cause(error)}") from error
    own = list(path.glob(f"__{PartialState().process_index}_*"))
    if PartialState().is_main_process:
        own.append(path / METADATA)
    return dict(gather_object([(f"{path.name}/{file.name}", checksum(file)) for file in own]))


def check_shares(path: Path, state: Mapping[str, Any]) -> None:
    """Raise a UsageError, in all processes, where a file is not the one that was saved; each process reads some."""
    check_files(path, state, [f"{FOLDER}/{METADATA}"])
    places = read_metadata(path / FOLDER).storage_data.values()
    names = sorted({f"{FOLDER}/{place.relative_path}" for place in places})
    process = PartialState()
    damage = []
    try:
        check_files(path, state, names[process.process_index :: process.num_processes])
    except UsageError as error:
        damage.append(str(error))
    for words in gather_object(damage):
        raise UsageError(words)


def load_shares(path: Path, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the folder `path`; those of `held`, where the shape is the same, spread over the processes as it is.

    Raises:
        UsageError: it is missing or damaged.
    """
    metadata = read_metadata(path)
    shares: dict[str, Any] = {}
    for key, saved in metadata.state_dict_metadata.items():
        assert isinstance(saved, TensorStorageMetadata)
        dtype = saved.properties.dtype
        if key in held and held[key].shape == saved.size and held[key].is_floating_point() == dtype.is_floating_point:
            shares[key] = torch.empty_like(held[key])
        else:
            shares[key] = torch.empty(saved.size, dtype=dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # a single process: that is meant
            dcp.load(shares, storage_reader=_Reader(path, metadata))
    except CheckpointException as error:
        raise UsageError(f"cannot read {path}: {_cause(error)}") from error
    return shares


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
    """What shares/.metadata in the folder `path` says, without running any of it.

    Raises:
        UsageError: it is missing, damaged or no list of tensors, or the files are shorter than it says.
    """
    file = path / METADATA
    try:
        check_regular(file)
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"expected at most {_LARGEST} bytes, got {file.stat().st_size}")
        pickled = file.read_bytes()
        for operation, argument, _ in pickletools.genops(pickled):
            if operation.name.endswith("PUT") and (argument or 0) > len(pickled):
                raise ValueError("it asks for more memory than it can use")
        return _metadata(_Unpickler(io.BytesIO(pickled)).load(), path)
    # a damaged pickle raises what it happens to run into
    except Exception as error:
        raise UsageError(f"cannot read {file}: {reason(error)}") from error


class _Record:
    """A pickled object: what it was made of, and its state."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any) -> _Record:
        record = super().__new__(cls)
        record.arguments = arguments
        return record

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:  # MetadataIndex is a key, and is pickled before its state
        return id(self)


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
    """A piece and where it is."""
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
    """A tensor whose pieces are in files, as long as they must be, and make all of it."""
    if not isinstance(name, str):
        raise ValueError(f"expected a tensor's name, got {shown(name)}")
    fields = _fields(record, "TensorStorageMetadata")  # what else there may be, PyTorch would unpickle
    size, properties, pieces = _size(fields.get("size")), fields.get("properties"), fields.get("chunks")
    state = properties.state if isinstance(properties, _Record) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, torch.dtype) or not isinstance(pieces, list):
        raise ValueError(f"{name}: expected a dtype and pieces, got {shown(dtype)} and {shown(pieces)}")
    chunks = []
    for piece in pieces:
        of = _fields(piece, "ChunkStorageMetadata")
        offsets, sizes = _size(of.get("offsets")), _size(of.get("sizes"))
        place = places.get(MetadataIndex(name, offsets))
        if place is None or place.length < math.prod(sizes) * dtype.itemsize:
            raise ValueError(f"{name}: expected {sizes} of {dtype} at {offsets}, got {place}")
        chunks.append((offsets, sizes))
    if not _make(size, chunks):
        raise ValueError(f"{name}: its pieces do not make a tensor of size {size}")
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype),
        size=torch.Size(size),
        chunks=[ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks],
    )


def _make(size: tuple[int, ...], pieces: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether pieces (offsets, sizes), cut along the first dimension as FSDP2 does, make a tensor of this size."""
    end = 0
    for offsets, sizes in sorted(pieces):
        first, length = (offsets[0], sizes[0]) if size and offsets and sizes else (0, 1)
        if len(offsets) != len(size) or first != end or any(offsets[1:]) or sizes[1:] != size[1:]:
            return False
        end += length
    return end == (size[0] if size else 1)
