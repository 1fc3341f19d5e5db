"""What is loaded when: `meanflow --help` answers before PyTorch is there, and pictures load matplotlib. No circles."""

import ast
import graphlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import meanflow
import meanflow.training
import mfkernels


def loaded_after(code: str, *modules: str) -> list[str]:
    """Those of `modules` that a new Python has loaded after `code`."""
    code += f"\nimport sys; print('loaded:', *[name for name in {modules!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("line", ["--help", "--version", "nonsense", "", "data check --help"])
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


def imports(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Those of `modules` that one of them imports, anywhere in its file: in functions and for type checkers too."""
    package, found = name if path.name == "__init__.py" else name.rpartition(".")[0], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            # `from .attention import cuda` names a module, `from .attention import attention` a function of one
            named = [f"{base}.{alias.name}" for alias in node.names]
            found |= {full if full in modules else base for full in named}
    for full in list(found):  # importing p.c.d runs p/c/__init__.py first
        parents = {full[:i] for i, letter in enumerate(full) if letter == "."}
        found |= {parent for parent in parents if not f"{name}.".startswith(f"{parent}.")}
    return found & modules.keys()


def circle(package: Path) -> list[str]:
    """Modules of a package that import each other in a circle, if there are any."""
    modules = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = graphlib.TopologicalSorter({name: imports(name, path, modules) for name, path in modules.items()})
    try:
        graph.prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("package", [mfkernels, meanflow])
def test_no_module_imports_itself_through_others(package):
    assert circle(Path(package.__file__).parent) == []


@pytest.mark.parametrize(
    "line",
    ["from . import b", "from .b import name", "import p.b", "def f():\n    from p.b import name", "from .. import p"],
)
def test_circles_are_found(tmp_path, line):
    package = tmp_path / "p"
    (package / "c").mkdir(parents=True)
    (package / "__init__.py").write_text("from .c import d")
    (package / "b.py").write_text("from . import a")
    (package / "a.py").write_text("" if ".. " in line else line)
    (package / "c" / "__init__.py").write_text("")
    (package / "c" / "d.py").write_text(line if ".. " in line else "from ..a import name")
    assert set(circle(package)) == ({"p", "p.c.d"} if ".. " in line else {"p.a", "p.b"})
