"""meanflow encode and what trains on its latents, against diffusers called by hand, to the bit."""

import json
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from meanflow.cli import main
from meanflow.codecs import Autoencoder
from meanflow.codecs import autoencoder as autoencoder_module
from meanflow.config import Config
from meanflow.data import ImageFolder, LatentIndex, StepOrder, Stream, generator_for, micro_batches
from meanflow.data import latents as latents_module
from meanflow.encoding import encode_images
from meanflow.errors import UsageError
from meanflow.evaluation import PixelStatistics
from meanflow.training import LoadedNetwork, RunFolder, Trainer, load_network, run_training
from meanflow.training.accelerator import make_accelerator
from meanflow.training.owner import owned

pytest.importorskip("diffusers")
import stand_ins
from stand_ins import AutoencoderKL

SIZE = 16
ENCODE = ("--image-size", str(SIZE), "--shard-size", "12", "--batch-size", "5", "--workers", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with pictures, an autoencoder vae, and latents of them."""
    folder = tmp_path_factory.mktemp("made")
    stand_ins.pictures(folder / "pictures")
    stand_ins.autoencoder(folder / "vae")
    words = ["encode", str(folder / "pictures"), "--codec", str(folder / "vae"), "--out", str(folder / "latents")]
    assert main([*words, *ENCODE]) == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A working directory with copies of them."""
    for name in ("pictures", "vae", "latents"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(**values) -> Config:
    sizes = {"model": "DiT", "hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 2}
    run = {
        "steps": 4,
        "batch_size": 8,
        "device": "cpu",
        "threads": 1,
        "log_every": 1,
        "sample_every": 0,
        "evaluate": False,
    }
    return Config.of(**{"data": "latents", **sizes, **run, **values})


def by_hand(folder: Path) -> tuple[AutoencoderKL, torch.Tensor, torch.Tensor]:
    """diffusers' autoencoder, the pictures in [-1, 1], and their labels."""
    data = ImageFolder(folder=str(folder / "pictures"), image_size=SIZE).load()
    return AutoencoderKL.from_pretrained(folder / "vae").eval(), data.train.images(), data.train.labels


def posteriors(net, x):
    with torch.no_grad():
        found = [net.encode(some).latent_dist for some in x.split(5)]  # as many at a time: a convolution's bits
    return torch.cat([torch.cat([one.mean, one.std], dim=1) for one in found])


@pytest.fixture(scope="module")
def expected(made):
    """Posteriors of all pictures and of the mirrored ones, in the parts of the files, and labels."""
    net, x, y = by_hand(made)
    sides = [torch.cat([posteriors(net, part) for part in side.split(12)]) for side in (x, x.flip(-1))]
    return (*sides, y)


def test_files_hold_what_diffusers_makes(made, expected):
    index = LatentIndex.read(made / "latents")
    files = [load_file(made / "latents" / shard.file) for shard in index.shards]
    assert [len(file["labels"]) for file in files] == [12, 12, 12, 4]
    assert (index.count, index.class_names) == (40, ("china", "flower"))
    for name, value in zip(("posterior", "mirrored", "labels"), expected, strict=True):
        assert torch.equal(torch.cat([file[name] for file in files]), value), name
    assert sorted(path.name for path in (made / "latents").iterdir()) == [
        "index.json",
        *(f"latents-{k:05d}.safetensors" for k in range(4)),
    ]


def test_statistics_are_those_of_drawn_latents(made, expected):
    """Their mean is that of the means, their variance that of the means and the mean of the variances."""
    mean, std = (torch.cat(expected[:2]).double() * 0.18215).chunk(2, dim=1)
    axes = (0, 2, 3)
    spread = (mean.var(axes, correction=0) + std.square().mean(axes)).sqrt()
    for found, value in zip(LatentIndex.read(made / "latents").statistics(), (mean.mean(axes), spread), strict=True):
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_trains_on_latents_sampled_as_diffusers_does(here, expected, monkeypatch, flip, parts):
    config = tiny(flip=flip, accumulate=parts, workers=0)
    folder = RunFolder.named("run")
    trainer = Trainer(config, config.data.load(), folder, make_accelerator(config, folder))
    seen = []
    monkeypatch.setattr(trainer, "_update", lambda x, y, part: seen.append((x, y)) or torch.zeros(3))
    batches = micro_batches(trainer.data.train, trainer.order, start=0, stop=1, micros=parts, mirrored=trainer.mirrored)
    trainer._train_step(batches)
    order = StepOrder(40, 8, config.run.seed)
    rows, mirrored = order.batch(0), order.flips(0) & flip
    posterior = torch.where(mirrored[:, None, None, None], expected[1][rows], expected[0][rows])
    mean, std = posterior.chunk(2, dim=1)
    noise = torch.randn(8, 4, 4, 4, generator=generator_for(0, Stream.LATENTS, 0))
    assert torch.equal(torch.cat([x for x, _ in seen]), (mean + std * noise) * 0.18215)
    assert torch.equal(torch.cat([y for _, y in seen]), expected[2][rows])
    assert (mirrored.any() and not mirrored.all()) == flip


def test_samples_are_decoded_as_diffusers_does(here):
    run_training(tiny(name="run"))
    loaded = load_network(Path("runs/run"))
    assert (loaded.latent_shape, loaded.image_shape) == ((4, 4, 4), (3, SIZE, SIZE))
    labels = torch.tensor([0, 1, 1, 0, 1])
    noise = torch.randn(5, 4, 4, 4, generator=generator_for(0, Stream.SAMPLES))
    with torch.no_grad():
        drawn = loaded.objective.sample(loaded.net, noise, labels)
        images = AutoencoderKL.from_pretrained("vae").decode(drawn / 0.18215).sample
    assert torch.equal(loaded.generate(labels), images)


def test_shift_and_scale_are_the_autoencoders_own_or_given(here):
    stand_ins.autoencoder(Path("shifted"), scaling_factor=0.3611, shift_factor=0.1159)
    net = AutoencoderKL.from_pretrained("shifted")
    x, noise = torch.rand(2, 3, SIZE, SIZE) * 2 - 1, torch.randn(2, 4, 4, 4)
    for given in ({}, {"scaling_factor": 0.5, "shift_factor": -0.25}):
        codec = Autoencoder(pretrained="shifted", **given)
        scale, shift = given.get("scaling_factor", 0.3611), given.get("shift_factor", 0.1159)
        with torch.no_grad():
            posterior = net.encode(x).latent_dist
            latents = (posterior.mean + posterior.std * noise - shift) * scale
            images = net.decode(latents / scale + shift).sample
        assert torch.equal(codec.draw(codec.encode(x), noise), latents)
        assert torch.equal(codec.decode(latents), images)


def test_pictures_encoded_in_training_give_the_same_curve(here):
    """No files of latents: --codec on a folder of pictures. Other batches, whose convolutions may round otherwise."""
    run_training(tiny(name="stored"))
    run_training(tiny(name="fresh", data="pictures", image_size=SIZE, codec="vae"))
    stored, fresh = (
        [json.loads(line)["squared_error"] for line in Path(f"runs/{name}/log.jsonl").read_text().splitlines()]
        for name in ("stored", "fresh")
    )
    assert stored == pytest.approx(fresh, rel=1e-5)


def test_evaluators_get_decoded_images(here):
    run_training(tiny(name="run", held_out=0.2, evaluate=True, data="latents"))
    report = json.loads(Path("runs/run/report.json").read_text())
    loaded = load_network(Path("runs/run"))
    net, x, y = by_hand(here)
    data = tiny(held_out=0.2).data.load()
    with torch.no_grad():
        mean = posteriors(net, x).chunk(2, dim=1)[0]
        decoded = net.decode(mean).sample
    rows = data.train._rows
    torch.testing.assert_close(data.train.images(), decoded[rows], rtol=0, atol=6e-6)  # 3e-6: other batches
    assert torch.equal(data.train.labels, y[rows])
    assert report["frechet_distance"] > 0
    assert report["held_out_class_accuracy"] is not None
    assert main(["evaluate", "run"]) == 0
    assert json.loads(Path("runs/run/report.json").read_text())["frechet_distance"] == report["frechet_distance"]
    assert main(["evaluate", "run", "--data", "pictures", "--samples", "20"]) == 0  # with the pictures themselves
    assert loaded.codec == data.codec
    assert PixelStatistics().refusal(loaded.image_shape) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_or_on_what_is_open(here, expected, monkeypatch, workers):
    monkeypatch.setattr(latents_module, "OPEN_FILES", 2)  # of four
    train = tiny(held_out=0.25).data.load().train
    order = StepOrder(len(train), 6, seed=1)
    found = list(micro_batches(train, order, start=0, stop=12, workers=workers, mirrored=True))
    for step, (x, y) in enumerate(found):
        rows = train._rows[order.batch(step)]
        side = order.flips(step)[:, None, None, None]
        assert torch.equal(x, torch.where(side, expected[1][rows], expected[0][rows]))
        assert torch.equal(y, expected[2][rows])


def test_half_precision_halves_the_files(here, expected):
    data = ImageFolder(folder="pictures", image_size=SIZE).load()
    codec = Autoencoder(pretrained="vae").identified()
    done = encode_images(data, codec, Path("half"), dtype="float16", shard_size=12, batch_size=5, workers=0)
    found = torch.cat([load_file(f"half/{shard.file}")["posterior"] for shard in done.index.shards])
    assert torch.equal(found, expected[0].half())
    assert done.index.bytes < 0.52 * LatentIndex.read(Path("latents")).bytes  # headers and labels besides


def test_what_is_there_is_not_made_again(here, capsys):
    words = ["encode", "pictures", "--codec", "vae", "--out", "again", *ENCODE]
    assert main(words) == 0
    assert "80 latents made" in capsys.readouterr().out  # of 40 images, mirrored too
    before = {path.name: path.read_bytes() for path in Path("again").iterdir()}
    Path("again/latents-00001.safetensors").write_bytes(before["latents-00001.safetensors"][:-1])  # cut short
    Path("again/latents-00003.safetensors").unlink()
    times = {name: (Path("again") / name).stat().st_mtime_ns for name in ("latents-00000.safetensors",)}
    assert main(words) == 0
    assert "32 latents made" in capsys.readouterr().out  # of two files, of 12 and 4 images
    assert {path.name: path.read_bytes() for path in Path("again").iterdir()} == before
    assert times == {name: (Path("again") / name).stat().st_mtime_ns for name in times}
    assert main(words) == 0
    assert "all of them were there before" in capsys.readouterr().out


def test_every_file_is_compared_with_its_checksum(here, capsys):
    assert main(["data", "check", "latents"]) == 0
    assert "every file is as it was written" in capsys.readouterr().out
    path = Path("latents/latents-00001.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 4  # one bit
    path.write_bytes(content)
    Path("latents/latents-00002.safetensors").unlink()
    assert main(["data", "check", "latents"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"latents-00001.safetensors: expected the checksum \w{8}, got", out)
    assert "latents-00002.safetensors: No such file" in out
    assert "2 of 4 files are damaged" in out
    assert main(["data", "check", "latents", "--image-size", "8"]) == 2


def test_tars_are_encoded_as_folders_are(here):
    with tarfile.open("pictures.tar", "w") as tar:
        for path in sorted(Path("pictures").rglob("*.png")):
            tar.add(path, f"{path.parent.name}/{path.name}")
    words = ["encode", "wds:pictures.tar", "--label-from", "folder", "--codec", "vae", "--out", "of-tar", *ENCODE]
    assert main(words) == 0
    for k in range(4):
        name = f"latents-{k:05d}.safetensors"
        assert (Path("of-tar") / name).read_bytes() == (Path("latents") / name).read_bytes()
    assert LatentIndex.read(Path("of-tar")).class_names == ("china", "flower")


def test_an_autoencoder_may_be_moved(here):
    """It is the same by its checksum, wherever it is."""
    words = ["encode", "pictures", "--codec", "vae", "--out", "ours", *ENCODE]
    assert main(words) == 0
    Path("vae").rename("moved")
    for loaded in (autoencoder_module._config, autoencoder_module._network, autoencoder_module._checksum):
        loaded.cache_clear()  # as in a new process
    with pytest.raises(UsageError, match=r"there is no folder .*vae"):
        run_training(tiny(name="lost", data="ours"))
    run_training(tiny(name="found", data="ours", codec="moved"))
    assert load_network(Path("runs/found")).codec.pretrained == str(here / "moved")
    assert main(["evaluate", "found", "--samples", "20"]) == 0  # real images are decoded by it too
    run_training(tiny(name="again", data="ours", pretrained="moved"))
    Path("moved").rename("once-more")
    for loaded in (autoencoder_module._config, autoencoder_module._network, autoencoder_module._checksum):
        loaded.cache_clear()
    assert main(["sample", "found", "--out", "grid.png"]) == 2
    assert main(["sample", "found", "--codec", "once-more", "--out", "grid.png"]) == 0
    assert main(["evaluate", "found", "--codec", "once-more", "--samples", "20"]) == 0
    stand_ins.autoencoder(Path("other"), seed=1)
    assert main(["sample", "found", "--codec", "other", "--out", "grid.png"]) == 2
    with pytest.raises(UsageError, match="codec: expected only with a network of latents"):
        LoadedNetwork(torch.nn.Identity(), Config().objective, (), 0, Path("run")).with_autoencoder("other")


def test_networks_of_other_latents_are_refused(here, caplog):
    stand_ins.autoencoder(Path("other"), seed=1)
    assert main(["encode", "pictures", "--codec", "other", "--out", "others", *ENCODE]) == 0
    run_training(tiny(name="theirs", data="others"))
    with pytest.raises(UsageError, match=r"teacher: .*theirs.* was trained on what Autoencoder\(.*other.* makes"):
        run_training(tiny(name="taught", teacher="theirs"))
    run_training(tiny(name="started", init="theirs"))
    assert "theirs" in caplog.text
    assert "was trained on what Autoencoder(" in caplog.text
    Path("latents").rename("mine")
    Path("others").rename("latents")  # in the place of what the run was started with
    with pytest.raises(UsageError, match=r"codec: expected the resumed run's own, Autoencoder\("):
        run_training(tiny(name="started", init="theirs", steps=6), resume=True)


def test_latents_of_another_shape_than_the_index_says_are_refused(here):
    edited("image_shape", [3, 24, 24])()
    with pytest.raises(
        UsageError, match=r"data: .*latents says .*\(3, 24, 24\), .* makes \[8, 6, 6\], and holds \[8, 4, 4\]"
    ):
        run_training(tiny())


@pytest.mark.parametrize("in_memory", [False, True])
def test_images_that_are_left_out_are_named(here, capsys, monkeypatch, in_memory):
    monkeypatch.setattr("meanflow.data.encoded.CACHE_BYTES", 2**30 if in_memory else 0)
    Path("pictures/china/0003.png").write_bytes(b"no picture")
    words = ["encode", "pictures", "--codec", "vae", "--out", "ours", *ENCODE]
    assert main(words) == 2
    assert "cannot read the image" in capsys.readouterr().err
    assert main([*words, "--skip-unreadable"]) == 0
    told = capsys.readouterr()
    assert re.search(r"left out: .*china/0003.png: it is no image", told.err)
    assert "1 image that cannot be read was left out" in told.out


def test_an_encoding_has_one_owner(here, capsys):
    with owned(Path("new")):
        assert main(["encode", "pictures", "--codec", "vae", "--out", "new", *ENCODE]) == 2
    assert re.search(r"new is in use: .* is encoding to it. Choose another folder", capsys.readouterr().err)


def test_other_pictures_are_not_taken_for_those_that_are_encoded(here, capsys):
    words = ["encode", "pictures", "--codec", "vae", "--out", "ours", *ENCODE]
    assert main(words) == 0
    Path("pictures/china/0003.png").unlink()
    assert main(words) == 2
    assert "ours was begun with labels" in capsys.readouterr().err


REFUSALS = {
    "other values": (["--dtype", "float16"], r"latents was begun with dtype 'float32', and now it is 'float16'"),
    "other files": (["--shard-size", "10"], "latents was begun with shard_size 12, and now it is 10"),
    "no multiple": (["--image-size", "18", "--out", "new"], "image_size: expected a multiple of 4, .* got 18"),
    "no autoencoder": (["--codec", "pictures", "--out", "new"], "codec: cannot load an AutoencoderKL from the folder"),
    "no folder": (
        ["--codec", "nothing", "--out", "new"],
        "codec: expected a folder, or a repository .* no folder nothing",
    ),
    "not empty": (["--out", "pictures"], "out: pictures is not empty, and no encoding was begun in it"),
    "a file": (["--out", "file"], "out: expected a folder, got the file file"),
    "no images": (["--batch-size", "0", "--out", "new"], "batch_size: expected at least 1, got 0"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_encode_refuses(here, capsys, case):
    flags, message = REFUSALS[case]
    Path("file").write_text("")
    index = json.loads(Path("latents/index.json").read_text())
    index["source"], index["codec"]["pretrained"] = str(here / "pictures"), str(here / "vae")  # they were copied
    Path("latents/index.json").write_text(json.dumps(index))
    assert main(["encode", "pictures", "--codec", "vae", "--out", "latents", *ENCODE, *flags]) == 2
    error = capsys.readouterr().err.replace(f"{here}/", "")
    assert re.search(message, error), error
    assert not Path("new").exists()


def edited(name, value):
    def edit():
        index = json.loads(Path("latents/index.json").read_text())
        index[name] = value
        Path("latents/index.json").write_text(json.dumps(index))

    return edit


def unfinished():
    Path("latents/index.json").rename("latents/encoding.json")


def cut_short():
    path = Path("latents/latents-00002.safetensors")
    path.write_bytes(path.read_bytes()[:-8])


def other_tensors():
    path = Path("latents/latents-00002.safetensors")
    size = path.stat().st_size
    save_file({"posterior": torch.zeros(size // 8)}, path)
    index = json.loads(Path("latents/index.json").read_text())
    index["shards"][2]["size"] = path.stat().st_size
    Path("latents/index.json").write_text(json.dumps(index))


DAMAGE = {
    "code": (
        edited("codec", {"name": "os:getcwd"}),
        r"cannot read .*index.json: codec: expected one of autoencoder, pixels",
    ),
    "another option": (edited("codec", {"name": "pixels", "x": 1}), "unknown option"),
    "classes": (edited("class_names", ["one", "one"]), r"index.json: class_names: expected different names"),
    "fewer classes": (edited("class_names", ["one"]), r"data: latents: expected labels from 0 to 0"),
    "count": (edited("count", 41), r"index.json: count: expected 40"),
    "shape": (edited("latent_shape", [4, 4]), r"index.json: latent_shape: expected three sizes"),
    "format": (edited("format", 2), r"index.json: expected format 1, got 2"),
    "no files": (edited("shards", []), "index.json: shards: expected different files"),
    "no square": (edited("image_shape", [3, 16, 32]), "index.json: image_shape: expected a square"),
    "mirrored": (edited("mirrored", "no"), "index.json: mirrored: expected true or false"),
    "names as a word": (edited("class_names", "ab"), "index.json: class_names: expected different names"),
    "a file elsewhere": (edited("shards", [{"file": "../x", "count": 1}]), "cannot read .*index.json"),
    "unfinished": (unfinished, "data: not all of latents is encoded: start the same `meanflow encode` again"),
    "cut short": (cut_short, r"cannot read latents/latents-00002.safetensors: expected \d+ bytes, found"),
    "other tensors": (other_tensors, r"cannot read latents/latents-00002.safetensors"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(here, case):
    damage, message = DAMAGE[case]
    damage()
    with pytest.raises(UsageError, match=message):
        tiny().data.load()


def test_what_training_refuses(here):
    stand_ins.autoencoder(Path("other"), seed=1)
    with pytest.raises(UsageError, match=r"codec: expected that of .*latents, Autoencoder.*vae.*, got Pixels"):
        run_training(tiny(codec="pixels"))
    with pytest.raises(UsageError, match=r"codec: expected that of .*latents, .*got Autoencoder\(pretrained=.*other"):
        run_training(tiny(codec="other"))
    stand_ins.autoencoder(Path("vae"), seed=1)  # in the place of the one that the latents are of
    codec = replace(tiny().codec, pretrained=str(here / "vae"))
    with pytest.raises(UsageError, match=r"codec: .*vae has other weights than the latents were made with"):
        codec.decode(torch.zeros(1, 4, 4, 4))
    data = ImageFolder(folder="pictures", image_size=SIZE).load()
    encode_images(data, Autoencoder(pretrained="other").identified(), Path("plain"), mirrored=False, workers=0)
    with pytest.raises(UsageError, match="flip: plain has no mirrored versions"):
        run_training(tiny(data="plain", flip=True))


def test_an_autoencoder_that_normalises_by_channel_is_refused(here):
    stand_ins.autoencoder(Path("normalised"), latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    with pytest.raises(UsageError, match="codec: expected an autoencoder with one factor for all channels"):
        Autoencoder(pretrained="normalised").identified()
