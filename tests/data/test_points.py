"""2-D points: the data, the figures and the pictures of a run on them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from meanflow.cli import main
from meanflow.config import Config
from meanflow.data import Points
from meanflow.errors import UsageError
from meanflow.evaluation import PointStatistics, energy_distance, evaluate_images
from meanflow.training.pictures import image_grid, samples_picture

SHAPES = {"moons": 2, "checkerboard": 4, "spirals": 2, "rings": 3, "gaussians": 8}


@pytest.mark.parametrize(("shape", "classes"), SHAPES.items())
def test_points_are_scaled_and_the_same_every_time(shape, classes):
    data = Points(shape=shape, count=1000, held_out=0.2).load()
    assert (data.num_classes, data.image_shape, data.name) == (classes, (2, 1, 1), shape)
    assert len(data.train) + len(data.held_out) == 1000
    points = torch.cat([data.train.images(), data.held_out.images()]).flatten(1)
    assert points.dtype == torch.float32
    torch.testing.assert_close(points.mean(dim=0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(points.std(dim=0), torch.ones(2))
    assert torch.equal(Points(shape=shape, count=1000, held_out=0.2).load().train.images(), data.train.images())
    counts = data.train.labels.bincount()
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_held_out_points_give_the_reference_values(shape):
    data = Points(shape=shape, count=3000, held_out=0.2).load()
    figures = PointStatistics().evaluate(data.held_out.images(), data.held_out.labels, data)
    for name in PointStatistics.titles:
        assert figures[name] == figures[f"held_out_{name}"]
    assert figures["class_accuracy"] > 0.96
    assert figures["frechet_distance"] < 0.02
    assert figures["energy_distance"] < 0.02
    assert figures["samples"] == len(data.held_out)


def test_what_cannot_be_is_named():
    with pytest.raises(UsageError, match=r"shape: expected one of moons, .*, got 'cube'"):
        Points(shape="cube")
    with pytest.raises(UsageError, match="count: expected at least 100, got 99"):
        Points(count=99)
    with pytest.raises(UsageError, match="flip: expected only with images"):
        Points(flip=True)


def test_energy_distance_of_points_on_a_line():
    """Of {0, 1} and {a, a + 1} with a ≥ 1: 2·a − ½ − ½."""
    a = torch.tensor([[0.0], [1.0]])
    assert energy_distance(a, a + 3) == pytest.approx(2 * 3.0 - 1.0)
    assert energy_distance(a, a) == 0.0
    with pytest.raises(ValueError, match="b: expected images of shape"):
        energy_distance(a, torch.zeros(3, 2))


def test_energy_distance_sees_what_two_moments_do_not():
    x = torch.randn(4000, 2, dtype=torch.float64)
    ring = torch.nn.functional.normalize(x, dim=1) * 2**0.5  # mean 0 and covariance I, too
    statistics = PointStatistics()
    data = Points(shape="rings", count=4000).load()
    assert energy_distance(x[:2000], x[2000:]) < 0.01
    assert energy_distance(ring[:2000], x[2000:]) > 0.03
    far = statistics.evaluate(data.train.images() * 3, data.train.labels, data)
    assert far["frechet_distance"] == pytest.approx(2 * (3 - 1) ** 2, rel=0.01)  # nothing is cut
    assert far["held_out_energy_distance"] is None


def test_pixel_statistics_cut_to_the_range_of_the_data():
    data = Points(count=1000).load()
    points = data.train.images()
    assert points.abs().max() > 1
    assert evaluate_images(points, data.train.labels, data).frechet_distance == pytest.approx(0.0, abs=1e-6)


def test_pictures():
    points, labels = torch.randn(50, 2, 1, 1), torch.arange(50) % 2
    picture = samples_picture(points, 10, labels, ("a", "b"))
    pixels = np.asarray(picture)
    assert pixels.shape[0] == pixels.shape[1]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 2
    assert samples_picture(points, 10).size == picture.size
    images = torch.rand(4, 1, 8, 8)
    assert samples_picture(images, 2, labels[:4]).tobytes() == image_grid(images, 2).tobytes()
    with pytest.raises(ValueError, match="images: expected shape"):
        samples_picture(torch.zeros(2, 2, 4, 4), 1)


def test_the_recipe_trains_samples_and_evaluates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--steps", "3", "--warmup-steps", "1", "--count", "200", "--hidden-size", "8", "--batch-size", "16"]
    assert main(["train", "points", *small]) == 0
    report = json.loads((tmp_path / "runs/points/report.json").read_text())
    assert {"energy_distance", "held_out_energy_distance", "class_accuracy", "frechet_distance"} <= report.keys()
    with Image.open(tmp_path / "runs/points/samples.png") as picture:
        assert picture.size[0] > 300
    assert main(["sample", "runs/points", "--out", "grid.png"]) == 0
    assert "1000 images" in capsys.readouterr().out
    assert main(["sample", "runs/points", "--out", "grid.npy", "--count", "3"]) == 0
    assert np.load("grid.npy").shape == (6, 2, 1, 1)
    assert main(["evaluate", "runs/points"]) == 0
    assert "energy" in capsys.readouterr().out
    assert main(["train", "points", "--resume", *small[2:], "--steps", "5", "--shape", "rings"]) == 2
    assert Config.of(data="points", shape="rings").data == Points(shape="rings")
