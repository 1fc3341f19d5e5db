"""Figures of generated images, against closed forms."""

import sys

import pytest
import torch

from meanflow.data import ImageData, TensorImages, load_digits_data
from meanflow.evaluation import (
    class_accuracy,
    evaluate_images,
    evaluation_labels,
    fit_classifier,
    frechet_distance,
)


def with_moments(n: int, mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """n points whose sample mean and covariance are exactly `mean` and root·rootᵀ."""
    x = torch.randn(n, len(mean), dtype=torch.float64)
    x = x - x.mean(dim=0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ root.T + mean


def test_frechet_distance_of_axis_aligned_gaussians():
    """‖Δμ‖² + Σ (σ_a − σ_b)²."""
    mean, zero = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    a = with_moments(50, zero, torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)))
    b = with_moments(70, mean, torch.diag(torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64)))
    assert frechet_distance(a, b) == pytest.approx(5.25 + 1.0 + 2.25, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    """For 2×2, tr((A^½ B A^½)^½)² = tr(AB) + 2 √det(AB)."""
    root_a = torch.tensor([[1.0, 0.0], [0.7, 0.4]], dtype=torch.float64)
    root_b = torch.tensor([[0.3, 0.0], [-0.9, 1.2]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    a, b = with_moments(30, zero, root_a), with_moments(30, zero, root_b)
    A, B = root_a @ root_a.T, root_b @ root_b.T
    cross = ((A @ B).trace() + 2 * torch.linalg.det(A @ B).sqrt()).sqrt()
    assert frechet_distance(a, b) == pytest.approx(float(A.trace() + B.trace() - 2 * cross), rel=1e-9)


def test_a_set_is_at_distance_zero_from_itself_even_with_a_singular_covariance():
    images = torch.randn(20, 1, 8, 8)  # 20 images in 64 dimensions
    images[:, :, 0] = -1.0  # pixels that never change
    assert frechet_distance(images, images.flip(0)) == pytest.approx(0.0, abs=1e-5)


def test_a_shift_of_every_pixel_costs_its_square():
    images = torch.randn(100, 1, 4, 4)
    assert frechet_distance(images, images + 0.5) == pytest.approx(16 * 0.25, rel=1e-4)


def test_sets_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="b: expected images of shape"):
        frechet_distance(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="a: expected at least two images"):
        frechet_distance(torch.zeros(1, 4), torch.zeros(3, 4))


def test_real_digits_give_the_reference_values():
    """Held-out digits: 97 % recognised, at a distance of 0.4 in [-1, 1]."""
    data = load_digits_data()
    classifier = fit_classifier(data.train.images(), data.train.labels)
    kept = data.held_out
    assert class_accuracy(kept.images(), kept.labels, classifier) == pytest.approx(0.97, abs=0.015)
    assert frechet_distance(kept.images(), data.train.images()) == pytest.approx(0.4, abs=0.1)
    assert class_accuracy(kept.images(), (kept.labels + 1) % 10, classifier) < 0.02


def test_labels_keep_the_proportions_of_the_training_set():
    labels = torch.tensor([2] * 30 + [0] * 10)
    assert evaluation_labels(labels, 200).bincount().tolist() == [50, 0, 150]
    assert evaluation_labels(labels, 4).tolist() == [0, 2, 2, 2]


def test_a_report_of_the_real_images_themselves():
    data = load_digits_data()
    figures = evaluate_images(data.train.images(), data.train.labels, data)
    assert figures.frechet_distance == pytest.approx(0.0, abs=1e-4)
    assert figures.class_accuracy > 0.99
    assert figures.held_out_frechet_distance == pytest.approx(0.4, abs=0.1)
    assert figures.note == ""


def blank(n: int, classes: int, size: int) -> ImageData:
    source = TensorImages(torch.rand(n, 1, size, size) * 2 - 1, torch.arange(n) % classes)
    return ImageData("blank", source, None, tuple("abcdef"[:classes]), 1, size)


def test_what_is_not_available_is_said(monkeypatch):
    one_class = blank(6, 1, 4)
    figures = evaluate_images(one_class.train.images(), one_class.train.labels, one_class)
    assert figures.class_accuracy is None
    assert "one class" in figures.note
    large = blank(3, 2, 65)
    assert "too large" in evaluate_images(large.train.images(), large.train.labels, large).note
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    data = blank(6, 2, 4)
    figures = evaluate_images(data.train.images(), data.train.labels, data)
    assert "meanflow[demo]" in figures.note
    assert figures.frechet_distance is not None
