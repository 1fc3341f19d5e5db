"""The command line: train, sample, evaluate, compare, recipes, encode, convert, data, info."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .errors import TrainingError, UsageError
from .output import handling_broken_pipes
from .processes import world_size

# Each is a function of that name in a module of that name in meanflow.commands.
COMMANDS = {
    "train": "Train a network",
    "sample": "Draw images from a trained network",
    "evaluate": "Class accuracy and Frechet distance of a run",
    "compare": "Train several methods with one budget, and draw what each reaches",
    "recipes": "Every recipe: what it costs, and what its paper reports",
    "encode": "Latents of a folder of images, by a pretrained autoencoder",
    "convert": "Weights of other programs as a safetensors file",
    "data": "Read every image of a data set: meanflow data check FOLDER",
    "info": "Versions, devices, and which backend serves which operation",
}

# What needs less memory, by command.
LESS = {
    "train": "a smaller --batch-size, a larger --accumulate, or --checkpoint-blocks all",
    "sample": "a smaller --count, or fewer --labels",
    "evaluate": "fewer --samples",
    "compare": "fewer --samples",
    "encode": "a smaller --batch-size",
    "data": "a smaller --image-size",
    "info": "--device cpu",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 training failed (or `data check` found something), 2 a usage
    error, 130 after Ctrl-C, 141 where stdout is closed.

    One of several processes (torchrun, accelerate launch) whose program this is (`argv` is None) ends here.
    """
    if argv is None and os.environ.get("WORLD_SIZE", "1") != "1":
        _run_and_leave(sys.argv[1:])
    return _run(list(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    with handling_broken_pipes():
        return _command(argv)


def _command(argv: list[str]) -> int:
    commands = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="meanflow",
        description="Train one-step generative models, and draw images from them.",
        epilog=f"commands:\n{commands}\n\n`meanflow COMMAND --help` lists its options. Try: meanflow train digits",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"meanflow {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    if not argv:
        parser.print_help()
        return 0
    options = parser.parse_args(argv[:1])
    try:
        if options.command not in ("train", "encode", "info") and world_size() > 1:
            raise UsageError(
                f"this command works in one process, and {world_size()} were started; start it without torchrun",
                field="WORLD_SIZE",
            )
        module = importlib.import_module(f".commands.{options.command}", __package__)
        return int(getattr(module, options.command)(argv[1:]))
    except KeyboardInterrupt as error:
        code, words = 130, str(error) or "interrupted"
    except TrainingError as error:
        code, words = 1, str(error)
    except (UsageError, OSError) as error:  # OSError: what the disk or its permissions refuse
        code, words = 2, str(error)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        less = LESS.get(options.command)
        cure = f" Ask for less at a time: {less}" if less else ""
        code, words = 2, f"out of memory: {str(error).splitlines()[0]}.{cure}"
    print(f"meanflow {options.command}: {words}", file=sys.stderr)
    return code


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "DefaultCPUAllocator" in str(error)  # PyTorch's on a CPU is a plain RuntimeError


def _run_and_leave(argv: list[str]) -> NoReturn:
    """Leave without tearing the interpreter down: a process group's threads can abort that, and hide the exit code."""
    try:
        code = _run(argv)
    except SystemExit as stop:  # the parsers' way out
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
