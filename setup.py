"""Compiles mfkernels._C (csrc/) where CUDA's nvcc is at hand; everything else is in pyproject.toml.

MFKERNELS_CUDA           unset: compile if there is an nvcc that can; 0: never; 1: it is an error if it cannot be done
MFKERNELS_CUDA_ARCHS     architectures to compile for, as "sm_90a" (the default: all that csrc has kernels for)
MFKERNELS_CUDA_WATCHDOG  1: a kernel that waits for over a second stops with an error (csrc/hopper/mbarrier.cuh); for
                         tests of a new kernel or a new GPU
CUDA_HOME                where the toolkit is, if nvcc is not on the PATH
MAX_JOBS                 compilers at a time; CXX, CXXFLAGS: the host's compiler and more flags for it

Without pip and with any setuptools, or none, from the repository root:

    python -c "import setup; setup.build_in_place()"

compiles the extension into mfkernels/, where Python finds it with this folder on its PYTHONPATH. It needs nvcc, a C++
compiler, ninja and pybind11.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(str(path.relative_to(ROOT)) for kind in ("*.cu", "*.cpp") for path in (ROOT / "csrc").rglob(kind))
KERNELS_FOR = ("sm_90a",)


def find_nvcc() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((Path(path) for path in candidates if path and os.access(path, os.X_OK)), None)


def toolkit_of(nvcc: Path) -> Path:
    """The toolkit's folder, from what nvcc itself says: it may be a script somewhere else."""
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    return Path(top[1]) if top else nvcc.resolve().parents[1]


def architectures() -> list[str]:
    asked = os.environ.get("MFKERNELS_CUDA_ARCHS")
    chosen = re.split(r"[\s,;]+", asked.strip()) if asked and asked.strip() else list(KERNELS_FOR)
    for arch in chosen:
        if arch not in KERNELS_FOR:
            sys.exit(f"MFKERNELS_CUDA_ARCHS: expected any of {', '.join(KERNELS_FOR)}, got {arch!r}")
    return chosen


def watchdog() -> bool:
    wish = os.environ.get("MFKERNELS_CUDA_WATCHDOG", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"MFKERNELS_CUDA_WATCHDOG: expected 0 or 1 (or nothing), got {wish!r}")
    return wish == "1"


def compiler() -> Path | None:
    """nvcc, where the CUDA extension is to be compiled."""
    wish = os.environ.get("MFKERNELS_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"MFKERNELS_CUDA: expected 0 or 1 (or nothing), got {wish!r}")
    chosen = architectures()
    watchdog()  # a wish that makes no sense is an error even where nothing is compiled
    if wish == "0":
        return None
    nvcc, reason = find_nvcc(), None
    if nvcc is None:
        reason = "found no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda"
    else:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
        missing = [a for a in chosen if f"compute_{a.removeprefix('sm_').rstrip('a')}" not in listed.stdout.split()]
        if listed.returncode != 0 or missing:
            reason = f"{nvcc} cannot compile for {', '.join(missing) or chosen}: {listed.stderr.strip()}"
    if reason is None:
        return nvcc
    if wish == "1":
        sys.exit(f"MFKERNELS_CUDA=1 asks for the CUDA extension, but setup.py {reason}")
    print(f"no CUDA extension: setup.py {reason}", file=sys.stderr)
    return None


def flags(toolkit: Path) -> dict[str, list[str]]:
    """Every flag of every compiler."""
    import pybind11

    archs = architectures()
    host = ["-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *shlex.split(os.environ.get("CXXFLAGS", ""))]
    includes = [f"-I{ROOT / 'csrc'}"]
    system = [toolkit / "include", pybind11.get_include(), sysconfig.get_paths()["include"]]
    return {
        "nvcc": [
            "-std=c++17",
            "-O3",
            *(f"-gencode=arch=compute_{arch.removeprefix('sm_')},code={arch}" for arch in archs),
            f"-Xcompiler={','.join(host)}",
            *includes,
            *(["-DMF_WATCHDOG"] if watchdog() else []),
        ],
        "cxx": [
            "-std=c++17",
            *host,
            *includes,
            *(f"-isystem{path}" for path in system),
            f'-DMF_ARCHITECTURES="{" ".join(archs)}"',
        ],
        # the runtime inside, its names hidden: PyTorch has one of its own, of any version
        "link": ["-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", "-Xlinker=--strip-debug"],
    }


def compile_kernels(command: Sequence[str]) -> None:
    """Runs nvcc's command, and ends in an error where ptxas leaves out what the kernels are written for.

    It says so in a remark, C7510 to C7519 and their like, and goes on: products run one at a time, or a warpgroup does
    not get the registers that another gave back.
    """
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    said = done.stdout + done.stderr
    print(said, end="", file=sys.stderr)
    if done.returncode != 0:
        sys.exit(done.returncode)
    remarks = sorted(set(re.findall(r"\(C75\d\d\)[^\n]*", said)))
    if remarks:
        sys.exit(
            "expected kernels whose products overlap, but ptxas says:\n  "
            + "\n  ".join(remarks)
            + "\nAnother version of CUDA may do better (csrc/README.md says which one was used)."
        )


def shell(*words: str | Path) -> str:
    """The words as a ninja command; paths may hold anything."""
    return shlex.join(map(str, words)).replace("$", "$$")


def ninja_path(path: str | Path) -> str:
    """A path in a line of ninja's that names files."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def build(target: Path, sources: Sequence[str] = SOURCES) -> None:
    """Compiles the sources (paths within the repository) and links them as `target`."""
    import ninja

    nvcc = compiler()
    if nvcc is None:
        sys.exit("the CUDA extension was not compiled")
    target.parent.mkdir(parents=True, exist_ok=True)
    # not setuptools' temporary folder: a second install compiles only what has changed
    folder = ROOT / "build" / "csrc"
    folder.mkdir(parents=True, exist_ok=True)
    options = {name: shell(*values) for name, values in flags(toolkit_of(nvcc)).items()}
    cxx = shell(*shlex.split(os.environ.get("CXX", "c++")))
    code = "import sys; sys.path.insert(0, sys.argv[1]); import setup; setup.compile_kernels(sys.argv[2:])"
    lines = [
        "rule nvcc",
        "  depfile = $out.d",
        "  deps = gcc",
        f"  command = {shell(sys.executable, '-c', code, ROOT, nvcc)} {options['nvcc']} -MD -MF $out.d -c $in -o $out",
        "rule cxx",
        "  depfile = $out.d",
        "  deps = gcc",
        f"  command = {cxx} {options['cxx']} -MD -MF $out.d -c $in -o $out",
        "rule link",
        f"  command = {shell(nvcc)} {options['link']} $in -o $out",
    ]
    objects = []
    for source in sources:
        objects.append(source.replace("/", "_") + ".o")
        rule = "nvcc" if source.endswith(".cu") else "cxx"
        lines.append(f"build {objects[-1]}: {rule} {ninja_path(ROOT / source)}")
    lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = os.environ.get("MAX_JOBS")
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *(["-j", jobs] if jobs else [])]
    if subprocess.run(command).returncode != 0:
        sys.exit("the CUDA extension did not compile; MFKERNELS_CUDA=0 installs without it")


def build_in_place() -> Path:
    target = ROOT / "mfkernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    build(target)
    return target


def main() -> None:
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext

    class NinjaBuild(build_ext):
        def build_extension(self, ext: Extension) -> None:
            build(Path(self.get_ext_fullpath(ext.name)).resolve(), ext.sources)

    setup(
        ext_modules=[Extension("mfkernels._C", SOURCES)] if compiler() is not None else [],
        cmdclass={"build_ext": NinjaBuild},
    )


if __name__ == "__main__":  # so it is called in a build by pip, too
    main()
