"""Runs whose objective evaluates an averaged copy of the network, or teachers."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from damage import seal
from minimum import needs_compile
from safetensors.torch import load_file, save_file
from target_objectives import NAME, Averaged, InForm, Taught
from tiny_runs import IMF, TINY, losses, stop_after
from torch._dynamo.testing import CompileCounterWithBackend

from meanflow import cli
from meanflow.data import Stream, generator_for
from meanflow.errors import UsageError
from meanflow.models import DiT
from meanflow.training import (
    RunFolder,
    Trainer,
    TrainingError,
    learning_rate,
    list_checkpoints,
    load_checkpoint,
    load_network,
    make_accelerator,
    run_training,
)
from meanflow.training.log import read_log
from mfkernels.testing import relative_error

pytestmark = pytest.mark.usefixtures("own_folder")
# Relative errors of float32 against float64; measured 8.4e-8, 8.6e-8, 6.1e-7 and 2.7e-7
BOUNDS = {"loss": 1.7e-7, "grad_norm": 1.7e-7, "weights": 1.2e-6, "averages": 5.5e-7}


def of(objective, **values):
    return TINY.replace(objective=f"{NAME}{objective}", ratio=0.5, **values)


def trainer(config, **options):
    folder = RunFolder.named(config.run.name)
    return Trainer(config, config.data.load(), folder, make_accelerator(config, folder), **options)


def newest(name):
    return list_checkpoints(Path("runs") / name / "checkpoints")[-1]


def check_same(a, b):
    one, other = load_checkpoint(newest(a)).tensors, load_checkpoint(newest(b)).tensors
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert losses(a) == losses(b)


@pytest.fixture
def teachers():
    """Runs good, and bad, whose network is smaller and returns something else."""
    run_training(TINY.replace(name="good", steps=2, warmup_steps=0))
    run_training(of("InForm", name="bad", hidden_size=8, steps=1, warmup_steps=0))


TAUGHT = {"teacher": "good", "weak_teacher": "bad"}
TRUST = f"{NAME}InForm"


# ------------------------------------------------------------------------------------------------ the averaged copy


def by_hand(config, weights):
    """The same run in float64, written out: losses, gradient norms, weights and averages."""
    data, optim = config.data.load(), config.optim
    net, target = (config.network(data).double() for _ in range(2))
    net.load_state_dict(weights)
    target.load_state_dict(weights)
    optimizer = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], betas=(optim.beta1, optim.beta2), weight_decay=0.0
    )
    order, rows = trainer(config).order, []
    for step in range(optim.steps):
        x = data.train.images(order.batch(step).tolist()).double()  # [B, C, H, W]
        y = data.train.labels[order.batch(step)]  # [B]
        generator = generator_for(config.run.seed, Stream.DRAWS, step)
        draws = config.objective.draw(x.shape, step=step, generator=generator, spread=True)
        e, t, r = draws.noise.double(), draws.t.double(), draws.r.double()
        column = t.view(-1, 1, 1, 1)
        z, v = (1 - column) * x + column * e, e - x  # [B, C, H, W] each
        u = net(z, r, t, y)
        if type(config.objective) is Averaged:
            error = u - (v + target(z, t, t, y).detach()) / 2
        else:
            error = target(z - (t - r + 0.1).view(-1, 1, 1, 1) * u, r, r, y) + u - v
        loss = error.square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), optim.grad_clip)
        optimizer.param_groups[0]["lr"] = learning_rate(step, optim)
        optimizer.step()
        d = 0.0 if step == 0 else 0.75
        with torch.no_grad():
            for average, p in zip(target.parameters(), net.parameters(), strict=True):
                average.copy_(d * average + (1 - d) * p)
        rows.append((loss.item(), norm.item()))
    return rows, net.state_dict(), target.state_dict()


@pytest.mark.parametrize("name", ["Averaged", "Through"])
def test_a_run_is_the_one_that_is_written_out(name):
    config = of(name)
    rows, weights, averages = by_hand(config, trainer(config).model.state_dict())
    run_training(config)
    for i, key in enumerate(("loss", "grad_norm")):
        got = torch.tensor([row[key] for row in read_log(Path("runs/tiny/log.jsonl"))])
        assert relative_error(got, torch.tensor([row[i] for row in rows])) <= BOUNDS[key]
    saved = load_checkpoint(newest("tiny"))
    for kind, found, expected in (("weights", saved.model, weights), ("averages", saved.target, averages)):
        assert found.keys() == expected.keys()
        got, wanted = (torch.cat([a[key].double().flatten() for key in expected]) for a in (found, expected))
        assert relative_error(got, wanted) <= BOUNDS[kind]
    assert any(not torch.equal(saved.target[key], saved.model[key]) for key in averages)


@pytest.mark.parametrize("name", ["Averaged", "Through"])
def test_the_copy_is_fixed_in_a_step_and_in_evaluation_mode(name):
    run = trainer(of(name))
    run.model.train()
    x, y = run.data.train.images([*range(8)]), run.data.train.labels[:8]
    loss = run.loss_of(x, y, run._draws()).loss
    loss.backward()
    assert not run.target.training
    assert all(p.grad is None and not p.requires_grad for p in run.target.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in run.model.parameters())
    assert {id(p) for p in run.parameters}.isdisjoint(id(p) for p in run.target.parameters())
    assert not any("target" in key or "nets" in key for key in run.loss_of.state_dict())


@pytest.mark.parametrize(("name", "accumulate"), [("Averaged", 1), ("Averaged", 2), ("Through", 1)])
def test_a_resumed_run_has_the_copy_that_it_had(monkeypatch, name, accumulate):
    config = of(name, accumulate=accumulate)
    run_training(config.replace(name="whole"))
    with monkeypatch.context() as interrupted:
        stop_after(interrupted, 4)
        run_training(config.replace(name="parts"))
    run_training(config.replace(name="parts"), resume=True)
    check_same("whole", "parts")


@pytest.mark.parametrize("values", [{"accumulate": 2}, {"checkpoint_blocks": "all"}], ids=str)
@pytest.mark.parametrize("name", ["Averaged", "Through"])
def test_the_copy_is_the_same_however_a_step_is_made(name, values):
    run_training(of(name, name="plain"))
    run_training(of(name, name="other", **values))
    assert losses("other") == pytest.approx(losses("plain"), rel=2e-7)  # measured 8.7e-8
    one, other = load_checkpoint(newest("plain")).target, load_checkpoint(newest("other")).target
    assert all(relative_error(other[key], one[key]) <= 2e-4 for key in one)  # measured 9.4e-5


def test_decay_zero_is_a_copy_and_decay_one_the_first_weights():
    for decay, same in ((0.0, "model"), (1.0, "target")):
        config = of("Averaged", decay=decay, name=f"at{decay:g}")
        run_training(config)
        saved = load_checkpoint(newest(config.run.name))
        first = load_checkpoint(list_checkpoints(Path("runs") / config.run.name / "checkpoints")[0])
        expected = saved.model if same == "model" else first.target
        assert all(torch.equal(value, expected[key]) for key, value in saved.target.items())


def test_a_decay_that_is_none_later_is_named(monkeypatch):
    monkeypatch.setattr(Averaged, "target_decay", lambda self, step: None if step else 0.5)
    with pytest.raises(
        TypeError, match=r"target_decay: expected a number in \[0, 1\] at every step, got None at step 1"
    ):
        run_training(of("Averaged"))


class Counting(DiT):
    """With a buffer that changes, and two names of one parameter."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("calls", torch.zeros(1))
        self.t_embedder.mlp[2].weight = self.r_embedder.mlp[2].weight

    def forward(self, z, r, t, y):
        if self.training:
            self.calls += 1
        return super().forward(z, r, t, y)


def test_buffers_of_the_copy_are_the_networks_and_tied_parameters_are_averaged_once(monkeypatch):
    for place in ("models.options", "training.network"):
        monkeypatch.setattr(
            f"meanflow.{place}.create_model", lambda name, spectral_norm=False, **sizes: Counting(**sizes)
        )
    run_training(of("Averaged", steps=4, checkpoint_every=1, keep_checkpoints=9))
    checkpoints = [load_checkpoint(path) for path in list_checkpoints(Path("runs/tiny/checkpoints"))]
    for before, after in itertools.pairwise(checkpoints):
        assert after.target["calls"] == after.model["calls"] > before.target["calls"]
        for key in ("t_embedder.mlp.2.weight", "r_embedder.mlp.2.weight"):
            expected = 0.75 * before.target[key] + 0.25 * after.model[key]
            assert relative_error(after.target[key], expected) <= 1e-6


@pytest.fixture
def any_precision():
    """One process has one precision by accelerate's rules; tests share the process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("name", ["Averaged", "Through"])
def test_under_autocast_the_averages_stay_in_float32(any_precision, name):
    run_training(of(name, precision="bf16"))
    assert {value.dtype for value in load_checkpoint(newest("tiny")).target.values()} == {torch.float32}
    AcceleratorState._reset_state(True)
    run_training(of(name, name="wide"))
    assert losses("tiny") != losses("wide")
    assert losses("tiny") == pytest.approx(losses("wide"), rel=4e-4)  # measured 2.1e-4


def test_bfloat16_averages_are_refused():
    with pytest.raises(UsageError, match=r"precision: bf16-weights keeps .*:Averaged makes targets by an average"):
        run_training(of("Averaged", precision="bf16-weights"))
    assert not Path("runs").exists()


@needs_compile
@pytest.mark.parametrize(("name", "graphs"), [("Averaged", 1), ("Through", 1), ("Phased", 2), ("Taught", 1)])
def test_a_compiled_run_is_one_graph_a_phase(monkeypatch, request, name, graphs):
    values = {}
    if name == "Taught":
        request.getfixturevalue("teachers")
        values = TAUGHT
    torch.compiler.reset()
    counter, compile = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compile(fn, backend=counter, **options))
    run_training(of(name, name="eager", **values), trust_code=TRUST)
    run_training(of(name, name="compiled", compile=True, **values), trust_code=TRUST)
    assert losses("compiled") == pytest.approx(losses("eager"), rel=1e-5)
    assert counter.frame_count == graphs


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_an_objective_without_a_copy_saves_none():
    run_training(TINY)
    assert not (newest("tiny") / "target.safetensors").exists()
    assert load_checkpoint(newest("tiny")).target == {}


def test_a_checkpoint_without_the_copy_that_is_needed_is_named(monkeypatch):
    run_training(of("Averaged", steps=2))
    path = newest("tiny")
    saved = (path / "target.safetensors").read_bytes()
    (path / "target.safetensors").unlink()
    with pytest.raises(UsageError, match=r"cannot read .*target\.safetensors"):
        run_training(of("Averaged"), resume=True)
    seal(path, json.loads((path / "state.json").read_text()))
    words = r"objective: .*step_00000002 has no averaged copy of the network for targets, and this objective needs one"
    with pytest.raises(UsageError, match=words):
        run_training(of("Averaged"), resume=True)
    (path / "target.safetensors").write_bytes(saved)
    seal(path, json.loads((path / "state.json").read_text()))
    monkeypatch.setattr(Averaged, "target_decay", lambda self, step: None)
    monkeypatch.setattr(Averaged, "terms", InForm.terms)
    with pytest.raises(
        UsageError, match="has averaged copy of the network for targets, for which this objective has no use"
    ):
        run_training(of("Averaged"), resume=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a * torch.nan, r"target\.safetensors: final_layer\.linear\.bias: expected finite numbers"),
        (lambda a: a[:1].clone(), r"target\.safetensors holds another model's weights: it has other sizes 1"),
    ],
)
def test_a_damaged_copy_is_named(change, words):
    run_training(of("Averaged", steps=2))
    path = newest("tiny")
    tensors = load_file(path / "target.safetensors")
    name = "final_layer.linear.bias"
    save_file({**tensors, name: change(tensors[name])}, path / "target.safetensors")
    seal(path, json.loads((path / "state.json").read_text()))
    with pytest.raises(UsageError, match=words):
        run_training(of("Averaged"), resume=True)


def test_a_copy_that_is_not_finite_is_never_saved():
    run = trainer(of("Averaged"))
    with torch.no_grad():
        run.target.final_layer.linear.bias.fill_(torch.inf)
    with pytest.raises(TrainingError, match=r"target final_layer\.linear\.bias is not finite after step 0"):
        run.save(0.0)
    assert not list_checkpoints(run.folder.checkpoints)


# --------------------------------------------------------------------------------------------------------- teachers


def test_a_run_learns_from_teachers_in_the_form_that_they_were_trained_in(teachers):
    config = of("Taught", **TAUGHT)
    run = trainer(config, trust_code=TRUST)
    x, y = run.data.train.images([*range(8)]), run.data.train.labels[:8]
    draws = run._draws()
    loss = run.loss_of(x, y, draws).loss
    loss.backward()
    good, bad = (load_network(Path("runs") / name, trust_code=True) for name in ("good", "bad"))
    t = draws.t
    z = (1 - t.view(-1, 1, 1, 1)) * x + t.view(-1, 1, 1, 1) * draws.noise  # [B, C, H, W]
    with torch.no_grad():
        taught, worse = good.net(z, t, t, y), bad.objective.form.wrap(bad.net)(z, t, t, y)
        expected = (run.model(z, draws.r, t, y) - 1.5 * taught + 0.5 * worse).square().mean()
    assert relative_error(loss.detach(), expected) <= 1e-6
    for role, loaded in (("frozen", good.net), ("weak", bad.net)):
        net = getattr(run.nets, role)
        net = getattr(net, "module", net)
        assert not net.training
        assert all(p.grad is None and not p.requires_grad for p in net.parameters())
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in net.state_dict().items())


def test_a_teacher_does_not_change_and_is_in_no_checkpoint(teachers, monkeypatch):
    kept = []
    made = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: kept.append(self) or made(self))
    before = load_file(newest("good") / "ema.safetensors")
    run_training(of("Taught", **TAUGHT), trust_code=TRUST)
    after = kept[0].nets.frozen.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert sorted(path.name for path in newest("tiny").iterdir()) == [
        "ema.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_a_teacher_is_a_run_its_name_a_checkpoint_or_a_weight_file(teachers):
    checkpoint = newest("good")
    model = json.loads((checkpoint / "state.json").read_text())["model"]
    save_file(load_file(checkpoint / "ema.safetensors"), "good.safetensors", metadata={"model": json.dumps(model)})
    for i, teacher in enumerate(("good", "runs/good", str(checkpoint), "good.safetensors")):
        run_training(of("Taught", name=f"by{i}", teacher=teacher, weak_teacher="bad", steps=2), trust_code=True)
        assert losses(f"by{i}") == losses("by0")


def test_a_resumed_run_loads_its_teachers_again_and_keeps_them(teachers, monkeypatch):
    config = of("Taught", **TAUGHT)
    run_training(config.replace(name="whole"), trust_code=TRUST)
    with monkeypatch.context() as interrupted:
        stop_after(interrupted, 4)
        run_training(config.replace(name="parts"), trust_code=TRUST)
    run_training(config.replace(name="parts"), resume=True, trust_code=TRUST)
    check_same("whole", "parts")
    for field, other in (("teacher", "runs/good"), ("weak_teacher", "good")):
        with pytest.raises(UsageError, match=f"{field}: expected the resumed run's own, {TAUGHT[field]}, got {other}"):
            run_training(config.replace(name="parts", steps=7, **{field: other}), resume=True, trust_code=TRUST)
    shutil.rmtree("runs/good")
    shutil.copytree("runs/bad", "runs/good")
    with pytest.raises(UsageError, match=r"teacher: good has other weights than .*step_00000006 was trained with"):
        run_training(config.replace(name="parts", steps=7), resume=True, trust_code=TRUST)
    shutil.rmtree("runs/good")
    with pytest.raises(UsageError, match="teacher: good does not exist; expected a run folder"):
        run_training(config.replace(name="parts", steps=7), resume=True, trust_code=TRUST)
    loaded = load_network(Path("runs/parts"), trust_code=True)  # which needs no teacher
    assert loaded.generate(torch.tensor([0, 1])).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weak_teacher": None}, r"weak_teacher: .*:Taught learns from a pretrained network: expected a run, a check"),
        ({"teacher": None}, "teacher: .*:Taught learns from a pretrained network"),
        ({"teacher": "nowhere"}, "teacher: nowhere does not exist; expected a run folder"),
        ({"teacher": "runs"}, "teacher: runs has no checkpoint yet"),
        (
            {"teacher": "small"},
            r"teacher: .*step_00000001.* is of images of shape \(1, 4, 4\); expected \(1, 8, 8\), as",
        ),
        ({"teacher": "few.safetensors"}, "teacher: few.safetensors is of classes: 3; expected 10, as of digits"),
        ({"teacher": "renamed"}, "teacher: data: digits has other classes than .*it lacks nought; it has besides 0"),
        ({"teacher": "imf"}, r"teacher: .*ema\.safetensors returns \(u, v\); expected a network u\(z, r, t, y\)"),
        ({"trust": False}, f"weak_teacher: .*names the function '{NAME}InForm'.*--trust-code"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_teacher_that_does_not_fit_is_named_before_anything_is_written(teachers, change, words):
    teacher = change.get("teacher")
    sizes = {"patch_size": 2, "in_channels": 1, "hidden_size": 8, "depth": 1, "num_heads": 2}
    if teacher == "few.safetensors":
        config = {"input_size": 8, "num_classes": 3, **sizes}
        model = json.dumps({"name": "DiT", "config": config})
        save_file(DiT(**config).state_dict(), "few.safetensors", metadata={"model": model})
    elif teacher == "imf":
        run_training(TINY.replace(name="imf", **{**IMF, "steps": 1, "warmup_steps": 0}))
    elif teacher in ("small", "renamed"):
        path = Path("runs") / teacher / "checkpoints/step_00000001"
        shutil.copytree(newest("good"), path)
        state = json.loads((path / "state.json").read_text())
        if teacher == "small":
            config = {"input_size": 4, "num_classes": 10, **sizes}
            state["model"]["config"] = config
            save_file(DiT(**config).state_dict(), path / "ema.safetensors")
        else:
            state["class_names"][0] = "nought"
        seal(path, state)
    trust = change.pop("trust", TRUST)
    with pytest.raises(UsageError, match=words):
        run_training(of("Taught", **{**TAUGHT, **change}), trust_code=trust)
    assert not Path("runs/tiny").exists()


@pytest.mark.parametrize("field", ["teacher", "weak_teacher"])
def test_a_teacher_that_nothing_is_learned_from_is_named(field):
    with pytest.raises(UsageError, match=f"^{field}: expected only with an objective that learns from one, and psd"):
        run_training(TINY.replace(objective="psd", **{field: "good"}))
    assert not Path("runs").exists()


def test_one_teacher_is_enough_where_one_is_needed(teachers, monkeypatch):
    monkeypatch.setattr(Taught, "teachers", ("frozen",))
    with pytest.raises(UsageError, match=r"^weak_teacher: expected only with an objective that learns from one"):
        run_training(of("Taught", **TAUGHT), trust_code=TRUST)


def test_teachers_on_the_command_line(teachers, capsys):
    line = f"train --data digits --objective {NAME}Taught --ratio 0.5 --steps 2 --batch-size 8 --hidden-size 16"
    line += " --model DiT --depth 1 --num-heads 2 --patch-size 4 --device cpu --threads 1 --no-evaluate --name taught"
    assert cli.main(f"{line} --teacher good --weak-teacher bad".split()) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(f"weak_teacher: .*names the function '{NAME}InForm'", said)
    assert cli.main(f"{line} --teacher good --weak-teacher bad --trust-code".split()) == 0
    assert cli.main(["train", "--resume", "--name", "taught", "--steps", "3", "--trust-code"]) == 0
    assert cli.main(["sample", "taught", "--labels", "1", "--out", "x.npy", "--trust-code"]) == 0


def test_teachers_in_half_precision(teachers, any_precision):
    for precision in ("bf16", "bf16-weights"):
        AcceleratorState._reset_state(True)
        run_training(of("Taught", name=precision, precision=precision, **TAUGHT), trust_code=TRUST)
    AcceleratorState._reset_state(True)
    run_training(of("Taught", name="wide", **TAUGHT), trust_code=TRUST)
    assert losses("bf16") != losses("wide")
    for precision in ("bf16", "bf16-weights"):
        assert losses(precision) == pytest.approx(losses("wide"), rel=4e-3)  # measured 1.8e-3


# ----------------------------------------------------------------------------------------------------------- groups


def test_a_batch_that_would_part_a_group_is_named():
    words = r"batch_size: expected a multiple of 8, 4 samples belonging together in each of 2 parts .*, got 12"
    with pytest.raises(UsageError, match=words):
        run_training(of("Grouped", batch_size=12, accumulate=2))
    run_training(of("Grouped", batch_size=16, accumulate=2))
