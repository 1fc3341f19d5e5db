"""Runs of a tiny network: resuming, stopping, failing, and what they leave behind."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from minimum import needs_compile
from safetensors.torch import load_file
from tiny_runs import TINY, losses, of_objective, stop_after
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from meanflow.config import Config
from meanflow.data import ImageData, TensorImages, load_digits_data
from meanflow.errors import UsageError
from meanflow.models import DiT
from meanflow.tf32 import tensor_float32
from meanflow.training import (
    EMA,
    RunFolder,
    Trainer,
    TrainingError,
    accelerator,
    list_checkpoints,
    load_network,
    make_accelerator,
    parallel,
    run_training,
)
from meanflow.training.log import read_log

HALF_LOSS = 4e-4  # relative, against float32; measured 1.9e-4


pytestmark = pytest.mark.usefixtures("own_folder")


def trainer(config: Config, data: ImageData | None = None) -> Trainer:
    folder = RunFolder.named(config.run.name)
    return Trainer(config, data or load_digits_data(), folder, make_accelerator(config, folder))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("objective", ["meanflow", "imf", "flow_matching"])
def test_a_resumed_run_continues_the_same_curve(monkeypatch, accumulate, objective):
    config = TINY.replace(accumulate=accumulate, flip=True, **of_objective(objective))
    run_training(config.replace(name="whole"))
    with monkeypatch.context() as interrupted:
        stop_after(interrupted, 4)  # not a multiple of checkpoint_every
        run_training(config.replace(name="parts"))
    assert len(losses("parts")) == 4
    torch.manual_seed(99)  # a new process has another global generator
    run_training(config.replace(name="parts"), resume=True)
    assert losses("parts") == losses("whole")
    whole, parts = (list_checkpoints(Path("runs") / name / "checkpoints")[-1] for name in ("whole", "parts"))
    for file in ("model", "ema", "optimizer"):
        a, b = load_file(whole / f"{file}.safetensors"), load_file(parts / f"{file}.safetensors")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), file


def test_rows_that_a_crash_left_behind_are_not_logged_twice(monkeypatch):
    with monkeypatch.context() as interrupted:
        stop_after(interrupted, 4)
        run_training(TINY)
    log = Path("runs/tiny/log.jsonl")
    log.write_text(
        log.read_text() + json.dumps({"step": 5, "loss": 7.0, "squared_error": 7.0}) + "\n" + '{"step": 6, "lo'
    )
    run_training(TINY, resume=True)
    assert [row["step"] for row in read_log(log)] == [1, 2, 3, 4, 5, 6]
    assert 7.0 not in losses("tiny")


def test_off_a_terminal_there_is_a_line_a_minute(monkeypatch, capsys):
    monkeypatch.setattr("meanflow.training.log.SECONDS", 0.0)
    run_training(TINY.replace(steps=30))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [f"tiny: step {step}/30" for step in range(1, 31)]


@pytest.mark.parametrize("objective", ["meanflow", "imf", "flow_matching"])
def test_accumulation_changes_nothing(objective):
    """The same samples, the same draws, and as many of them with r ≠ t in each part."""
    config = TINY.replace(flip=True, **of_objective(objective, norm_p=0.5, kappa=0.0, omega=2.0))
    for accumulate in (1, 4):
        run_training(config.replace(accumulate=accumulate, name=f"in{accumulate}"))
    assert losses("in4") == pytest.approx(losses("in1"), rel=1e-5)


def test_parts_must_share_the_rows_that_carry_tangents():
    with pytest.raises(UsageError, match=r"2 of the batch's 8 samples have r != t; expected a multiple of 4"):
        run_training(TINY.replace(accumulate=4, ratio=0.25))


@pytest.mark.parametrize("count", [1, "all"])
def test_checkpointed_blocks_change_nothing(count):
    config = TINY.replace(depth=2)
    run_training(config.replace(name="plain"))
    run_training(config.replace(name="recomputed", checkpoint_blocks=count))
    assert losses("recomputed") == losses("plain")
    with pytest.raises(UsageError, match="checkpoint_blocks: expected 'all' or a number up to 2"):
        run_training(config.replace(name="more", checkpoint_blocks=3))
    with pytest.raises(UsageError, match="checkpoint_blocks: expected 'all' or at least 0, got -1"):
        config.replace(checkpoint_blocks=-1)


@needs_compile
@pytest.mark.parametrize("count", [0, "all"])
def test_a_compiled_run_gives_the_same_losses_and_compiles_once(monkeypatch, count):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compile(fn, backend=counter, **options))
    run_training(TINY.replace(name="eager"))
    run_training(TINY.replace(name="compiled", compile=True, checkpoint_blocks=count))
    assert losses("compiled") == pytest.approx(losses("eager"), rel=1e-5)
    assert counter.frame_count == 1


def test_fsdp_names_a_parameter_that_it_cannot_cut(monkeypatch, tmp_path):
    config = TINY.replace(strategy="fsdp")
    net = torch.nn.Linear(2, 2)
    net.scale = torch.nn.Parameter(torch.ones(()))
    monkeypatch.setattr(parallel, "is_sharded", lambda config, accelerator: True)
    with pytest.raises(UsageError, match=r"strategy: fsdp .* scale is a single number; make it of shape \(1,\)"):
        parallel.training_loss(net, config.objective, config, make_accelerator(config, RunFolder(tmp_path)))


def test_compiling_needs_a_newer_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(UsageError, match=r"compile: expected torch 2\.11 or newer, found 2\.9\.1"):
        run_training(TINY.replace(compile=True))


def test_sharding_a_cpu_needs_a_newer_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    monkeypatch.setattr(accelerator, "is_sharded", lambda config, accelerator: True)
    with pytest.raises(UsageError, match=r"strategy: fsdp on a CPU: expected torch 2\.7 or newer, found 2\.6\.0"):
        make_accelerator(TINY.replace(strategy="fsdp"), RunFolder(tmp_path))


@needs_compile
def test_cuda_graphs_need_a_gpu():
    with pytest.raises(UsageError, match="compile_mode: reduce-overhead records CUDA graphs"):
        run_training(TINY.replace(compile=True, compile_mode="reduce-overhead"))
    assert not Path("runs").exists()


@pytest.mark.parametrize("objective", ["meanflow", "imf", "flow_matching"])
def test_a_step_reads_nothing_on_the_host_and_has_no_shape_that_depends_on_data(objective):
    """On tensors without values, where either is an error: such a step can be recorded as a CUDA graph."""
    config = TINY.replace(**of_objective(objective))
    data = load_digits_data()
    with FakeTensorMode():
        net, of = config.network(data), config.objective
        ema = EMA(net, 0.9)
        x = torch.zeros(8, 1, 8, 8)  # [B, C, H, W]
        y = torch.zeros(8, dtype=torch.long)  # [B]
        draws = of.draw((16, 1, 8, 8), generator=torch.Generator(), spread=True)
        of.loss(net, x, y, draws.part(1, 2)).loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        ema.update(net, 0)
        with pytest.raises(DataDependentOutputException):  # what a read on the host would do
            bool(x.any())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(monkeypatch, value):
    step = Trainer._train_step

    def bad(self, batches):
        figures = step(self, batches)
        if self.step == 4:  # the fifth
            figures[0] = value
        return figures

    monkeypatch.setattr(Trainer, "_train_step", bad)
    with pytest.raises(TrainingError, match=r"at step 5.*step_00000003.*--resume --name tiny"):
        run_training(TINY.replace(log_every=6))
    assert [path.name for path in list_checkpoints(Path("runs/tiny/checkpoints"))] == ["step_00000003"]


def test_weights_that_are_not_finite_are_never_saved(monkeypatch):
    """A gradient that is NaN while the loss is finite, in the very step of a checkpoint."""
    step = Trainer._train_step

    def bad(self, batches):
        figures = step(self, batches)
        if self.step == 2:
            figures[2] = math.nan
        return figures

    monkeypatch.setattr(Trainer, "_train_step", bad)
    with pytest.raises(TrainingError, match="No checkpoint had been written"):
        run_training(TINY)
    assert list_checkpoints(Path("runs/tiny/checkpoints")) == []


def test_images_that_are_not_finite_are_told_from_a_learning_rate_that_is_too_high(monkeypatch):
    class Broken(TensorImages):
        def images(self, indices=None):
            return torch.full_like(super().images(indices), math.nan)

        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return torch.full_like(x, math.nan), y

    data = load_digits_data()
    data = dataclasses.replace(data, train=Broken(data.train.images()[:20], data.train.labels[:20]))
    Path("runs/tiny").mkdir(parents=True)
    with pytest.raises(ValueError, match="x: expected finite values, got nan"):
        trainer(TINY, data).run()
    monkeypatch.setattr("meanflow.checks.can_read", lambda x: False)  # as on a GPU
    with pytest.raises(TrainingError, match=r"the loss is nan .* its batch has images with values that are not finite"):
        trainer(TINY, data).run()


def test_weights_that_the_last_step_spoilt_are_never_saved(monkeypatch):
    """An update that overflows though the loss and the gradient before it are finite."""
    step = Trainer._train_step

    def bad(self, batches):
        figures = step(self, batches)
        if self.step == 5:
            self.parameters[0].data.view(-1)[0] = math.inf
        return figures

    monkeypatch.setattr(Trainer, "_train_step", bad)
    with pytest.raises(
        TrainingError, match=r"x_embedder.* is not finite after step 6.*step_00000003; continue from it"
    ):
        run_training(TINY)
    assert [path.name for path in list_checkpoints(Path("runs/tiny/checkpoints"))] == ["step_00000003"]


def test_an_image_that_cannot_be_read_keeps_what_was_trained():
    class Breaks(TensorImages):
        def __getitem__(self, index):
            if index == len(self) - 1:
                raise UsageError("data: cannot read the image last.png")
            return super().__getitem__(index)

    data = load_digits_data()
    source = Breaks(data.train.images()[:20], data.train.labels[:20])
    t = trainer(TINY, dataclasses.replace(data, train=source))
    t.folder.path.mkdir(parents=True)
    with pytest.raises(UsageError, match=r"last\.png"):
        t.run()
    assert t.step > 0
    assert t.folder.newest().name == f"step_{t.step:08d}"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_continue(number, code):
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY.replace(steps=100_000, name="stopped").to_dict()))
    command = [sys.executable, "-m", "meanflow", "train", "--config", "tiny.yaml"]
    # A shell that runs tests in the background may have SIGINT ignored; the handler is set in any case.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        log = Path("runs/stopped/log.jsonl")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None and not (log.is_file() and read_log(log)):
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "meanflow train --resume --name stopped" in out
    assert "Traceback" not in err
    newest = list_checkpoints(Path("runs/stopped/checkpoints"))[-1]
    assert json.loads((newest / "state.json").read_text())["step"] == read_log(log)[-1]["step"]


def test_a_run_folder_is_never_overwritten_silently():
    run_training(TINY)
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"--name NAME.*--resume.*--overwrite"):
        run_training(TINY)
    with pytest.raises(UsageError, match="hidden_size"):  # a mistake with --overwrite costs nothing
        run_training(TINY.replace(hidden_size=17), overwrite=True)
    with pytest.raises(UsageError, match="another model"):
        run_training(TINY.replace(depth=2), resume=True)
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before
    run_training(TINY.replace(steps=2), overwrite=True)
    assert len(losses("tiny")) == 2


def test_overwrite_leaves_a_folder_alone_that_is_no_run():
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="does not look like a run"):
        run_training(TINY, overwrite=True)
    assert Path("runs/tiny/thesis.tex").exists()


def test_only_the_newest_checkpoints_are_kept():
    run_training(TINY.replace(checkpoint_every=1, keep_checkpoints=2, steps=4))
    names = [path.name for path in Path("runs/tiny/checkpoints").iterdir()]
    assert sorted(names) == ["step_00000003", "step_00000004"]


@pytest.fixture
def any_precision():
    """One process has one precision by accelerate's rules; tests share the process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.float32), ("bf16-weights", torch.bfloat16)])
@pytest.mark.parametrize("objective", ["meanflow", "imf"])
def test_half_precision_trains_and_keeps_its_weights_as_it_says(any_precision, precision, dtype, objective):
    config = TINY.replace(precision=precision, sample_every=4, **of_objective(objective, norm_p=0.5))
    run_training(config.replace(steps=3))
    run_training(config, resume=True)
    newest = list_checkpoints(Path("runs/tiny/checkpoints"))[-1]
    assert {value.dtype for value in load_file(newest / "model.safetensors").values()} == {dtype}
    assert {value.dtype for value in load_file(newest / "ema.safetensors").values()} == {torch.float32}
    AcceleratorState._reset_state(True)
    run_training(config.replace(precision="no", name="wide"))
    assert losses("tiny") == pytest.approx(losses("wide"), rel=HALF_LOSS)


def test_the_precision_is_bf16_on_a_gpu_that_has_it_and_float32_elsewhere(monkeypatch):
    auto = TINY.replace(precision="auto")
    for has, expected in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert parallel.settled(auto, torch.device("cuda")).run.precision == expected
        assert parallel.settled(auto, torch.device("cpu")).run.precision == "no"
        for given in ("no", "tf32", "fp16"):
            chosen = TINY.replace(precision=given)
            assert parallel.settled(chosen, torch.device("cuda")) == chosen


def test_a_run_names_its_precision_and_a_resumed_one_keeps_it(any_precision, monkeypatch, capsys):
    auto = TINY.replace(precision="auto", evaluate=True)
    with monkeypatch.context() as elsewhere:
        for module in ("accelerator", "loop"):
            settled = f"meanflow.training.{module}.settled"
            elsewhere.setattr(settled, lambda config, device: config.replace(precision="bf16"))
        run_training(auto.replace(steps=3))
    assert "; cpu, precision bf16 (auto); runs/tiny" in capsys.readouterr().err
    run_training(auto, resume=True)  # where auto would be float32
    said = capsys.readouterr().err
    assert "; cpu, precision bf16; runs/tiny" in said
    assert said.count("precision") == 1  # it is no change
    assert yaml.safe_load(Path("runs/tiny/config.yaml").read_text())["run"]["precision"] == "bf16"
    report = json.loads(Path("runs/tiny/report.json").read_text())
    assert (report["precision"], report["cuda_graphs"]) == ("bf16", False)
    AcceleratorState._reset_state(True)
    run_training(auto.replace(name="other", evaluate=False))
    assert "; cpu, precision no (auto); runs/other" in capsys.readouterr().err


def test_training_starts_from_given_weights():
    run_training(TINY)
    weights = list_checkpoints(Path("runs/tiny/checkpoints"))[-1] / "model.safetensors"
    started = trainer(TINY.replace(init=str(weights), name="second"))
    saved = load_file(weights)
    assert all(torch.equal(value, saved[name]) for name, value in started.model.state_dict().items())
    with pytest.raises(UsageError, match="another model"):
        trainer(TINY.replace(init=str(weights), hidden_size=24, name="third"))


def test_averages_are_what_a_run_is_sampled_with():
    run_training(TINY)
    newest = list_checkpoints(Path("runs/tiny/checkpoints"))[-1]
    averaged, raw = load_network(Path("runs/tiny")), load_network(Path("runs/tiny"), "raw")
    for loaded, file in ((averaged, "ema"), (raw, "model")):
        saved = load_file(newest / f"{file}.safetensors")
        assert all(torch.equal(value, saved[name]) for name, value in loaded.net.state_dict().items())
    assert averaged.step == 6
    assert averaged.class_names == tuple("0123456789")


class Tied(DiT):
    """A network with a buffer, and two names for one parameter."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("shift", torch.full((1,), 0.5))
        self.t_embedder.mlp[2].weight = self.r_embedder.mlp[2].weight

    def forward(self, z, r, t, y):
        return super().forward(z, r, t, y) + self.shift.view(1, 1, 1, 1)


def test_buffers_and_tied_parameters_are_saved_resumed_and_sampled_with(monkeypatch):
    def make(name, spectral_norm=False, **sizes):
        return Tied(**sizes)

    monkeypatch.setattr("meanflow.models.options.create_model", make)
    monkeypatch.setattr("meanflow.training.network.create_model", make)
    run_training(TINY.replace(sample_every=2, steps=4))
    run_training(TINY.replace(sample_every=2, name="tiny"), resume=True)
    state = load_network(Path("runs/tiny")).net.state_dict()
    assert state["shift"].item() == 0.5
    saved = load_file(list_checkpoints(Path("runs/tiny/checkpoints"))[-1] / "ema.safetensors")
    one, other = (saved[f"{name}.mlp.2.weight"] for name in ("t_embedder", "r_embedder"))
    assert torch.equal(one, other)
    assert torch.equal(state["t_embedder.mlp.2.weight"], one)


def test_the_affine_baseline_trains():
    run_training(TINY.replace(model="Affine", steps=2))
    assert load_network(Path("runs/tiny")).image_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"lr": math.nan}, "lr: expected"),
        ({"batch_size": 9, "accumulate": 2}, "batch_size: expected a multiple of accumulate = 2"),
        ({"held_out": 1.0}, "held_out"),
        ({"ratio": 1.5}, "ratio: expected"),
        ({"model": "DiT-Q/3"}, "DiT-Q/3"),
        ({"aux_head_depth": 1}, "aux_head_depth: expected only with model iMF-DiT"),
        ({"weight_decay": math.nan}, "weight_decay: expected a finite number, got nan"),
        ({"lr": math.inf}, "lr: expected a finite number"),
        ({"guidance_interval": (0.0, math.nan)}, "guidance_interval: expected a finite number"),
        ({"time_std": 0.0}, "time_std: expected a number > 0"),
        ({"seed": 2**32}, r"seed: expected less than 2\*\*32"),
        ({"depth": 10**10}, "depth: expected at most 10000"),
        ({"batch_size": 2**40}, "batch_size: expected at most 16777216"),
        ({"model": "iMF-DiT", "prefix_tokens": (1, 1, 1, 10**9)}, "num_interval_tokens: expected at most"),
        ({"threads": 10**10}, "threads: expected at most 1024"),
        ({"steps": 10**30}, "steps: expected a number of less than 64 bits"),
        ({"objective": "imf", "sample_omega": 0.5}, "sample_omega: expected a number >= 1"),
        ({"objective": "imf", "sample_interval": (0.5, 0.2)}, "sample_t_min: expected at most t_max = 0.2, got 0.5"),
    ],
)
def test_values_out_of_range_are_named(change, words):
    with pytest.raises(UsageError, match=words):
        TINY.replace(**change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"objective": "imf"},
            r"imf trains .* \(u, v\), such as iMF-DiT; got model DiT, which .* \(u\)",
        ),
        ({"model": "iMF-DiT"}, "objective: meanflow trains .* got model iMF-DiT"),
        ({"name": "../elsewhere"}, "name: expected"),
        ({"precision": "fp16"}, "precision: fp16 is a format of NVIDIA GPUs, and this run's device is cpu"),
        ({"precision": "tf32"}, "precision: tf32 is a format of NVIDIA GPUs"),
        ({"ratio": 0.05}, "ratio, batch_size: a share of 0.05 of 8 samples is none"),
        ({"patch_size": 3}, "multiple of patch_size"),
        ({"device": "cuda"}, "sees no GPU"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(change, words):
    if "cuda" in change.values() and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match=words):
        run_training(TINY.replace(**change))
    assert not Path("runs").exists()


def test_accelerates_own_sharding_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # accelerate launch --use_fsdp
    with pytest.raises(UsageError, match=r"strategy: accelerate was told to use FSDP .* --strategy fsdp"):
        run_training(TINY)
    assert not Path("runs").exists()


@pytest.mark.parametrize(("backend", "words"), [("tritn", "expected one of"), ("cuda", "cuda backend")])
def test_a_backend_that_cannot_serve_the_run_is_named_before_anything_is_written(monkeypatch, backend, words):
    monkeypatch.setattr("mfkernels.backend._requested", backend)
    with pytest.raises(UsageError, match=f"(backend|BACKEND): .*{words}"):
        run_training(TINY)
    assert not Path("runs").exists()


def test_tf32_is_put_back_as_it_was():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    for allowed in (True, False):
        with tensor_float32(allowed):
            assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
            assert cudnn.allow_tf32 == allowed
        assert (torch.get_float32_matmul_precision(), cudnn.allow_tf32) == before
    if hasattr(matmul, "fp32_precision"):  # torch 2.9: where it alone was set, the older question is an error
        old, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        try:
            with tensor_float32(False):
                assert torch.get_float32_matmul_precision() == "highest"
            assert matmul.fp32_precision == "tf32"
        finally:
            matmul.fp32_precision = old
