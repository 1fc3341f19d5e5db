"""Hugging Face tables: the bits of a folder, labels of every kind, and every refusal."""

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from pictures import CLASSES, make_pictures
from tiny_runs import losses, stop_after

import meanflow.data.encoded as encoded_module
from meanflow import cli
from meanflow.config import Config
from meanflow.data import HuggingFace, StepOrder, load_folder, micro_batches
from meanflow.data.encoded import read_image
from meanflow.data.hugging_face import TableImages
from meanflow.data.left_out import UnreadableImage
from meanflow.errors import UsageError
from meanflow.registry import is_code

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def table_of(paths: list[Path], **columns):
    """The bytes of these pictures, and labels by their folders."""
    names = sorted({path.parent.name for path in paths})
    encoded = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    features = {"number": datasets.Value("int64"), "picture": datasets.Image()}
    values = {"number": list(range(len(paths))), "picture": encoded}
    if not columns:
        features["kind"] = datasets.ClassLabel(names=names)
        values["kind"] = [names.index(path.parent.name) for path in paths]
    table = datasets.Dataset.from_dict(values, features=datasets.Features(features))
    for name, column in columns.items():
        table = table.add_column(name, column)
    return table


@pytest.fixture(params=["memory", "lazy"])
def kept(request, monkeypatch):
    """Where the images are."""
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 2**30 if request.param == "memory" else 0)
    return request.param


@pytest.mark.parametrize("form", ["saved", "splits", "parquet", "files"])
def test_the_same_pictures_give_the_bits_of_a_folder(tmp_path, kept, form):
    paths = make_pictures(tmp_path / "pets")
    place, split = tmp_path / form, ""
    if form == "saved":
        table_of(paths).save_to_disk(place)
    elif form == "splits":
        split = "val"
        datasets.DatasetDict({"train": table_of(paths[:3]), "val": table_of(paths)}).save_to_disk(place)
    elif form == "parquet":
        split = "train[:100%]"
        place.mkdir()
        table_of(paths).to_parquet(place / "train-00000-of-00001.parquet")
    else:  # a table that names files
        features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))})
        values = {"picture": list(map(str, paths)), "kind": [path.parent.name for path in paths]}
        datasets.Dataset.from_dict(values, features=features).save_to_disk(place)
    data = HuggingFace(dataset=str(place), split=split, image_size=8, held_out=0.3).load()
    folder = load_folder(tmp_path / "pets", image_size=8, held_out=0.3)
    assert data.class_names == folder.class_names
    for part in ("train", "held_out"):
        ours, theirs = getattr(data, part), getattr(folder, part)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.images(), theirs.images())


def test_workers_see_the_batches_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 0)
    table_of(make_pictures(tmp_path / "pets")).save_to_disk(tmp_path / "saved")
    order = StepOrder(sum(CLASSES.values()), 4, seed=3)
    ours = HuggingFace(dataset=str(tmp_path / "saved"), image_size=8, grey=True).load().train
    theirs = load_folder(tmp_path / "pets", image_size=8, grey=True).train
    expected = list(micro_batches(theirs, order, start=2, stop=8))
    for source in (ours, pickle.loads(pickle.dumps(ours))):
        found = micro_batches(source, order, start=2, stop=8, workers=2)
        for (x, y), (x2, y2) in zip(found, expected, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)


RUN = (
    "--image-size 8 --model DiT --hidden-size 16 --depth 1 --num-heads 2 --patch-size 4 --batch-size 5 --log-every 1 "
    "--device cpu --threads 1 --sample-every 0 --steps 7 --workers 1 --no-evaluate"
)


def test_a_run_goes_on_in_the_middle_of_an_epoch_from_another_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("meanflow.training.run.save_loss_curve", lambda rows, path: None)  # a second each
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 0)
    monkeypatch.chdir(tmp_path)
    table_of(make_pictures(tmp_path / "pets")).save_to_disk("saved")
    line = ["train", "--data", "hf:saved", *RUN.split()]
    assert cli.main([*line, "--name", "whole"]) == 0
    with monkeypatch.context() as interrupted:
        stop_after(interrupted, 5)
        assert cli.main([*line, "--name", "stopped"]) == 0
    Path("elsewhere").mkdir()
    Path("runs").rename("elsewhere/runs")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["train", "--resume", "--name", "stopped"]) == 0
    assert losses("stopped") == losses("whole")
    capsys.readouterr()
    assert cli.main(["train", "--resume", "--name", "stopped", "--data", "hf:../saved:train[:5]"]) == 2
    assert "expected the resumed run's own" in capsys.readouterr().err


def test_damaged_rows_are_named_and_left_out_as_files_are(tmp_path, kept, capsys):
    paths = make_pictures(tmp_path / "pets")
    paths[2].write_bytes(b"no picture")
    table = table_of(paths)
    missing = datasets.Dataset.from_dict({"picture": [None], "kind": [1], "number": [0]}, features=table.features)
    datasets.concatenate_datasets([table, missing]).save_to_disk(tmp_path / "saved")
    place = str(tmp_path / "saved")
    data = HuggingFace(dataset=place, image_size=8, skip_unreadable=True).load()
    folder = load_folder(tmp_path / "pets", image_size=8, skip_unreadable=True).train.images()
    assert torch.equal(data.train.images(), torch.cat([folder, folder[9:10]]))  # a dog's place is taken by the first
    assert data.left_out.reasons == {
        f"hf:{place}, row 2": "it is no image of a known format",
        f"hf:{place}, row 21": "there is none",
    }
    with pytest.raises(UsageError, match=r"cannot read the image hf:.*saved, row 2: it is no image"):
        HuggingFace(dataset=place, image_size=8).load().train.images()
    assert cli.main(["data", "check", f"hf:{place}", "--image-size", "8", "--label-column", "none"]) == 1
    assert capsys.readouterr().out.splitlines()[:3] == [
        f"hf:{place}: 22 images in 1 class",
        "  all  22",
        f"hf:{place}, row 2: it is no image of a known format",
    ]


def test_a_pipe_that_a_table_names_is_no_image(tmp_path):
    paths = [*make_pictures(tmp_path / "pets", {"a": 1}), tmp_path / "pipe"]
    os.mkfifo(paths[1])  # nobody writes to it: to open it would take forever
    features = datasets.Features({"picture": datasets.Image(decode=False)})
    images = TableImages(datasets.Dataset.from_dict({"picture": list(map(str, paths))}, features), "picture", "hf:two")
    assert read_image(images[0], 8, grey=False).shape == (3, 8, 8)
    with pytest.raises(UnreadableImage, match=r"hf:two, row 1: .*pipe: expected a file, got a device"):
        read_image(images[1], 8, grey=False)


@pytest.mark.parametrize(
    ("labels", "names"),
    [([7, 3, 7, 10], ("3", "7", "10")), (["b", "a", "b", "c"], ("a", "b", "c"))],
    ids=["integers", "text"],
)
def test_labels_without_names(tmp_path, labels, names):
    table_of(make_pictures(tmp_path / "pets", {"a": 4}), label=labels).save_to_disk(tmp_path / "saved")
    data = HuggingFace(dataset=str(tmp_path / "saved"), image_size=8).load()
    assert data.class_names == names
    assert data.train.labels.tolist() == [1, 0, 1, 2]


def test_encoded_bytes_are_images_if_one_says_so(tmp_path):
    paths = make_pictures(tmp_path / "pets", {"a": 3})
    values = {"jpg": [path.read_bytes() for path in paths], "label": [0, 0, 0]}
    datasets.Dataset.from_dict(values).save_to_disk(tmp_path / "saved")
    place = str(tmp_path / "saved")
    with pytest.raises(UsageError, match=r"image_column: hf:.* has no column of images; choose one of jpg, label"):
        HuggingFace(dataset=place, image_size=8).load()
    data = HuggingFace(dataset=place, image_column="jpg", image_size=8).load()
    assert torch.equal(data.train.images(), load_folder(tmp_path / "pets", image_size=8).train.images())


def test_a_place_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    others = {"subset": "", "image_column": "", "label_column": ""}
    assert HuggingFace(dataset="saved").located() == {"dataset": str(tmp_path / "saved"), "split": "", **others}
    assert HuggingFace(dataset="owner/name", split="test").located() == {
        "dataset": "owner/name",
        "split": "test",
        **others,
    }
    assert Config.of(data="hf:mnist:train[:10%]").data == HuggingFace(dataset="mnist", split="train[:10%]")
    assert Config.of(data="hf:mnist:test").replace(data="hf:cifar10").data.split == ""
    assert not is_code("hf:mnist")


def test_what_cannot_be_used_is_named(tmp_path):
    paths = make_pictures(tmp_path / "pets", {"a": 3})

    def refused(match: str, table=None, place="saved", **options) -> None:
        if table is not None:
            table.save_to_disk(tmp_path / "saved")
        with pytest.raises(UsageError, match=match):
            HuggingFace(dataset=str(tmp_path / place) if place else "", image_size=8, **options).load()

    refused("data: say which data set", place="")
    table = table_of(paths)
    refused("image_column: expected one of number, picture, kind, got image", table, image_column="image")
    refused("image_column: expected a column of images, got number", image_column="number")
    refused("label_column: expected one of .*, or none to train without classes; got label", label_column="label")
    refused(r"data: .*saved was saved without splits; got test", split="test")
    refused("subset: expected only with a data set of several", subset="plain")
    refused(r"label_column: expected one of .*; got no column, and there is none of", table.remove_columns("kind"))
    refused(r"label_column: 1 of 3 rows have no label in label", table_of(paths, label=[0, None, 1]))
    refused(r"label_column: expected integers or text, got label, of float64", table_of(paths, label=[0.5, 1.0, 2.0]))
    unknown = datasets.Dataset.from_dict(
        {"number": [3], "picture": [None], "kind": [-1]}, features=table.features
    )  # as the labels of test sets are
    refused(r"label_column: row 3 has -1 in kind; expected 0 to 0", datasets.concatenate_datasets([table, unknown]))
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "splits")
    refused(r"data: .*splits has the splits a, b; got train", place="splits")
    (tmp_path / "empty").mkdir()
    refused("data: cannot load hf:.*empty", place="empty")


def test_without_a_network_the_error_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--data", "hf:nobody/nothing"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "data: cannot load hf:nobody/nothing: " in said
    assert "nobody/nothing" in said.partition("cannot load hf:nobody/nothing: ")[2]
    assert "Traceback" not in said


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r'data: hf:mnist is read with datasets.*pip install "meanflow\[datasets\]"'):
        HuggingFace(dataset="mnist").load()
