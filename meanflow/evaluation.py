"""How good generated images or points are, by their values: no pretrained feature network is needed for small ones.

Every image of pixels is in [-1, 1]. On that scale the 8×8 digits' held-out fifth is at a Fréchet distance of about 0.4
from the rest; in [0, 1] every distance would be a quarter of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .data import ImageData, ImageSource
from .errors import UsageError
from .options import Options
from .registry import register

MAX_FEATURES = 4096  # values per image: beyond, covariances are too large and pixels say too little
NEIGHBOURS = 5  # real points that decide the class of a generated one
MAX_REAL = 10_000  # real images that are compared with, evenly spaced in the data set


class Evaluator(Protocol):
    """What measures generated images.

    titles: of the figures that are printed at the end, by their names in report.json; each may have a reference value,
        of held-out real images, under "held_out_" and its name.
    """

    titles: ClassVar[dict[str, str]]

    def refusal(self, image_shape: tuple[int, int, int]) -> dict[str, Any] | None:
        """The figures where images of that shape are not even drawn; None where they are."""
        ...

    def evaluate(self, images: Tensor, labels: Tensor, data: ImageData) -> dict[str, Any]:
        """Figures by name, as report.json has them, of decoded images (n, C, H, W), generated for `labels` (n,)."""
        ...


@register("evaluators", "pixels")
@dataclass(frozen=True)
class PixelStatistics(Options):
    """Class accuracy and Fréchet distance in pixels, of small images in [-1, 1]."""

    titles: ClassVar[dict[str, str]] = {
        "class_accuracy": "class accuracy",
        "frechet_distance": "pixel-space Frechet distance",
    }

    def refusal(self, image_shape: tuple[int, int, int]) -> dict[str, Any] | None:
        """Null for every figure where images have more than `MAX_FEATURES` values."""
        note = too_large(image_shape)
        return _figures(Evaluation(None, None, None, None, samples=0, note=note)) if note else None

    def evaluate(self, images: Tensor, labels: Tensor, data: ImageData) -> dict[str, Any]:
        """As `evaluate_images`."""
        return _figures(evaluate_images(images, labels, data))


@register("evaluators", "points")
@dataclass(frozen=True)
class PointStatistics(Options):
    """Class accuracy, Fréchet distance and energy distance of points, which may lie anywhere."""

    titles: ClassVar[dict[str, str]] = {
        "class_accuracy": "class accuracy",
        "frechet_distance": "Frechet distance",
        "energy_distance": "energy distance",
    }

    def refusal(self, image_shape: tuple[int, int, int]) -> dict[str, Any] | None:
        """Null for every figure where points have more than `MAX_FEATURES` dimensions."""
        note = too_large(image_shape)
        if not note:
            return None
        return {**{f"{prefix}{key}": None for prefix in ("", "held_out_") for key in self.titles}, "note": note}

    def evaluate(self, images: Tensor, labels: Tensor, data: ImageData) -> dict[str, Any]:
        """Figures of points (n, C, H, W), generated for `labels` (n,), against those that the network was trained on.

        None of them is cut to a range. `class_accuracy` is the share whose label most of the `NEIGHBOURS` nearest real
        points have; Fréchet and energy distance are those of `frechet_distance` and `energy_distance`. "held_out_"
        and a name is the same figure of the held-out real points, where there are any.
        """
        real, real_labels = _subset(data.train)
        figures: dict[str, Any] = {}
        note = ""
        try:
            classifier = fit_neighbours(real, real_labels)
        except UsageError as error:
            classifier, note = None, str(error)
        held_out = _subset(data.held_out) if data.held_out is not None else None
        if not images.isfinite().all():  # of a run that went wrong, which a comparison is to survive
            note = "; ".join(filter(None, [note, "points that are not finite have no figures"]))
            images = images[:0]
        for prefix, found in (("", (images, labels[: len(images)])), ("held_out_", held_out)):
            enough = found is not None and len(found[0]) > 1 and len(real) > 1
            points, own = found if found is not None else (images, labels)
            known = enough and classifier is not None
            figures[f"{prefix}class_accuracy"] = class_accuracy(points, own, classifier) if known else None
            figures[f"{prefix}frechet_distance"] = frechet_distance(points, real) if enough else None
            figures[f"{prefix}energy_distance"] = energy_distance(points, real) if enough else None
        figures = {key: value if value is None else round(value, 5) for key, value in figures.items()}
        return {**figures, "samples": len(images), **({"note": note} if note else {})}


@dataclass(frozen=True)
class Evaluation:
    """Figures of generated images, and the same figures of held-out real ones to compare with; None: not available.

    samples: number of generated images.
    note: why a figure is not available, "" where all are.
    """

    class_accuracy: float | None
    frechet_distance: float | None
    held_out_class_accuracy: float | None
    held_out_frechet_distance: float | None
    samples: int
    note: str = ""


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance between Gaussians fitted to two sets of images, in pixel space.

    ‖μ_a − μ_b‖² + tr(A + B − 2 (A^½ B A^½)^½) with the sets' means and covariances (D. Dowson, B. Landau, 1982): the
    formula of FID (arXiv 1706.08500) on pixels instead of Inception features. In float64; both roots come from
    symmetric eigendecompositions whose small negative eigenvalues, rounding errors of singular covariances, count as
    zero.

    Args:
        a, b: (n, …) sets of at least two images of equal shape, in [-1, 1].

    Raises:
        ValueError: the sets do not fit.
    """
    a, b = _two_sets(a, b)  # [n, D]
    A, B = torch.cov(a.T).view(a.shape[1], -1), torch.cov(b.T).view(b.shape[1], -1)  # [D, D]
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^½ [D, D]
    product = root @ B @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    mean = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return max(0.0, float(mean + A.trace() + B.trace() - 2 * cross))


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E‖X − Y‖ − E‖X − X′‖ − E‖Y − Y′‖ of two sets of points (G. Székely, M. Rizzo, 2013).

    It is 0 only where the distributions are equal; Fréchet distance sees two moments. Every mean is over all pairs,
    those of a point with itself too, so that it is never negative and 0 of a set with itself; of two sets of n points
    of one distribution it is about 2 E‖X − X′‖/n. In float64.

    Args:
        a, b: (n, …) sets of at least two points of equal shape.

    Raises:
        ValueError: the sets do not fit.
    """
    a, b = _two_sets(a, b)  # [n, D], [m, D]
    return max(0.0, 2 * _mean_distance(a, b) - _mean_distance(a, a) - _mean_distance(b, b))


def _mean_distance(a: Tensor, b: Tensor) -> float:
    """Over all pairs, some rows at a time: at most 80 MB."""
    return float(sum(torch.cdist(part, b).sum() for part in a.split(1000)) / (len(a) * len(b)))


def _two_sets(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) float64 each, on the CPU."""
    for name, images in (("a", a), ("b", b)):
        if images.ndim < 2 or len(images) < 2:
            raise ValueError(f"{name}: expected at least two images, (n, …), got shape {tuple(images.shape)}")
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"b: expected images of shape {tuple(a.shape[1:])} like a, got {tuple(b.shape[1:])}")
    return a.detach().cpu().double().flatten(1), b.detach().cpu().double().flatten(1)


def fit_neighbours(points: Tensor, labels: Tensor) -> Any:
    """Vote of the `NEIGHBOURS` nearest real points (scikit-learn's), which suits classes that no plane parts.

    Raises:
        UsageError: scikit-learn is missing.
    """
    try:
        from sklearn.neighbors import KNeighborsClassifier
    except ModuleNotFoundError as error:
        raise UsageError('class accuracy needs scikit-learn: pip install "meanflow[demo]"') from error
    few = min(NEIGHBOURS, len(points))
    return KNeighborsClassifier(few).fit(points.flatten(1).double().numpy(), labels.numpy())


def fit_classifier(images: Tensor, labels: Tensor) -> Any:
    """Multinomial logistic regression on pixels (scikit-learn's, L2 with C = 1), fitted on real images.

    Raises:
        UsageError: scikit-learn is missing.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits  # comes with scikit-learn
    except ModuleNotFoundError as error:
        raise UsageError('class accuracy needs scikit-learn: pip install "meanflow[demo]"') from error
    with threadpool_limits(1):  # on two busy cores, two threads took 5 s where one takes 0.06
        return LogisticRegression(max_iter=5000).fit(images.flatten(1).double().numpy(), labels.numpy())


def class_accuracy(images: Tensor, labels: Tensor, classifier: Any) -> float:
    """Share of images whose label a classifier fitted on real images recognises (arXiv 1905.10887's idea, on pixels).

    Args:
        images: (n, …) in [-1, 1], generated for `labels`.
        labels: (n,).
        classifier: from `fit_classifier`.
    """
    return float((classifier.predict(images.flatten(1).double().numpy()) == labels.numpy()).mean())


def evaluation_labels(labels: Tensor, n: int) -> Tensor:
    """n labels in the proportions of `labels`, ascending."""
    positions = ((torch.arange(n, dtype=torch.float64) + 0.5) * (len(labels) / n)).long()
    return labels.sort().values[positions]


def _subset(source: ImageSource) -> tuple[Tensor, Tensor]:
    if len(source) <= MAX_REAL:
        return source.images(), source.labels
    chosen = torch.linspace(0, len(source) - 1, MAX_REAL).round().long()
    return source.images(chosen.tolist()), source.labels[chosen]


def too_large(shape: Sequence[int]) -> str:
    """Why images of this shape get no figures; "" where they do."""
    features = math.prod(shape)
    if features <= MAX_FEATURES:
        return ""
    return f"images of {features} values are too large for pixel-space figures (at most {MAX_FEATURES})"


def evaluate_images(images: Tensor, labels: Tensor, data: ImageData) -> Evaluation:
    """Compare generated images with the real ones that the network was trained on.

    Args:
        images: (n, C, H, W), generated for `labels`; cut to [-1, 1] first, as any picture file would, or to the
            range of the real ones where that is wider.
        labels: (n,).
        data: the real images; its held-out part, if any, gives the reference values.
    """
    n, note = len(images), too_large(images.shape[1:])
    if note:
        return Evaluation(None, None, None, None, samples=n, note=note)
    real, real_labels = _subset(data.train)
    images = images.clamp(min(-1.0, float(real.min())), max(1.0, float(real.max())))
    kept = _subset(data.held_out) if data.held_out is not None else None
    accuracy = held_out_accuracy = None
    if data.num_classes < 2:
        note = "class_accuracy: there is one class only"
    else:
        try:
            classifier = fit_classifier(real, real_labels)
            accuracy = class_accuracy(images, labels, classifier)
            held_out_accuracy = class_accuracy(*kept, classifier) if kept else None
        except UsageError as error:
            note = str(error)
    return Evaluation(
        class_accuracy=accuracy,
        frechet_distance=frechet_distance(images, real) if len(real) > 1 else None,
        held_out_class_accuracy=held_out_accuracy,
        held_out_frechet_distance=frechet_distance(kept[0], real) if kept and len(kept[0]) > 1 else None,
        samples=n,
        note=note,
    )


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    figures = {key: round(a, 4) if isinstance(a, float) else a for key, a in asdict(evaluation).items()}
    return {key: value for key, value in figures.items() if key != "note" or value}
