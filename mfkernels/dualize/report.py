"""Which operations of a dualized module have no tangent rule of their own, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .call import Call


@dataclass
class Line:
    """One kind of operation.

    calls: how often it ran.
    seconds: in its tangents.
    """

    calls: int = 0
    seconds: float = 0.0


@dataclass
class Report:
    """What `dualize(model, report=True)` saw since it was made or cleared.

    rules: ATen operators whose tangent is written out, by name.
    jvp: operations that went through `torch.func.jvp` one by one, on the rows that carry tangents.
    zero_filled: operations after which those rows are no prefix, so that zeros stand for the others.
    seconds: in all dual passes, hooks and the user's Python included. On CUDA kernels run on after their launch: the
        times are those of the launches, unless CUDA_LAUNCH_BLOCKING=1.
    """

    rules: dict[str, Line] = field(default_factory=dict)
    jvp: dict[str, Line] = field(default_factory=dict)
    zero_filled: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, call: Call, seconds: float) -> None:
        line = (self.jvp if call.jvps else self.rules).setdefault(call.name, Line())
        line.calls += 1
        line.seconds += seconds

    def filled(self, call: Call) -> None:
        self.zero_filled[call.name] = self.zero_filled.get(call.name, 0) + 1

    def clear(self) -> None:
        """Start anew."""
        self.rules.clear()
        self.jvp.clear()
        self.zero_filled.clear()
        self.seconds = 0.0

    @property
    def jvp_share(self) -> float:
        """Share of the time of all dual passes that went into `jvp`."""
        return sum(line.seconds for line in self.jvp.values()) / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        total = self.seconds or 1.0
        rows = [f"{'tangent':<36}{'calls':>7}{'share of time':>15}"]
        for title, lines in (("rule", self.rules), ("torch.func.jvp", self.jvp)):
            for name, line in sorted(lines.items(), key=lambda item: -item[1].seconds):
                rows.append(f"{name + ', ' + title:<36}{line.calls:>7}{line.seconds / total:>14.1%}")
        for name, calls in self.zero_filled.items():
            rows.append(f"{name + ', zero rows filled in':<36}{calls:>7}")
        return "\n".join(rows)
