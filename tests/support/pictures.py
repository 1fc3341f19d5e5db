"""Small pictures of several kinds in a folder, for the sources that hold the same ones in another form."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = {"cat": 9, "dog": 7, "fox": 5}


def make_pictures(root: Path, classes: dict[str, int] = CLASSES) -> list[Path]:
    """Their paths in the order of the folder: JPEGs that are turned by EXIF, transparent PNGs, grey and plain ones."""
    rng = np.random.default_rng(0)
    paths = []
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (14, 10 + i, 4), dtype=np.uint8)
            picture = Image.fromarray(pixels)
            path = root / name / f"{i:03}{('.png', '.jpg', '.png', '.webp')[i % 4]}"
            if i % 4 == 1:
                exif = Image.Exif()
                exif[0x0112] = 6  # turned by 90 degrees
                picture.convert("RGB").save(path, exif=exif)
            else:
                (picture if i % 4 == 0 else picture.convert("L" if i % 4 == 2 else "RGB")).save(path)
            paths.append(path)
    return paths
