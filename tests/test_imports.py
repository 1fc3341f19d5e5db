"""What is loaded when: `meanflow --help` answers before PyTorch is there, and pictures load matplotlib."""

import pickle
import subprocess
import sys

import pytest

import meanflow
import meanflow.training


def loaded_after(code: str, *modules: str) -> list[str]:
    """Those of `modules` that a new Python has loaded after `code`."""
    code += f"\nimport sys; print('loaded:', *[name for name in {modules!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("line", ["--help", "--version", "nonsense", "", "sample --help", "data check --help"])
def test_help_comes_without_pytorch(line):
    code = f"from meanflow import cli\ntry: cli.main({line.split()!r})\nexcept SystemExit: pass"
    assert loaded_after(code, "torch", "matplotlib", "accelerate", "numpy") == []


def test_averages_and_information_come_without_what_trains():
    code = "import meanflow.training.ema\nfrom meanflow import cli\ncli.main(['info', '--device', 'cpu'])"
    modules = ("torch", "matplotlib", "accelerate", "sklearn", "torch.distributed.tensor", "torch._dynamo")
    assert loaded_after(code, *modules) == ["torch"]


@pytest.mark.parametrize("package", [meanflow, meanflow.training])
def test_names_that_are_imported_late_are_all_there(package):
    for name in package.__all__:
        assert name in dir(package)
        value = getattr(package, name)
        assert pickle.loads(pickle.dumps(value)) is value
    with pytest.raises(AttributeError, match=rf"module '{package.__name__}' has no attribute 'nonsense'"):
        package.nonsense  # noqa: B018
