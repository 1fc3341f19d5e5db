"""`meanflow evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tyro.conf import Positional

from ..checks import check_backend
from ..config_file import read_config
from ..errors import UsageError
from ..training.folder import RunFolder
from ..training.network import load_network
from ..training.report import SAMPLES, evaluate_network
from .common import (
    Device,
    Flag,
    check_at_least,
    check_sampling,
    device_of,
    parse,
    reading_flags,
    say,
    say_report,
    source_of,
    with_sampling,
)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Compare generated images with the real ones: class accuracy and pixel-space Frechet distance, in report.json.

    Args:
        run: a run folder or its name
        samples: generated images
        seed: of the noise
        weights: ema: averaged weights; raw: those of the last step; one of the run's --ema-decays; or power:LENGTH, of
            a run with --power-ema
        data: other images to compare with: a folder, wds:PATTERN or hf:NAME; None: what the run was trained on
        codec: where its autoencoder is now, of a run on latents; None: where it was
        trust_code: run the function "package.module:function" that the run names as its model
        device: auto: a GPU if there is one
    """

    run: Positional[str]
    samples: int = SAMPLES
    seed: int = 0
    weights: str = "ema"
    data: str | None = None
    codec: str | None = None
    trust_code: Flag = False
    device: Device = "auto"


def evaluate(args: Sequence[str]) -> int:
    """Class accuracy and Frechet distance of a run"""
    options = parse(with_sampling(Evaluate, args, ("reading", reading_flags(args))), args, prog="evaluate")
    check_at_least(2, options, "samples")
    check_backend()
    folder = RunFolder(source_of(options.run))
    if folder.path.is_file() or (folder.path / "state.json").is_file():
        raise UsageError(f"expected a run folder such as runs/digits, got {folder.path}", field="run")
    device = device_of(options.device)
    loaded = load_network(folder.path, options.weights, device, trust_code=options.trust_code)
    if options.codec is not None:
        loaded = loaded.with_autoencoder(options.codec)
    sampling = check_sampling(options.sampling, loaded)
    standard = loaded.sampling(**sampling) == loaded.objective.sampling
    config, _ = read_config(folder.config, options.trust_code)
    evaluator = config.run.evaluator
    if options.data is not None:
        channels, side, _ = loaded.image_shape
        config = config.replace(data=options.data, **options.reading)
        of_network = {"image_size": side, "grey": channels == 1}
        config = config.replace(**{name: value for name, value in of_network.items() if name in config.values()})
    data = config.data.load()
    report = evaluate_network(
        loaded, data, evaluator, samples=options.samples, seed=options.seed, device=device, **sampling
    )
    if data.left_out is not None and data.left_out.reasons:
        report |= data.left_out.figures()
        say(data.left_out.summary())
    say_report(report, evaluator)
    usual: dict[str, Any] = {"run": "", "sampling": {}, "reading": {}, "codec": None}
    others = dataclasses.replace(options, device="auto", trust_code=False, **usual) == type(options)(**usual)
    if standard and others:
        folder.read_report(evaluator.titles)
        folder.update_report(report, loaded.step)
    else:
        say(f"{folder.report} keeps the figures of the standard evaluation: {SAMPLES} samples, default options.")
    return 0
