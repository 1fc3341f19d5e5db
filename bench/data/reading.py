"""How fast images come out of a folder, of a tar and of an Arrow table, and how long a tar takes to index.

    python bench/data/reading.py [--images 2000] [--samples 100000]

The same JPEGs of about 256 pixels, smooth and noisy, in all three; --image-size 256. With two worker processes, and in
one process its processor time, which other programs disturb less; in turns, median of three after one that is not
counted. Needs `datasets`. The tar that is indexed has tiny members.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

import meanflow.data.encoded as encoded
from meanflow.data import DataSource, HuggingFace, ImageFolder, StepOrder, WebDataset, micro_batches
from meanflow.data.web_dataset import find_tar_images

BATCH = 50


def jpegs(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        sides = tuple(int(side) for side in rng.integers(256, 300, 2))
        smooth = np.asarray(small.resize(sides, Image.Resampling.BICUBIC), dtype=np.int16)  # [H, W, 3]
        noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def write_tar(path: Path, samples: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in samples:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def sources(work: Path, made: list[bytes]) -> dict[str, DataSource]:
    (work / "folder" / "all").mkdir(parents=True)
    for i, data in enumerate(made):
        (work / "folder" / "all" / f"{i:06}.jpg").write_bytes(data)
    pairs = [((f"{i:06}.jpg", data), (f"{i:06}.cls", b"0")) for i, data in enumerate(made)]
    write_tar(work / "a.tar", [member for pair in pairs for member in pair])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["all"])})
    images = [{"bytes": data, "path": None} for data in made]
    datasets.Dataset.from_dict({"image": images, "label": [0] * len(made)}, features).save_to_disk(work / "saved")
    return {
        "folder": ImageFolder(folder=str(work / "folder"), image_size=256),
        "tar": WebDataset(tars=str(work / "a.tar"), image_size=256),
        "Arrow": HuggingFace(dataset=str(work / "saved"), image_size=256),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=100_000)
    options = parser.parse_args()
    encoded.CACHE_BYTES = 0
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        made = jpegs(options.images)
        print(f"{len(made)} JPEGs, {sum(map(len, made)) / len(made) / 1024:.0f} KiB each")
        parts = {name: source.load().train for name, source in sources(Path(folder), made).items()}
        order = StepOrder(len(made), BATCH, seed=0)
        rates: dict[str, list[float]] = {name: [] for name in parts}
        costs: dict[str, list[float]] = {name: [] for name in parts}
        for turn in range(4):
            for name, part in parts.items():
                start = time.perf_counter()
                for _ in micro_batches(part, order, start=0, stop=len(made) // BATCH, workers=2):
                    pass
                if turn:
                    rates[name].append(len(made) / (time.perf_counter() - start))
                start = time.process_time()
                for _ in micro_batches(part, order, start=0, stop=4):
                    pass
                if turn:
                    costs[name].append((time.process_time() - start) / (4 * BATCH) * 1e3)
        for name, several in rates.items():
            rate = f"{statistics.median(several):6.0f} images/s ({min(several):.0f} to {max(several):.0f})"
            print(f"{name:<8}{rate}, {statistics.median(costs[name]):.2f} ms of the processor each")
        tiny = [pair for i in range(options.samples) for pair in ((f"{i:08}.jpg", b"x"), (f"{i:08}.cls", b"0"))]
        write_tar(Path(folder) / "tiny.tar", tiny)
        for _ in range(2):
            start, cpu = time.perf_counter(), time.process_time()
            found = find_tar_images([f"{folder}/tiny.tar"], name="tiny")
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
            print(f"{len(found.labels)} samples of two members indexed in {wall:.1f} s, {cpu:.1f} s of the processor")


if __name__ == "__main__":
    main()
