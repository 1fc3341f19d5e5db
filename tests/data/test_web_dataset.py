"""WebDataset tars: the samples of the webdataset library, the bits of a folder, and every refusal."""

import gzip
import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from pictures import CLASSES, make_pictures
from PIL import Image
from tiny_runs import losses, stop_after

import meanflow.data.encoded as encoded_module
import meanflow.data.web_dataset as tars_module
from meanflow import cli
from meanflow.config import Config, merged
from meanflow.data import StepOrder, WebDataset, load_folder, micro_batches
from meanflow.data.web_dataset import expand_braces, find_tar_images, find_tars
from meanflow.errors import UsageError
from meanflow.registry import is_code


def write_tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def picture(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def sample(key: str, label: object, data: bytes | None = None, **others: bytes) -> list[tuple[str, bytes]]:
    image = picture() if data is None else data
    return [(f"{key}.png", image), (f"{key}.cls", str(label).encode()), *((f"{key}.{e}", b) for e, b in others.items())]


def make_shards(root: Path, paths: list[Path], shards: int = 3, label: str = "cls", start: int = 0) -> str:
    """The same pictures in the same order as tars of about the same length."""
    root.mkdir(exist_ok=True)
    names = sorted({path.parent.name for path in paths})
    step = -(-len(paths) // shards)
    for shard in range(shards):
        members = []
        for path in paths[shard * step : (shard + 1) * step]:
            key, number = f"{path.parent.name}/{path.stem}", names.index(path.parent.name) + start
            labels = {"cls": [(f"{key}.cls", f"{number}\n".encode())], "folder": []}
            labels["json"] = [(f"{key}.json", json.dumps({"kind": number, "size": 8}).encode())]
            members += [(f"{key}{path.suffix}", path.read_bytes()), *labels[label]]
        write_tar(root / f"shard-{shard:03}.tar", members)
    return f"{root}/shard-{{000..{shards - 1:03}}}.tar"


@pytest.fixture(params=["memory", "lazy"])
def kept(request, monkeypatch):
    """Where the images are."""
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 2**30 if request.param == "memory" else 0)
    return request.param


@pytest.mark.parametrize("label", ["cls", "json", "folder"])
def test_the_same_pictures_give_the_bits_of_a_folder(tmp_path, kept, label):
    pattern = make_shards(tmp_path / "tars", make_pictures(tmp_path / "pets"), label=label)
    options = {"folder": {"label_from": "folder"}, "json": {"label_key": "kind"}, "cls": {}}[label]
    data = WebDataset(tars=pattern, image_size=8, held_out=0.3, **options).load()
    folder = load_folder(tmp_path / "pets", image_size=8, held_out=0.3)
    for part in ("train", "held_out"):
        ours, theirs = getattr(data, part), getattr(folder, part)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.images(), theirs.images())
    assert data.class_names == (folder.class_names if label == "folder" else ("0", "1", "2"))
    assert (len(data.train) + len(data.held_out), data.skipped, data.image_shape) == (21, 0, (3, 8, 8))


@pytest.mark.parametrize("options", [{"workers": 2}, {"workers": 1, "world": 2}, {"start": 3}])
def test_every_process_and_worker_sees_the_batches_of_a_folder(tmp_path, monkeypatch, options):
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 0)
    pattern = make_shards(tmp_path / "tars", make_pictures(tmp_path / "pets"))
    order = StepOrder(sum(CLASSES.values()), 4, seed=3)

    def steps(source, start=0, world=1, workers=0):
        ranks = [
            list(micro_batches(source, order, start=start, stop=8, rank=rank, world=world, workers=workers))
            for rank in range(world)
        ]
        return [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*ranks, strict=True)]

    data = WebDataset(tars=pattern, image_size=8, grey=True).load()
    expected = steps(load_folder(tmp_path / "pets", image_size=8, grey=True).train)[options.get("start", 0) :]
    for (x, y), (x2, y2) in zip(steps(data.train, **options), expected, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


RUN = (
    "--image-size 8 --model DiT --hidden-size 16 --depth 1 --num-heads 2 --patch-size 4 --ratio 0.5 --batch-size 5 "
    "--log-every 1 --device cpu --threads 1 --sample-every 0 --steps 8 --workers 2 --flip --no-evaluate"
)


def test_a_run_goes_on_in_the_middle_of_an_epoch_from_another_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("meanflow.training.run.save_loss_curve", lambda rows, path: None)  # a second each
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 0)
    monkeypatch.chdir(tmp_path)
    make_shards(tmp_path / "tars", make_pictures(tmp_path / "pets"))
    line = ["train", "--data", "wds:tars/shard-{000..002}.tar", *RUN.split()]
    assert cli.main([*line, "--name", "whole"]) == 0
    with monkeypatch.context() as interrupted:
        stop_after(interrupted, 6)  # 30 of 21 pictures
        assert cli.main([*line, "--name", "stopped"]) == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").rename(tmp_path / "elsewhere" / "runs")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["train", "--resume", "--name", "stopped", "--data", "wds:../tars/shard-{000..002}.tar"]) == 0
    assert len(losses("whole")) == 8
    assert losses("stopped") == losses("whole")
    names = ("model.safetensors", "ema.safetensors")
    for name in names:
        whole, stopped = (Path("runs", run, "checkpoints/step_00000008", name) for run in ("whole", "stopped"))
        assert stopped.read_bytes() == whole.read_bytes()
    capsys.readouterr()
    assert cli.main(["train", "--resume", "--name", "stopped", "--data", "wds:../tars"]) == 2
    assert "expected the resumed run's own" in capsys.readouterr().err
    evaluate = ["evaluate", "whole", "--data", "wds:../tars", "--samples", "8"]
    assert cli.main(evaluate) == 0
    assert "class accuracy" in capsys.readouterr().out
    assert cli.main([*evaluate, "--label-from", "folder"]) == 2
    assert "other classes" in capsys.readouterr().err
    Path("names.txt").write_text("0\n1\n2\n3\n")
    assert cli.main([*evaluate, "--class-names", "names.txt"]) == 2
    assert "it has besides 3" in capsys.readouterr().err


ODD = [
    ("__meta__", b"{}"),
    ("__meta__.json", b"{}"),
    ("README", b"no key"),
    ("a/0001.PNG", picture(1)),
    ("a/0001.cls", b" 3 "),
    ("a/0001.seg.png", picture(9)),
    ("v1.0/0002.cls", b"0"),
    ("v1.0/0002.png", picture(2)),
    ("0003.txt", b"no image"),
    ("v1.0/0004.png", picture(4)),
    ("notes", b"between two members of a sample"),
    ("v1.0/0004.cls", b"1"),
    ("x" * 180 + "/" + "y" * 90 + "ü.png", picture(5)),
    ("x" * 180 + "/" + "y" * 90 + "ü.cls", b"2"),
]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_samples_are_those_of_the_webdataset_library(tmp_path, format):
    library = pytest.importorskip("webdataset.tariterators")
    paths = [str(write_tar(tmp_path / f"{i}.tar", ODD, format=format)) for i in range(2)]
    with ExitStack() as files:
        streams = [{"url": path, "stream": files.enter_context(open(path, "rb"))} for path in paths]
        samples = list(library.group_by_keys(library.tar_file_expander(streams)))
    expected = [(one["png"], int(one["cls"]), f"{one['__url__']}/{one['__key__']}") for one in samples if "png" in one]
    found = find_tar_images(find_tars(str(tmp_path)), name="two")
    assert [found.images[i].read() for i in range(len(found.images))] == [data for data, _, _ in expected]
    assert found.labels.tolist() == [label for _, label, _ in expected] == [3, 0, 1, 2] * 2
    names = [str(found.images[i]) for i in range(len(found.images))]
    assert [name[: name.rindex(".")] for name in names] == [key for _, _, key in expected]
    assert found.class_names == ("0", "1", "2", "3")
    assert found.skipped == 8  # __meta__.json, README, notes and 0003.txt, twice


def test_what_the_library_writes_is_read(tmp_path):
    library = pytest.importorskip("webdataset")
    with library.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(5):
            writer.write({"__key__": f"sample{i}", "png": Image.new("RGB", (8, 8), (i, i, i)), "cls": i % 2})
    data = WebDataset(tars=str(tmp_path / "a.tar"), image_size=8).load()
    assert ((data.train.images().mean(dim=(1, 2, 3)) + 1) * 127.5).round().tolist() == [0, 1, 2, 3, 4]
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    "pattern",
    ["a-{000..003}.tar", "a{8..11}", "{x,y}-{0..1}.tar", "a{3..1}", "{00..10..5}", "plain", "{lone}", "a{b", "{,z}q"],
)
def test_braces_are_those_of_the_webdataset_library(pattern):
    library = pytest.importorskip("braceexpand")
    try:
        expected = list(library.braceexpand(pattern))
    except library.UnbalancedBracesError:
        expected = [pattern]
    assert expand_braces(pattern) == expected


def test_files_are_found_by_name_folder_glob_and_braces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b-1", "b-0", ".hidden", "{odd}"):
        write_tar(tmp_path / f"{name}.tar", sample("0", 0))
    (tmp_path / "b-0.tar.gz").write_bytes(b"its plain copy is there")
    here = ["./b-0.tar", "./b-1.tar", "./{odd}.tar"]
    assert find_tars(".") == here
    assert find_tars("b-*.tar") == find_tars("b-{0..1}.tar") == ["b-0.tar", "b-1.tar"]
    assert find_tars("b-{1..0}.tar::{odd}.tar") == ["b-1.tar", "b-0.tar", "{odd}.tar"]
    for pattern, missing in (("b-{0..2}.tar", "b-2.tar"), ("c-*.tar", "c-*.tar"), ("", "")):
        with pytest.raises(UsageError, match="no tar file") as caught:
            find_tars(pattern)
        assert str(caught.value).endswith(missing)
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match=r"no tar file none/\*\.tar"):
        find_tars("none")


def test_a_pattern_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, absolute in (
        ("a/{0..3}.tar", f"{tmp_path}/a/{{0..3}}.tar"),
        ("{b,/c}/x.tar::~/y.tar", f"{tmp_path}/b/x.tar::/c/x.tar::{Path.home()}/y.tar"),
    ):
        assert WebDataset(tars=given, class_names="names.txt").located() == {
            "tars": absolute,
            "label_from": "auto",
            "label_key": "label",
            "image_key": "",
            "class_names": str(tmp_path / "names.txt"),
        }


def test_the_prefix_is_no_module(tmp_path):
    assert not is_code("wds:shards")
    assert is_code("wdsets:shards")
    config = Config.of(data="wds:shards", label_key="kind")
    assert config.data == WebDataset(tars="shards", label_key="kind")
    assert merged(config, {"data": "digits"}, {"data": "wds:others"}).data.tars == "others"


def test_another_process_opens_its_own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tars_module, "OPEN_TARS", 2)
    make_shards(tmp_path / "tars", make_pictures(tmp_path / "pets"), shards=7)
    found = find_tar_images(find_tars(str(tmp_path / "tars")), name="seven")
    expected = [found.images[i].read() for i in range(21)]
    assert len({bytes(data) for data in expected}) == 21
    again = pickle.loads(pickle.dumps(found))
    with ThreadPoolExecutor(8) as pool:  # more threads than files may be open
        for images in (found.images, again.images):
            assert list(pool.map(lambda i: images[i % 21].read(), range(420))) == expected * 20  # noqa: B023
    assert found.images.places.nbytes == 32 * 21


def test_damaged_members_are_named_and_left_out_as_files_are(tmp_path, kept, capsys):
    paths = make_pictures(tmp_path / "pets")
    for path in (paths[2], paths[8], paths[20]):
        path.write_bytes(b"no picture")
    pattern = make_shards(tmp_path / "tars", paths)
    options = {"image_size": 8, "skip_unreadable": True, "held_out": 0.3}
    data = WebDataset(tars=pattern, **options).load()
    folder = load_folder(tmp_path / "pets", **options)
    for part in ("train", "held_out"):
        assert torch.equal(getattr(data, part).images(), getattr(folder, part).images())
    named = {f"{tmp_path}/tars/shard-{path}" for path in ("000.tar/cat/002.png", "001.tar/cat/008.png")}
    assert set(data.left_out.reasons) == {*named, f"{tmp_path}/tars/shard-002.tar/fox/004.png"}
    with pytest.raises(UsageError, match=r"cannot read the image .*shard-000\.tar/cat/002\.png: it is no image"):
        WebDataset(tars=pattern, image_size=8).load().train.images()
    assert cli.main(["data", "check", f"wds:{pattern}", "--image-size", "8", "--label-from", "folder"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"wds:{pattern}: 21 images in 3 classes",
        "  cat  9",
        "  dog  7",
        "  fox  5",
        *(f"{path}: it is no image of a known format" for path in (*sorted(named), list(data.left_out.reasons)[-1])),
        "3 of 21 images cannot be read; `meanflow train --skip-unreadable` leaves them out",
    ]


def test_a_tar_that_is_cut_short_later_is_a_damaged_image(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 0)
    path = write_tar(tmp_path / "a.tar", sample("0", 0) + sample("1", 0))
    data = WebDataset(tars=str(path), image_size=8).load()
    path.write_bytes(path.read_bytes()[:2100])
    assert data.train[0][0].shape == (3, 8, 8)
    with pytest.raises(UsageError, match=r"a\.tar, byte 2048: the tar file ends within it|a\.tar/1\.png: the tar file"):
        data.train[1]


def test_a_pipe_is_no_tar(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 0)
    path = write_tar(tmp_path / "a.tar", sample("0", 0))
    data = WebDataset(tars=str(path), image_size=8).load()
    path.unlink()
    os.mkfifo(path)  # nobody writes to it: to open it would take forever
    with pytest.raises(UsageError, match=r"cannot read the image .*a\.tar, byte 0: .*expected a file, got a device"):
        data.train[0]
    with pytest.raises(UsageError, match=r"cannot read the tar file .*a\.tar: .*expected a file, got a device"):
        WebDataset(tars=str(path), image_size=8).load()


def test_damaged_tars_are_refused(tmp_path):
    whole = write_tar(tmp_path / "a.tar", sample("0", 0) + sample("1", 0)).read_bytes()

    def refused(data: bytes, match: str) -> None:
        (tmp_path / "b.tar").write_bytes(data)
        with pytest.raises(UsageError, match=rf"b\.tar{match}"):
            find_tar_images([str(tmp_path / "b.tar")], name="b")

    refused(whole[:600], ": unexpected end of data")
    refused(whole[:1024] + b"?" * 512 + whole[1536:], ": no header at byte 1024")  # tarfile takes it for the end
    refused(whole[:1100], ": no header at byte 1024")
    for end in (1024, 2048, 3072, 4096, 4096 + 511):  # between members: as many images as are left would be accepted
        refused(whole[:end], f": unexpected end of data at byte {end // 512 * 512}, without an end-of-archive block")
    refused(b"", ": empty file")
    refused(picture(), ": ")
    refused(gzip.compress(whole), " is compressed.*decompress it once")  # by its content
    sparse = bytearray(whole)
    sparse[156:157] = tarfile.GNUTYPE_SPARSE
    header = bytes(sparse[:148]) + b" " * 8 + bytes(sparse[156:512])
    sparse[148:156] = b"%06o\0 " % sum(header)
    refused(bytes(sparse), "/0.png is a sparse file")


def test_one_zero_block_ends_a_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample("0", 0) + sample("1", 0))
    path.write_bytes(path.read_bytes()[: 4096 + 512])
    assert len(find_tar_images([str(path)], name="a").images) == 2
    write_tar(tmp_path / "none.tar", [])
    with pytest.raises(UsageError, match="no images in b"):  # whole, of no members
        find_tar_images([str(tmp_path / "none.tar")], name="b")


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.zst"])
def test_compressed_tars_are_refused(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"")
    for pattern in (tmp_path, tmp_path / f"a{suffix}", tmp_path / "*"):
        with pytest.raises(UsageError, match=rf"a{suffix} is compressed.*resumed at any step: decompress it once"):
            find_tars(str(pattern))


@pytest.mark.parametrize(
    "place", ["https://x/{0..3}.tar", "s3://b/a.tar", "gs://b/a.tar", "pipe:cat a.tar", "pipe:cat", "hf://x", "b::s3:a"]
)
def test_remote_tars_are_refused(place, capsys):
    assert cli.main(["train", "--data", f"wds:{place}"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "expected tar files of this machine" in said
    assert "can be resumed at any step: copy the tars to a disk" in said


WRONG = {
    "no images": (
        [("0.cls", b"0"), ("0.txt", b"")],
        {},
        r"no images in wds:.*a\.tar; expected members that end in one",
    ),
    "no label": ([("0.png", picture())], {}, r"a\.tar/0 has no label: no \.cls or \.json\. With --label-from folder"),
    "not all": ([*sample("0", 0), ("1.png", picture())], {}, r"a\.tar/1 has no label: no \.cls, as other samples have"),
    "text": (sample("0", "cat"), {}, r"a\.tar/0\.cls: expected an integer from 0 to 1000000, got 'cat'"),
    "negative": (sample("0", -1), {}, r"a\.tar/0\.cls: expected an integer from 0 to 1000000, got -1"),
    "huge": (sample("0", 10**30), {}, r"expected an integer from 0 to 1000000"),
    "beyond": (
        sample("0", 0) + sample("1", 3),
        {"class_names": "ab"},
        r"a\.tar/1\.png has the label 3; expected 0 to 1",
    ),
    "no json": (
        [("0.png", picture()), ("0.json", b"{")],
        {},
        r"a\.tar/0\.json: expected an integer from 0 to 1000000, got '\{'",
    ),
    "no field": (
        [("0.png", picture()), ("0.json", b'{"label": true}')],
        {},
        r"a\.tar/0\.json: expected an integer .* as 'label' \(--label-key\), got True",
    ),
    "no folder": (sample("0", 0), {"label_from": "folder"}, r"a\.tar/0 is in no folder"),
    "other folder": (
        sample("fox/0", 0),
        {"label_from": "folder", "class_names": "ab"},
        r"class_names: expected the names of all classes, and fox is none",
    ),
    "two images": (sample("0", 0, jpg=picture()), {}, r"a\.tar has 0\.png, 0\.jpg in one sample; .*--image-key"),
    "twice": ([*sample("0", 0), ("0.PNG", picture())], {}, r"a\.tar/0\.PNG is there twice"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_samples_are_named(tmp_path, name):
    members, options, match = WRONG[name]
    if "class_names" in options:
        (tmp_path / "names.txt").write_text("\n".join(options["class_names"]))
        options = {**options, "class_names": str(tmp_path / "names.txt")}
    with pytest.raises(UsageError, match=match):
        WebDataset(tars=str(write_tar(tmp_path / "a.tar", members)), image_size=8, **options).load()


def test_other_labels_and_names(tmp_path):
    members = sample("a/0", 2, jpg=picture(7), json=b'{"label": 1}') + sample("b/1", 0, jpg=picture(8))
    path = str(write_tar(tmp_path / "a.tar", members))
    (tmp_path / "names.txt").write_text("one\ntwo words\nthree\n")
    source = WebDataset(tars=path, image_key=".JPG", class_names=str(tmp_path / "names.txt"), image_size=8)
    data = source.load()
    assert (data.class_names, data.train.labels.tolist()) == (("one", "two words", "three"), [2, 0])
    assert ((data.train.images().mean(dim=(1, 2, 3)) + 1) * 127.5).round().tolist() == [7, 8]
    data = WebDataset(tars=path, image_key="jpg", label_from="none", image_size=8).load()
    assert (data.class_names, data.train.labels.tolist()) == (("all",), [0, 0])
    (tmp_path / "names.txt").write_text("b\na\n")
    source = WebDataset(
        tars=path, image_key="jpg", label_from="folder", class_names=str(tmp_path / "names.txt"), image_size=8
    )
    assert source.load().train.labels.tolist() == [1, 0]
    for text in ("", "a\n\nb", "a\na"):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(UsageError, match="class_names: expected one name in each line"):
            source.load()
    with pytest.raises(UsageError, match="data: say which tar files"):
        WebDataset().load()
