"""Latents: how many a second the loader gives a training step, with what memory; how many a second are encoded.

    python bench/data/latents.py [--json FILE] [--count 200000] [--batch-size 256] [--workers 0 1 2] [--folder FOLDER]

Loader: files as `meanflow encode` writes them, of random posteriors of 4×32×32 latents, read in a run's own order for
one epoch, with nothing else to do. Beside it what scripts often have: a .npy file for each image through PyTorch's
DataLoader (of a tenth of the images). Memory is the largest of all processes together (proportional set size), in each
fifth of the epoch; what the kernel keeps of files for as long as nobody else needs it is not counted.

Encoder: an AutoencoderKL of sd-vae-ft-mse's sizes with random weights, on 256×256 images that are in memory, beside a
loop that calls diffusers and keeps the result.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # conftest
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))  # torchvision_stub

import torchvision_stub  # noqa: F401, before diffusers
from conftest import environment
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from meanflow.codecs import Autoencoder
from meanflow.data import ImageData, Latents, StepOrder, TensorImages, micro_batches
from meanflow.data.latents import LatentIndex, Shard
from meanflow.encoding import encode_images

SHARD = 1024
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def synthetic(folder: Path, count: int) -> Path:
    """A folder of random posteriors."""
    folder.mkdir()
    shards = []
    numbers = torch.randn(SHARD, 8, 32, 32)
    for k in range(-(-count // SHARD)):
        n = min(SHARD, count - k * SHARD)
        path = folder / f"latents-{k:05d}.safetensors"
        posterior = numbers[:n].roll(k, dims=0).contiguous()
        posterior[:, 0, 0, 0] = torch.arange(k * SHARD, k * SHARD + n)  # which image it is
        save_file({"posterior": posterior, "labels": torch.arange(k * SHARD, k * SHARD + n) % 1000}, path)
        shards.append(Shard(path.name, n, path.stat().st_size, "", (0.0,) * 4, (0.0,) * 4))
    names = tuple(map(str, range(1000)))
    codec = {"name": "autoencoder", "pretrained": "nowhere/none"}
    index = LatentIndex("random", codec, (3, 256, 256), (4, 32, 32), "float32", False, names, tuple(shards))
    index.write(folder)
    return folder


def memory() -> int:
    """Proportional set size of this process and of those that it started, in bytes."""
    total = 0
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    me = Path("/proc/self").resolve().name
    for pid in [int(me), *(pid for pid, parent in parents.items() if parent == int(me))]:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += 1024 * sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


def epoch(batches: Iterator[tuple[Tensor, Tensor]], steps: int, batch_size: int) -> dict:
    """Images a second, after the first ten steps, and the largest memory in each fifth."""
    largest = [0] * 5
    start = 0.0
    measured = 0.0  # seconds that went into reading the memory
    for step, (x, _) in enumerate(batches):
        assert len(x) == batch_size
        if step == 10:
            start, measured = time.perf_counter(), 0.0
        if step % max(1, steps // 50) == 0:
            before = time.perf_counter()
            fifth = min(4, 5 * step // steps)
            largest[fifth] = max(largest[fifth], memory())
            measured += time.perf_counter() - before
    seconds = time.perf_counter() - start - measured
    return {
        "images_per_second": round((steps - 10) * batch_size / seconds),
        "memory_mib": [round(n / 2**20) for n in largest],
    }


class Files(Dataset):
    """One .npy file for each image."""

    def __init__(self, folder: Path, count: int) -> None:
        folder.mkdir()
        self.folder, self.count = folder, count
        numbers = torch.randn(8, 32, 32).numpy()
        for i in range(count):
            np.save(folder / f"{i}.npy", numbers)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.load(self.folder / f"{i}.npy")), i % 1000


def loader_rows(folder: Path, count: int, batch_size: int, workers: list[int]) -> Iterator[dict]:
    source = Latents(folder=str(synthetic(folder / "latents", count))).load().train
    order = StepOrder(count, batch_size, seed=0)
    x, y = next(micro_batches(source, order, start=3, stop=4))
    assert torch.equal(x[:, 0, 0, 0].long(), order.batch(3))
    assert torch.equal(y, order.batch(3) % 1000)
    steps = count // batch_size
    for number in workers:
        batches = micro_batches(source, order, start=0, stop=steps, workers=number)
        yield {"way": "meanflow", "workers": number, "images": count, **epoch(batches, steps, batch_size)}
    files = Files(folder / "files", count // 10)
    steps = len(files) // batch_size
    loader = DataLoader(files, batch_size, shuffle=True, drop_last=True, num_workers=max(workers))
    yield {
        "way": "a .npy file each",
        "workers": max(workers),
        "images": len(files),
        **epoch(iter(loader), steps, batch_size),
    }


def encoder_rows(folder: Path, count: int = 4, rounds: int = 3) -> Iterator[dict]:
    torch.manual_seed(0)
    net = AutoencoderKL(**SD_VAE).eval()
    net.save_pretrained(folder / "vae")
    codec = Autoencoder(pretrained=str(folder / "vae"))
    x = torch.rand(count, 3, 256, 256) * 2 - 1
    data = ImageData("random", TensorImages(x, torch.zeros(count, dtype=torch.long)), None, ("one",), 3, 256)

    def ours(k: int) -> Tensor:
        index = encode_images(data, codec, folder / f"out{k}", mirrored=False, batch_size=count, workers=0).index
        assert index.count == count
        return Latents(folder=str(folder / f"out{k}")).load().train.batch(range(count))[0]

    @torch.no_grad()
    def by_hand(k: int) -> Tensor:
        found = net.encode(x).latent_dist
        save_file({"posterior": torch.cat([found.mean, found.std], dim=1).contiguous()}, folder / f"hand{k}")
        return torch.cat([found.mean, found.std], dim=1)

    times: dict[str, list[float]] = {"meanflow encode": [], "diffusers by hand": []}
    for k in range(rounds):
        found = []
        for way, run in zip(times, (ours, by_hand), strict=True):
            begun = time.perf_counter()
            found.append(run(k))
            times[way].append(time.perf_counter() - begun)
        assert torch.equal(*found)
    for way, seconds in times.items():
        yield {"way": way, "images": count, "latents_per_second": round(count / min(seconds), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="where the files go for the time; they take 33 kB for each image")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for part in (
            encoder_rows(Path(name)),
            loader_rows(Path(name), options.count, options.batch_size, options.workers),
        ):
            for row in part:
                rows.append(row)
                print(row, flush=True)
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "figures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
