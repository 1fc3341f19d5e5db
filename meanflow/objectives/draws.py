"""Everything random of a training step, drawn before it: the same for any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """The draws of a batch.

    noise: (B, C, H, W) noise e.
    t, r: (B,) times, r <= t.
    moved: (B,) bool, True where r ≠ t.
    rows: how many of them, known on the host.
    drop: (B,) bool, True where the label is dropped; None: nowhere.
    conditions: further draws by name, (B,) or of the shape of the noise.
    phase: of an objective whose formulas change in the course of training; another phase is another graph.
    """

    noise: Tensor
    t: Tensor
    r: Tensor
    moved: Tensor
    rows: int
    drop: Tensor | None = None
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    phase: str = ""

    @property
    def order(self) -> Tensor:
        """(B,) indices that put the rows with r ≠ t first."""
        return torch.argsort((~self.moved).to(torch.uint8), stable=True)

    def part(self, index: int, parts: int) -> Draws:
        """The draws of the `index`-th of `parts` equal pieces of a batch that was drawn with `spread=True`.

        Raises:
            ValueError: the batch or its rows with r ≠ t cannot be cut into so many equal pieces.
        """
        B = len(self.t)
        if B % parts != 0 or self.rows % parts != 0:
            raise ValueError(
                f"parts: expected a divisor of the batch ({B}) and of its rows with r != t ({self.rows}), got {parts}"
            )
        b = B // parts

        def cut(a: Tensor) -> Tensor:
            return a[index * b : (index + 1) * b]

        return self.map(cut, rows=self.rows // parts)

    def map(self, fn: Callable[[Tensor], Tensor], *, rows: int | None = None) -> Draws:
        """`fn` of every tensor, and another number of rows with r ≠ t if it gives that."""
        return Draws(
            noise=fn(self.noise),
            t=fn(self.t),
            r=fn(self.r),
            moved=fn(self.moved),
            rows=self.rows if rows is None else rows,
            drop=None if self.drop is None else fn(self.drop),
            conditions={name: fn(a) for name, a in self.conditions.items()},
            phase=self.phase,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name."""
        named = {"noise": self.noise, "t": self.t, "r": self.r, "moved": self.moved}
        return {**named, **({} if self.drop is None else {"drop": self.drop}), **self.conditions}


def choose_moved(
    B: int, ratio: float, *, spread: bool, generator: torch.Generator | None, device: torch.device | str
) -> tuple[Tensor, int]:
    """Which rows have r ≠ t, (B,) bool, and their number round(B·ratio).

    Args:
        spread: at even distances instead of at random, so that every equal cut of the batch has equally many. For
            batches in random order.
    """
    rows = round(B * ratio)
    if spread or rows == 0:
        i = torch.arange(B, device=device)  # [B]
        return (i + 1) * rows // B > i * rows // B, rows
    order = torch.randperm(B, generator=generator, device=device)  # [B]
    return order.argsort() < rows, rows
