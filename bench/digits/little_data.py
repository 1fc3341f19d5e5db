"""Better targets for little data: MeanFlow on a tenth of the digits, with less noise in its targets.

Each way trains the network of the digits preset on 143 images, for the same number of steps, and draws 2,000 images in
one step. They are compared with the images that were kept apart, which a classifier is fitted on as well: class
accuracy, and Fréchet distance in pixels. How near samples are to images that the network was trained on is the mean
distance of a sample to the nearest of them, over that of the images that were kept apart: far below 1, they are copies.

    python bench/digits/little_data.py --seeds 0 1 2 --json FILE
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import mean

import torch

from meanflow.config import Config
from meanflow.data import load_digits_data
from meanflow.evaluation import class_accuracy, evaluation_labels, fit_classifier, frechet_distance
from meanflow.recipes import recipe
from meanflow.training import load_network, run_training

HELD_OUT = 0.92  # of each class: 143 of 1,797 images are left
SAMPLES = 2000
FLOW = "flow"
# what stands beside the preset's ratio = 0.5, kappa = 0.3
WAYS = {
    "meanflow": {},
    "tangents on every row": {"ratio": 1.0},
    "2 intervals a sample": {"intervals": 2},
    "4 intervals a sample": {"intervals": 4},
    "mean over neighbours": {"velocity": "neighbours", "velocity_group": 128},
    "mean over 4 neighbours": {"velocity": "neighbours", "velocity_group": 128, "velocity_count": 4},
    "a teacher's velocity": {"teacher": FLOW, "velocity_guidance": 1.43, "kappa": 0.0},
    "the same, started from it": {"teacher": FLOW, "init": FLOW, "velocity_guidance": 1.43, "kappa": 0.0},
}


def config_of(steps: int, seed: int, **values) -> Config:
    base = recipe("digits").replace(held_out=HELD_OUT, evaluate=False, sample_every=0, checkpoint_every=steps)
    return base.replace(steps=steps, warmup_steps=min(50, steps - 1), seed=seed, **values)


def nearest(images: torch.Tensor, others: torch.Tensor) -> float:
    """Mean distance of each image to the nearest of the others."""
    return float(torch.cdist(images.flatten(1), others.flatten(1)).amin(dim=1).mean())


def figures(name: str, data, seed: int) -> dict[str, float]:
    loaded = load_network(Path("runs") / name)
    labels = evaluation_labels(data.held_out.labels, SAMPLES)
    images = loaded.generate(labels, seed=seed).clamp(-1, 1)  # [n, 1, 8, 8]
    kept, seen = data.held_out.images(), data.train.images()
    classifier = fit_classifier(kept, data.held_out.labels)
    return {
        "class_accuracy": class_accuracy(images, labels, classifier),
        "frechet_distance": frechet_distance(images, kept),
        "nearest": nearest(images, seen) / nearest(kept, seen),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    out = None if options.json is None else options.json.absolute()
    data, rows = load_digits_data(HELD_OUT), {name: [] for name in [FLOW, *WAYS]}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for seed in options.seeds:
            base = {"overwrite": True}
            run_training(config_of(options.steps, seed, objective="flow_matching", name=FLOW), **base)
            rows[FLOW].append(figures(FLOW, data, seed))
            for name, values in WAYS.items():
                run_training(config_of(options.steps, seed, name="way", **values), **base)
                rows[name].append(figures("way", data, seed))
                print(seed, name, rows[name][-1], flush=True)
        os.chdir("/")
    train = data.train.images()
    real = {"frechet_distance": frechet_distance(train, data.held_out.images())}
    print(f"{'':28} class accuracy, Fréchet distance, nearest (the images trained on: {real['frechet_distance']:.2f})")
    for name, found in rows.items():
        print(f"{name:28} " + ", ".join(f"{mean(row[key] for row in found):.3f}" for key in found[0]))
    if out is not None:
        report = {"steps": options.steps, "seeds": options.seeds, "images": len(data.train), "training_images": real}
        out.write_text(json.dumps({**report, "ways": rows, "torch": torch.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
