"""A run of a tiny network on the digits, for tests of what surrounds it."""

from pathlib import Path

from meanflow.config import Config
from meanflow.training import Trainer
from meanflow.training.log import read_log

TINY = Config.of(
    data="digits",
    name="tiny",
    model="DiT",
    hidden_size=16,
    depth=1,
    num_heads=2,
    patch_size=4,
    ratio=0.5,
    omega=1.0,
    kappa=0.3,
    steps=6,
    batch_size=8,
    lr=1e-2,
    warmup_steps=2,
    schedule="cosine",
    device="cpu",
    log_every=1,
    checkpoint_every=3,
    sample_every=0,
    evaluate=False,
)


IMF = {
    "objective": "imf",
    "model": "iMF-DiT",
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "patch_size": 4,
    "aux_head_depth": 1,
    "prefix_tokens": (1, 1, 1, 1),
    "ratio": 0.5,
}


def of_objective(name: str, **values) -> dict:
    """What makes `TINY` a run of another objective; `values` where it has them."""
    changes = {"meanflow": {}, "imf": IMF, "flow_matching": {"objective": name}}[name]
    config = TINY.replace(**changes)
    return {**changes, **{key: value for key, value in values.items() if key in config.values()}}


def losses(name: str) -> list[float]:
    return [row["loss"] for row in read_log(Path("runs") / name / "log.jsonl")]


def stop_after(monkeypatch, steps: int) -> None:
    """A run that is interrupted after so many steps."""
    monkeypatch.setattr(Trainer, "_stop", lambda self, signals: self.step >= steps)
