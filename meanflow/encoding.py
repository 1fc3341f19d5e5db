"""Images to a folder of latents, by any number of processes: what `meanflow encode` does.

Each file is written at once, with its part of the index beside it; a process that is killed loses the file that it was
at. The files do not depend on the number of processes.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from .codecs import Codec
from .data import ImageData, LatentIndex, batches
from .data.latents import DTYPES, INDEX, LABELS, MIRRORED, PLAN, POSTERIOR, Shard
from .errors import UsageError
from .files import checksum, parse_json, read_text, remove_partials, replaced, shown, write_text
from .registry import name_of
from .tf32 import tensor_float32
from .training.owner import owned_by_all

SECONDS = 60.0  # between lines of progress where there is no bar


@dataclass(frozen=True)
class Encoded:
    """What a call of `encode_images` did.

    encoded: images of this call, of all processes, without their mirrored versions.
    seconds: that it took.
    """

    index: LatentIndex
    encoded: int
    seconds: float

    def lines(self) -> Iterator[str]:
        """In words."""
        index = self.index
        yield index.in_words()
        mean, std = index.statistics()
        yield "as they are trained on, by channel: mean " + ", ".join(f"{a:.3f}" for a in mean)
        yield "                  standard deviation " + ", ".join(f"{a:.3f}" for a in std)
        if self.encoded:
            latents = self.encoded * (1 + index.mirrored)
            yield f"{latents} latents made in {self.seconds:.0f} s, {latents / self.seconds:.1f} a second"
        else:
            yield "all of them were there before"


def encode_images(
    data: ImageData,
    codec: Codec,
    out: Path,
    *,
    mirrored: bool = True,
    dtype: Literal["float32", "float16"] = "float32",
    precision: Literal["float32", "tf32", "bf16"] = "float32",
    shard_size: int = 1024,
    batch_size: int = 16,
    workers: int = 2,
    device: torch.device | str = "cpu",
) -> Encoded:
    """Encode every image of `data.train`; each process of the group calls this.

    A folder that was begun is completed, if it is to hold the same.

    Args:
        codec: an Autoencoder or another codec with `draw`, a frozen dataclass that is registered.
        out: the folder, which is made.
        mirrored: the mirrored images as well.
        dtype: of the files.
        precision: of the encoder's products; bf16: by autocast.
        shard_size: images of a file.
        batch_size: images that are encoded at a time.
        workers: processes that decode images, of each process.

    Raises:
        UsageError: the folder holds something else, or an image cannot be read.
    """
    state = PartialState()
    begun = time.perf_counter()
    index = LatentIndex(
        source=data.name,
        codec={"name": name_of("codecs", type(codec)), **asdict(codec)},  # type: ignore[call-overload]
        image_shape=data.image_shape,
        latent_shape=codec.latent_shape(data.image_shape),
        dtype=dtype,
        mirrored=mirrored,
        class_names=data.class_names,
        labels=f"{zlib.crc32(data.train.labels.numpy().tobytes()):08x}",
        shard_size=shard_size,
        precision=precision,
        shards=(),
    )
    files = [f"latents-{k:05d}.safetensors" for k in range(-(-len(data.train) // shard_size))]
    with owned_by_all(out, state, does="is encoding to it", other="another folder"):
        todo = _told_all(lambda: _begin(out, index, files))
        mine = todo[state.process_index :: state.num_processes]
        parts = {k: list(range(k * shard_size, min((k + 1) * shard_size, len(data.train)))) for k in mine}
        chosen = [rows[i : i + batch_size] for rows in parts.values() for i in range(0, len(rows), batch_size)]
        loaded = batches(data.train, chosen, workers=workers)
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
        with _progress(sum(map(len, chosen)), state) as advance, tensor_float32(precision == "tf32"), autocast:
            for k, rows in parts.items():
                pieces = []
                for _ in range(0, len(rows), batch_size):
                    x, y = next(loaded)
                    pieces.append(_encoded(codec, x.to(device, non_blocking=True), y, mirrored=mirrored))
                    advance(len(y))
                whole = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
                _write(out / files[k], whole, codec, DTYPES[dtype])
        state.wait_for_everyone()
        index = _told_all(lambda: _finished(out, index, files))
    rows_done = sum(min(shard_size, len(data.train) - k * shard_size) for k in todo)
    return Encoded(index, rows_done, time.perf_counter() - begun)


def _told_all(make: Any) -> Any:
    """What the first process makes, in every process; so is what it refuses, or its disk."""
    told: list[Any] = [None, ""]
    if PartialState().is_main_process:
        try:
            told = [make(), ""]
        except (UsageError, OSError) as error:
            told = [None, str(error)]
    broadcast_object_list(told)
    if told[1]:
        raise UsageError(told[1])
    return told[0]


def _begin(out: Path, index: LatentIndex, files: list[str]) -> list[int]:
    """Make the folder ready; returns the numbers of the files that are to be made."""
    wanted = _plan(index)
    if out.exists() and not out.is_dir():
        raise UsageError(f"expected a folder, got the file {out}", field="out")
    path = out / PLAN
    if (out / INDEX).is_file():
        _refuse_others(out, _plan(LatentIndex.read(out)), wanted)
    elif path.is_file():
        try:
            found = parse_json(read_text(path))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {path} ({error}); encode to another folder", field="out") from error
        _refuse_others(out, found, wanted)
    elif out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty, and no encoding was begun in it; choose another folder", field="out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(wanted, indent=1) + "\n")
    remove_partials(out, *files, *(_beside(name) for name in files))
    known = _known(out)
    return [k for k, name in enumerate(files) if name not in known]


def _plan(index: LatentIndex) -> dict[str, Any]:
    """What a folder is to hold, as JSON reads it back."""
    plan: dict[str, Any] = json.loads(json.dumps(asdict(replace(index, shards=()))))
    return plan


def _refuse_others(out: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    """Raise where an encoding that was begun is of something else."""
    found = found if isinstance(found, dict) else {}
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UsageError(
                f"{out} was begun with {name} {shown(found.get(name))}, and now it is {shown(value)}; choose another "
                "folder, or encode as it was begun",
                field="out",
            )


def _beside(file: str) -> str:
    """The file that a shard's part of the index is in until all are there."""
    return Path(file).with_suffix(".json").name


def _known(out: Path) -> dict[str, Shard]:
    """The files that are whole, by name: as the index says, or what is beside each until there is an index."""
    shards = list(LatentIndex.read(out).shards) if (out / INDEX).is_file() else []
    for path in out.glob(_beside("latents-*.safetensors")):
        with suppress(OSError, ValueError, TypeError, AttributeError):  # damaged: made anew
            shards.append(Shard.of(parse_json(read_text(path))))
    sizes = {path.name: path.stat().st_size for path in out.glob("latents-*.safetensors")}
    return {shard.file: shard for shard in shards if sizes.get(shard.file) == shard.size}


def _encoded(codec: Codec, x: Tensor, y: Tensor, *, mirrored: bool) -> dict[str, Tensor]:
    """Posteriors of a batch on the CPU, by the names that they have in a file."""
    sides = {POSTERIOR: x, **({MIRRORED: x.flip(-1)} if mirrored else {})}
    return {**{name: codec.encode(side).float().cpu() for name, side in sides.items()}, LABELS: y}


def _moments(codec: Any, tensors: Mapping[str, Tensor]) -> dict[str, tuple[float, ...]]:
    """Sums over a file of each channel's latents and of their squares, which the posteriors give exactly."""
    total, squares = torch.zeros(()), torch.zeros(())
    for name in (POSTERIOR, MIRRORED):
        if name in tensors:
            posterior = tensors[name].double()  # [n, 2C, h, w]
            C = posterior.shape[1] // 2
            scale = 1.0 / codec.std
            mean, std = (posterior[:, :C] - codec.mean) * scale, posterior[:, C:] * scale
            total = total + mean.sum(dim=(0, 2, 3))  # [C]
            squares = squares + (mean.square() + std.square()).sum(dim=(0, 2, 3))  # [C]
    return {"total": tuple(total.tolist()), "squares": tuple(squares.tolist())}


def _write(path: Path, tensors: Mapping[str, Tensor], codec: Codec, dtype: torch.dtype) -> None:
    bad = [name for name, value in tensors.items() if not value.isfinite().all()]
    if bad:
        raise UsageError(
            f"the latents of {path.name} are not finite; expected an autoencoder of finite values", field="codec"
        )
    stored = {name: value if name == LABELS else value.to(dtype).contiguous() for name, value in tensors.items()}
    if not all(value.isfinite().all() for value in stored.values()):
        raise UsageError("latents of this autoencoder do not fit float16; expected float32", field="dtype")
    with replaced(path) as partial:
        with partial.open("wb") as file:
            file.write(save(stored))
            file.flush()
            os.fsync(file.fileno())
        size, found = partial.stat().st_size, checksum(partial)
    shard = Shard(path.name, len(tensors[LABELS]), size, found, **_moments(codec, tensors))
    write_text(path.with_name(_beside(path.name)), json.dumps(asdict(shard)) + "\n")


def _finished(out: Path, index: LatentIndex, files: list[str]) -> LatentIndex:
    """Write index.json of a folder whose files are all there."""
    known = _known(out)
    missing = [name for name in files if name not in known]
    if missing:
        raise UsageError(f"{out / missing[0]} is not there any more; start again, and it is made anew")
    whole = replace(index, shards=tuple(known[name] for name in files))
    whole.write(out)
    for name in (PLAN, *(_beside(name) for name in files)):
        (out / name).unlink(missing_ok=True)
    return whole


@contextmanager
def _progress(total: int, state: PartialState) -> Iterator[Any]:
    """A bar of the first process's share; where nobody sees bars a line a minute."""
    share = "" if state.num_processes == 1 else f", the share of one of {state.num_processes} processes"
    bar = tqdm(total=total, unit="image", desc=f"encoding{share}", disable=None if state.is_main_process else True)
    plain = state.is_main_process and bar.disable
    done, begun, told = 0, time.monotonic(), time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, told
        done += n
        bar.update(n)
        if plain and time.monotonic() > told + SECONDS:
            told = time.monotonic()
            rate = done / (told - begun)
            words = (
                f"encoding{share}: {done} of {total} images, {rate:.3g} a second, {(total - done) / rate:.0f} s left"
            )
            print(words, file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        bar.close()
