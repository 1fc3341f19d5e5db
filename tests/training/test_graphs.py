"""A step as a CUDA graph, recorded and replayed on a CPU; test_graphs_gpu.py has a real one."""

import re
import types
from pathlib import Path

import pytest
import target_objectives
import torch
from accelerate.state import AcceleratorState
from recorded import NotRecordable, Recordable, Recording
from safetensors.torch import load_file
from tiny_runs import IMF, TINY, stop_after
from torch import nn

from meanflow.cli import main
from meanflow.data import load_digits_data
from meanflow.errors import UsageError
from meanflow.objectives import FlowMatching, MeanFlow
from meanflow.training import (
    EMA,
    RunFolder,
    Trainer,
    graphs,
    list_checkpoints,
    loop,
    make_accelerator,
    run_training,
)
from meanflow.training.graphs import WARM_UP, StepGraph, conflict, described, is_recorded
from meanflow.training.log import read_log
from mfkernels import linear_map

OBJECTIVES = {
    "meanflow": {"kappa": 0.0},
    "meanflow, guided": {},
    "meanflow, guided without labels": {"kappa": 0.0, "omega": 2.0, "label_dropout": 0.0},
    "imf": IMF,
    "flow_matching": {"objective": "flow_matching"},
    "averaged five times": {"ema_decays": (0.5, 0.2), "power_ema": (0.05, 0.1)},
    "nothing clipped or averaged": {"grad_clip": 0.0, "ema_decay": 0.0},
}
every_objective = pytest.mark.parametrize("values", OBJECTIVES.values(), ids=OBJECTIVES)


pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def any_precision():
    """One process has one precision by accelerate's rules; tests share the process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def recordings(monkeypatch):
    """Every `Recording` that was made, on a machine whose CPU has CUDA graphs."""
    made = []

    def recording():
        made.append(Recording())
        return made[-1]

    monkeypatch.setattr(graphs, "CudaGraph", recording)
    for module in (graphs, loop):
        monkeypatch.setattr(module, "conflict", lambda config, accelerator: None)
    monkeypatch.setattr("meanflow.checks.can_read", lambda x: False)  # as on a GPU
    return made


def trained(name, *, resume=False, **values):
    values = {"steps": 8, "log_every": 2, "flip": True, **values}
    run_training(TINY.replace(name=name, **values), resume=resume)


def figures(name):
    rows = read_log(Path("runs") / name / "log.jsonl")
    return [{key: row[key] for key in ("step", "loss", "squared_error", "grad_norm", "lr")} for row in rows]


def saved(name):
    newest = list_checkpoints(Path("runs") / name / "checkpoints")[-1]
    files = {path.stem: load_file(path) for path in newest.glob("*.safetensors")}
    return {(file, key): value for file, tensors in files.items() for key, value in tensors.items()}


def check_same_weights(a, b):
    left, right = saved(a), saved(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@every_objective
def test_a_recorded_run_is_an_eager_one_bit_for_bit(recordings, values):
    trained("eager", cuda_graphs=False, **values)
    assert not recordings
    trained("recorded", cuda_graphs=True, **values)
    assert [graph.replays for graph in recordings] == [8 - WARM_UP]
    assert figures("recorded") == figures("eager")
    check_same_weights("recorded", "eager")


def test_a_recorded_run_resumes_as_it_was(recordings, monkeypatch):
    trained("whole", steps=12)
    with monkeypatch.context() as interrupted:
        stop_after(interrupted, 6)
        trained("parts", steps=12)
    trained("parts", steps=12, resume=True)
    assert [graph.replays for graph in recordings] == [12 - WARM_UP, 6 - WARM_UP, 6 - WARM_UP]
    assert figures("parts") == figures("whole")
    check_same_weights("parts", "whole")


def test_samples_and_checkpoints_between_replays_change_nothing(recordings):
    trained("plain", cuda_graphs=False)
    trained("busy", sample_every=1, checkpoint_every=1)
    check_same_weights("busy", "plain")


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights"])
@every_objective
def test_a_recorded_run_in_half_precision_is_an_eager_one_bit_for_bit(recordings, any_precision, values, precision):
    trained("eager", cuda_graphs=False, precision=precision, **values)
    trained("recorded", precision=precision, **values)
    assert figures("recorded") == figures("eager")
    check_same_weights("recorded", "eager")


def of(objective, **values):
    """A run with an averaged copy of the network, see target_objectives.py."""
    return {"objective": f"target_objectives:{objective}", "ratio": 0.5, **values}


@pytest.mark.parametrize("objective", ["Averaged", "Through"])
def test_a_recorded_run_averages_its_target_with_the_decay_of_each_step(recordings, monkeypatch, objective):
    for cls in (target_objectives.Averaged, target_objectives.Through):
        monkeypatch.setattr(cls, "target_decay", lambda self, step: 1.0 - 0.5**step)
    trained("eager", cuda_graphs=False, **of(objective))
    assert not recordings
    trained("recorded", **of(objective))
    assert [graph.replays for graph in recordings] == [8 - WARM_UP]
    assert figures("recorded") == figures("eager")
    check_same_weights("recorded", "eager")
    assert any(key[0] == "target" for key in saved("recorded"))


def test_an_update_with_a_target_reads_nothing_on_the_host(recordings):
    trainer, given = stepped(of("Through"))
    with Recordable():
        trainer._update(*given)


def test_another_phase_is_recorded_anew(recordings):
    trained("eager", cuda_graphs=False, steps=12, **of("Phased", change=6))
    trained("recorded", steps=12, **of("Phased", change=6))
    assert [graph.replays for graph in recordings] == [6 - WARM_UP, 6 - WARM_UP]
    assert figures("recorded") == figures("eager")
    check_same_weights("recorded", "eager")


def test_a_phase_that_ends_while_it_warms_up_is_never_recorded(recordings):
    trained("eager", cuda_graphs=False, **of("Phased", change=2))
    trained("recorded", **of("Phased", change=2))
    assert [graph.replays for graph in recordings] == [0, 6 - WARM_UP]
    check_same_weights("recorded", "eager")


NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, channels, num_classes):
        super().__init__()
        self.label, self.out = nn.Embedding(num_classes + 1, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, z, r, t, y):
        h = z + self.label(y)[:, :, None, None] * (t - r)[:, None, None, None]
        return nn.functional.dropout(self.out(h), 0.5, self.training)


def net(input_size, in_channels, num_classes):
    return Net(in_channels, num_classes)
"""


def test_dropout_in_a_recorded_step_draws_anew_at_every_replay(recordings, monkeypatch):
    Path("with_dropout.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(".")
    monkeypatch.setattr(Recording, "draws", True)
    sizes = dict.fromkeys(("hidden_size", "depth", "num_heads", "patch_size"))
    values = {"model": "with_dropout:net", "objective": "flow_matching", **sizes}
    trained("eager", **values)
    assert not recordings  # a network of the user's own
    trained("recorded", cuda_graphs=True, **values)
    assert [graph.replays for graph in recordings] == [8 - WARM_UP]
    check_same_weights("recorded", "eager")


def stepped(values):
    """A trainer after its first step, and the arguments of the next update."""
    config = TINY.replace(**values)
    folder = RunFolder(Path("runs/direct"))
    trainer = Trainer(config, load_digits_data(), folder, make_accelerator(config, folder))
    taken = []
    trainer.recording = lambda *given: taken.append(given) or trainer._update(*given)
    x, y = trainer.data.train.images([*range(8)]), trainer.data.train.labels[:8]
    trainer._train_step(iter([(x, y)]))
    return trainer, taken[0]


@every_objective
def test_an_update_reads_nothing_on_the_host(recordings, values):
    trainer, given = stepped(values)
    with Recordable():
        trainer._update(*given)


class Planted(nn.Module):
    def __init__(self, net, violation):
        super().__init__()
        self.net, self.violation, self.num_classes = net, violation, net.num_classes

    def forward(self, z, r, t, y, **others):
        return self.net(self.violation(z), r, t, y, **others)


class ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx * dx.sum().item()


VIOLATIONS = {
    "item": (lambda x: x * x.mean().item(), "reads a value"),
    "bool": (lambda x: x if (x > 0).any() else -x, "reads a value"),
    "equal": (lambda x: x if torch.equal(x, x) else -x, "reads a value"),
    "nonzero": (lambda x: x + len((x > 0).nonzero()), "shape of its values"),
    "where": (lambda x: x + len(torch.where(x > 0)[0]), "shape of its values"),
    "mask": (lambda x: x + x[x > 0].sum(), "shape of its values"),
    "repeat": (lambda x: x + x.flatten().repeat_interleave((x.flatten() > 0).long()).sum(), "shape of its values"),
    "number": (lambda x: x * torch.tensor(2.0), "Python's numbers"),
    "rand": (lambda x: x + torch.rand_like(x), "draws"),
    "dropout": (lambda x: nn.functional.dropout(x, 0.5), "draws"),
}


@pytest.mark.parametrize(("violation", "words"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_what_a_graph_cannot_hold_is_found(recordings, violation, words):
    trainer, (x, y, draws) = stepped({"objective": "flow_matching"})
    planted = Planted(trainer.model, violation)
    trainer.loss_of = lambda x, y, draws: FlowMatching().evaluate(planted, x, y, draws)
    with Recordable(), pytest.raises(NotRecordable, match=words):
        trainer._update(x, y, draws)


def test_what_a_graph_cannot_hold_is_found_in_the_backward(recordings):
    trainer, (x, y, draws) = stepped({"objective": "flow_matching"})
    net = trainer.model
    net.final_layer.linear.register_forward_hook(lambda layer, args, out: ReadsInBackward.apply(out))
    with Recordable(), pytest.raises(NotRecordable, match="reads a value"):
        trainer._update(x, y, draws)


def no_rate_in_memory(patch):
    patch.setattr(Trainer, "lr", property(lambda self: None, lambda self, lr: None), raising=False)


def no_decay_in_memory(patch):
    patch.setattr(loop, "EMA", lambda model, decay, recordable: EMA(model, decay))


@pytest.mark.parametrize(("planted", "file"), [(no_rate_in_memory, "model"), (no_decay_in_memory, "ema")])
def test_a_number_of_pythons_would_stay_that_of_the_recorded_step(recordings, monkeypatch, planted, file):
    planted(monkeypatch)
    trained("eager", cuda_graphs=False)
    trained("stale")
    left, right = saved("stale"), saved("eager")
    assert not all(torch.equal(left[key], right[key]) for key in left if key[0] == file)


@every_objective
def test_no_tensor_of_an_update_is_on_the_host(values):
    """On the meta device, of whose values there are none: what is on the CPU there would be on the CPU beside a GPU."""
    config = TINY.replace(**values)
    net, objective = config.network(load_digits_data()).to("meta"), config.objective
    ema = EMA(net, config.optim.ema_decay, recordable=True)
    x, y = torch.zeros(8, 1, 8, 8, device="meta"), torch.zeros(8, dtype=torch.long, device="meta")
    draws = objective.draw(x.shape, spread=True).map(lambda a: a.to("meta"))
    ema.set_step(0)
    with Recordable("meta"):
        objective.evaluate(net, x, y, draws).loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        ema.take(net)
    planted = Planted(net, lambda z: linear_map(lambda a: a * torch.zeros(()), z))
    with Recordable("meta"), pytest.raises(NotRecordable, match="on cpu"):
        objective.evaluate(planted, x, y, draws)


def draws_of(batch=4, ratio=0.5, label_dropout=0.1):
    return MeanFlow(ratio=ratio, label_dropout=label_dropout).draw((batch, 1, 2, 2), spread=True)


@pytest.fixture
def recorded_step(recordings):
    step = StepGraph(lambda x, y, draws: (x + draws.noise).sum(dim=(1, 2, 3)) + y)
    x, y = torch.rand(4, 1, 2, 2), torch.arange(4)
    for _ in range(WARM_UP + 1):
        step(x, y, draws_of())
    return step, x, y


def test_a_replay_reads_what_it_is_given_and_keeps_its_result_apart(recorded_step):
    step, x, y = recorded_step
    a, b = draws_of(), draws_of()
    first, second = step(x, y, a), step(2 * x, y + 1, b)
    assert torch.equal(first, (x + a.noise).sum(dim=(1, 2, 3)) + y)
    assert torch.equal(second, (2 * x + b.noise).sum(dim=(1, 2, 3)) + y + 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (x[:3], y[:3], draws_of(3, 0.0)), r"draws: expected 2 rows with r != t, as recorded, got 0"),
        (
            lambda x, y: (x[:3], y, draws_of()),
            r"x: expected shape \(4, 1, 2, 2\) of torch.float32 on cpu, as recorded, got",
        ),
        (lambda x, y: (x.double(), y, draws_of()), r"x: expected .* got shape \(4, 1, 2, 2\) of torch.float64"),
        (lambda x, y: (x, y.int(), draws_of()), r"y: expected .* got shape \(4,\) of torch.int32"),
        (lambda x, y: (x.to("meta"), y, draws_of()), r"x: expected .* on meta"),
        (lambda x, y: (x, y, draws_of(6, 1 / 3)), r"noise: expected .* got shape \(6, 1, 2, 2\)"),
        (
            lambda x, y: (x, y, draws_of(label_dropout=0.0)),
            "draws: expected x, y, noise, t, r, moved, drop, as recorded",
        ),
    ],
)
def test_another_batch_is_never_replayed_in_the_place_of_the_recorded_one(recorded_step, change, words):
    step, x, y = recorded_step
    replays = step.graph.replays
    with pytest.raises(ValueError, match=words):
        step(*change(x, y))
    assert step.graph.replays == replays


def test_a_step_that_cannot_be_recorded_says_how_to_go_on(recordings, monkeypatch):
    def fails(self, fn):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Recording, "record", fails)
    with pytest.raises(
        UsageError, match=r"cuda_graphs: .* not permitted when stream is capturing; .* --no-cuda-graphs"
    ):
        trained("fails")
    assert [path.name for path in list_checkpoints(Path("runs/fails/checkpoints"))] == ["step_00000003"]
    run_training(TINY.replace(name="fails", cuda_graphs=False), resume=True)


def machine(kind="cuda", processes=1):
    return types.SimpleNamespace(device=torch.device(kind), num_processes=processes)


@pytest.mark.parametrize(
    ("accelerator", "values", "words"),
    [
        (machine("cpu"), {}, "device: expected a CUDA GPU, got cpu"),
        (machine(processes=2), {}, "processes: expected one, got 2"),
        (machine(), {"precision": "fp16"}, "precision: the gradient scaler of fp16"),
        (machine(), {"accumulate": 2}, "accumulate: expected 1, got 2"),
        (machine(), {"checkpoint_blocks": "all"}, "checkpoint_blocks: expected 0, got all"),
        (machine(), {"compile": True, "compile_mode": "reduce-overhead"}, "compile_mode: reduce-overhead"),
    ],
)
def test_what_keeps_a_step_from_being_recorded_is_named_where_graphs_are_asked_for(accelerator, values, words):
    config = TINY.replace(**values)
    assert not is_recorded(config, accelerator)
    assert not is_recorded(config.replace(cuda_graphs=False), accelerator)
    with pytest.raises(UsageError, match=f"cuda_graphs: .*{words}"):
        is_recorded(config.replace(cuda_graphs=True), accelerator)


def test_graphs_are_the_default_on_one_gpu_for_a_network_of_ours():
    own = TINY.replace(model="my_networks:small")
    for config, expected in ((TINY, True), (TINY.replace(compile=True), True), (own, False)):
        assert conflict(config, machine()) is None
        assert is_recorded(config, machine()) == expected
    assert is_recorded(own.replace(cuda_graphs=True), machine())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "steps as a CUDA graph"),
        ({"cuda_graphs": False}, "no CUDA graph"),
        ({"accumulate": 2}, "no CUDA graph (accumulate: expected 1, got 2: each part seeds the generators anew)"),
        ({"model": "a:b"}, "no CUDA graph (model: a:b is not of this package; --cuda-graphs records it too)"),
    ],
)
def test_a_run_says_whether_it_records_its_step(values, words):
    assert described(TINY.replace(**values), machine()) == words


def test_asking_for_graphs_on_a_cpu_is_an_error_before_anything_is_written():
    with pytest.raises(UsageError, match="cuda_graphs: a step of this run cannot be recorded: device: expected a CUDA"):
        run_training(TINY.replace(cuda_graphs=True))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("flags", "file", "expected"),
    [
        ([], "", "auto"),
        (["--cuda-graphs"], "cuda_graphs: no", True),
        (["--no-cuda-graphs"], "cuda_graphs: true", False),
        ([], "cuda_graphs: off", False),
        ([], "cuda-graphs: auto", "auto"),
    ],
)
def test_graphs_on_the_command_line_and_in_a_file(monkeypatch, flags, file, expected):
    asked = []

    def stop(config, **options):
        asked.append(config.run.cuda_graphs)
        raise UsageError("far enough")

    monkeypatch.setattr("meanflow.commands.train.run_training", stop)
    Path("values.yaml").write_text(file)
    assert main(["train", "digits", "--config", "values.yaml", *flags]) == 2
    assert asked == [expected]


def test_the_help_shows_the_flags_as_they_are_given(capsys):
    with pytest.raises(SystemExit):
        main(["train", "digits", "--no-cuda-graphs", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert re.search(r"--cuda-graphs, --no-cuda-graphs record the whole step .* \(default: False\)", said)
