"""What the folders of ops have beside the ops: modules of one name, such as `tuning`, found without a list of ops."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType


def modules_of_ops(name: str) -> list[ModuleType]:
    """The module of this name in each folder of an op that has one."""
    paths = sorted(Path(__file__).parent.glob(f"*/{name}.py"))
    return [importlib.import_module(f"mfkernels.{path.parent.name}.{name}") for path in paths]
