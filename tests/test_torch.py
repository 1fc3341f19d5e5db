"""Private names of PyTorch: one file has them, all are there, and one that is not says what cannot be done."""

import re
from pathlib import Path

import pytest
import torch

from mfkernels import _torch

ROOT = Path(__file__).parents[1]
PRIVATE = re.compile(
    r"torch[.\w]*\._[a-z]\w*|from torch[.\w]* import .*\b_[a-z]|aten\._[a-z]\w*|__code__"
    r"|\._(schema|overloadname|version|base|cdata)\b",
    re.I,
)


def test_no_other_file_has_private_names():
    files = [path for package in ("mfkernels", "meanflow") for path in (ROOT / package).rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        if path != ROOT / "mfkernels" / "_torch.py"
        for match in PRIVATE.finditer(path.read_text())
    ]
    assert not found, found


def test_this_pytorch_has_every_name():
    assert [name for name, value in vars(_torch).items() if isinstance(value, _torch.Missing)] == []


@pytest.mark.parametrize("name", ["torch.utils._no_such:tree_map", "torch.utils._pytree:no_such", "torch:ops.aten._no"])
def test_a_missing_name_says_so_where_it_is_used(name):
    missing = _torch.lookup(name, "nested arguments")
    assert not missing
    version, spelled = re.escape(torch.__version__), re.escape(name.replace(":", "."))
    with pytest.raises(NotImplementedError, match=f"nested arguments: torch {version} does not have {spelled}, a priv"):
        missing(1, key=2)


def test_the_module_inside_a_compiled_one_is_found():
    net = torch.nn.Linear(2, 2)
    assert _torch.before_compile(torch.compile(net, backend="eager")) is net
    assert _torch.before_compile(net) is None
