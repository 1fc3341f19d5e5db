"""The tests with other versions of PyTorch, each in an environment of its own: `nox -s newest`; `nox -l` lists them.

Each session runs the import, the tests and a short training run. `nox -s oldest -- tests/dualize` runs those tests
alone, `nox -s newest -- --smoke` runs .ci/smoke.py alone: that is skipped, and says so, where the newest release cannot
be installed within five minutes.
"""

import nox
from nox.command import CommandFailed

nox.options.sessions = ["oldest", "device", "pinned", "newest"]


@nox.session
def oldest(session: nox.Session) -> None:
    """The oldest PyTorch that README.md names."""
    check(session, "torch==2.6.*", "torchvision==0.21.*")


@nox.session
def device(session: nox.Session) -> None:
    """That of the GPU machine, and the oldest with torch.compile."""
    # Triton 3.6's interpreter fails with numpy 2.4, see constraints.txt
    check(session, "torch==2.11.*", "torchvision==0.26.*", "numpy<2.4")


@nox.session
def pinned(session: nox.Session) -> None:
    """That of constraints.txt, which .ci/run has tested."""
    check(session, "-c", "constraints.txt", "torch", "torchvision")


@nox.session
def newest(session: nox.Session) -> None:
    """The newest that pip finds."""
    check(session, "--upgrade", "torch", "torchvision")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Thousands of random modules, dualized and compared."""
    campaign(session, "random_checks", ["5000"])


@nox.session
def fuzz_ops(session: nox.Session) -> None:
    """Random calls of every op, right and wrong ones: 20,000 on the reference, 20,000 in Triton's interpreter."""
    backends = [["--backend", backend] for backend in ("reference", "triton")]
    campaign(session, "op_fuzz", ["20000"], *backends, env={"TRITON_INTERPRET": "1"})


@nox.session
def fuzz_files(session: nox.Session) -> None:
    """A thousand damaged and hostile files of runs: refused, or of no matter; none runs code."""
    campaign(session, "damage", ["1000"])


@nox.session
def kills(session: nox.Session) -> None:
    """Runs killed three hundred times, in one process, under DDP and FSDP2: each ends with the same curve."""
    campaign(session, "kills", ["300"])


def campaign(
    session: nox.Session, module: str, default: list[str], *options: list[str], env: dict[str, str] | None = None
) -> None:
    """Run a module of tests/support with the pinned PyTorch, once with each of `options`."""
    install(session, "-c", "constraints.txt", "torch", "torchvision", "triton", "-e", ".[test]")
    environment = {"PYTHONPATH": "tests/support", **(env or {})}
    for some in options or ([],):
        session.run("python", "-m", module, *some, *(session.posargs or default), env=environment)


def check(session: nox.Session, *torch: str) -> None:
    if "--smoke" in session.posargs:
        smoke(session, *torch)
        return
    install(session, *torch, "-e", ".[test]")
    session.run("python", "-c", "import torch, mfkernels, meanflow; print('torch', torch.__version__)")
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "loadfile", "-p", "no:benchmark", *session.posargs)
    session.chdir(session.create_tmp())
    session.run("meanflow", "train", "digits", "--steps", "20")


def smoke(session: nox.Session, *torch: str) -> None:
    try:
        install(session, *torch, "-e", ".", seconds=300)
    except CommandFailed:
        session.skip(f"the {session.name} PyTorch could not be installed within five minutes, so it was not tested")
    session.run("python", ".ci/smoke.py")


def install(session: nox.Session, *what: str, seconds: int | None = None) -> None:
    environment = {"MFKERNELS_CUDA": "0"}  # the CUDA kernels are built and tested by .ci/wheels
    if seconds is None:
        session.install(*what, env=environment)
    else:
        # pip by itself waits for an index that does not answer for longer than anybody waits for CI
        environment |= {"PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "20"}
        pip = ("python", "-m", "pip", "install", "-q", "--no-compile")
        session.run("timeout", str(seconds), *pip, *what, env=environment, external=True)
