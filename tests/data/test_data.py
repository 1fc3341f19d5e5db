"""What a step is fed: order, digits, folders of images."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import meanflow.data.encoded as encoded_module
from meanflow.data import (
    Digits,
    ImageFolder,
    StepOrder,
    StepSampler,
    load_digits_data,
    load_folder,
    micro_batches,
    shard,
)
from meanflow.data.order import mix
from meanflow.errors import UsageError


def make_folder(root: Path, classes: dict[str, int], size: tuple[int, int] = (12, 10)) -> Path:
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def test_each_epoch_is_a_permutation_without_a_seam():
    order = StepOrder(n=10, batch_size=4, seed=3)
    stream = torch.cat([order.batch(step) for step in range(10)]).tolist()
    epochs = [stream[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_batch_may_be_larger_than_the_data():
    batch = StepOrder(n=3, batch_size=8, seed=0).batch(0)
    assert batch.bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_the_order_depends_on_seed_and_step_alone():
    order, again = StepOrder(50, 8, seed=1), StepOrder(50, 8, seed=1)
    later = [order.batch(step) for step in range(30)][20]
    assert torch.equal(again.batch(20), later)
    assert torch.equal(again.flips(20), order.flips(20))
    assert not torch.equal(StepOrder(50, 8, seed=2).batch(20), later)


@pytest.mark.parametrize(("world", "micros"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_processes_and_accumulation_cut_the_same_batches(world, micros):
    order = StepOrder(n=23, batch_size=8, seed=5)
    for step in range(6):
        parts = [
            shard(order.batch(step), micro=micro, micros=micros, rank=rank, world=world)
            for micro in range(micros)
            for rank in range(world)
        ]
        assert torch.equal(torch.cat(parts), order.batch(step))


def test_a_sampler_goes_on_from_any_step():
    order = StepOrder(n=23, batch_size=8, seed=5)

    def indices(start: int) -> list[list[int]]:
        return list(StepSampler(order, start=start, stop=9, micros=2, rank=1, world=2))

    assert indices(4) == indices(0)[8:]
    assert len(StepSampler(order, start=4, stop=9, micros=2, rank=1, world=2)) == 10


def test_seeds_are_spread():
    seeds = {mix(seed, tag, step) for seed in range(5) for tag in range(5) for step in range(200)}
    assert len(seeds) > 4990
    assert mix(1, 2) != mix(2, 1)


def test_digits_are_in_range_and_split_by_class():
    data = load_digits_data(held_out=0.2)
    images = data.train.images()
    assert images.shape[1:] == (1, 8, 8)
    assert (images.min(), images.max()) == (-1.0, 1.0)
    assert len(data.train) + len(data.held_out) == 1797
    assert len(data.held_out) == pytest.approx(359, abs=5)
    counts = data.held_out.labels.bincount()
    assert counts.min() >= 34
    assert counts.max() <= 37
    train = {tuple(image.flatten().tolist()) for image in images}
    kept = {tuple(image.flatten().tolist()) for image in data.held_out.images()}
    assert not train & kept  # no digit appears twice in the set
    x, y = data.train[5]
    assert torch.equal(x, images[5])
    assert y == data.train.labels[5]


def test_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r'pip install "meanflow\[demo\]"'):
        load_digits_data()


@pytest.mark.parametrize("cached", [True, False])
def test_a_folder_gives_sorted_classes_and_square_images(tmp_path, monkeypatch, cached):
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 2**30 if cached else 0)
    make_folder(tmp_path, {"zebra": 3, "ant": 2})
    data = load_folder(tmp_path, image_size=8)
    assert data.class_names == ("ant", "zebra")
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    images = data.train.images()
    assert images.shape == (5, 3, 8, 8)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert torch.equal(data.train[3][0], images[3])
    assert torch.equal(data.train.images([3, 1]), images[[3, 1]])
    assert torch.equal(load_folder(tmp_path, image_size=8).train.images(), images)
    assert load_folder(tmp_path, image_size=8, grey=True).train.images().shape == (5, 1, 8, 8)
    split = load_folder(tmp_path, image_size=8, held_out=0.5)
    assert len(split.train) + len(split.held_out) == 5


def test_images_are_scaled_on_the_shorter_side_and_cut_to_the_centre(tmp_path):
    (tmp_path / "a").mkdir()
    wide = np.zeros((8, 16, 3), dtype=np.uint8)
    wide[:, 4:12] = 200
    Image.fromarray(wide).save(tmp_path / "a" / "wide.png")
    data = load_folder(tmp_path, image_size=8)
    torch.testing.assert_close(data.train.images(), torch.full((1, 3, 8, 8), 200 / 127.5 - 1))


def test_a_corrupt_image_is_named(tmp_path):
    make_folder(tmp_path, {"a": 2})
    (tmp_path / "a" / "bad.jpg").write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(UsageError, match=r"cannot read the image .*bad\.jpg"):
        load_folder(tmp_path, image_size=8)


def test_a_truncated_image_is_named(tmp_path):
    make_folder(tmp_path, {"a": 1}, size=(64, 64))
    whole = (tmp_path / "a" / "0.png").read_bytes()
    (tmp_path / "a" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"cannot read the image .*0\.png"):
        load_folder(tmp_path, image_size=8)


def test_sixteen_bits_are_refused_rather_than_cut_off(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "a" / "deep.png")
    with pytest.raises(UsageError, match=r"deep\.png: it has more than 8 bits"):
        load_folder(tmp_path, image_size=8)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_is_named_by_workers_too(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 0)
    make_folder(tmp_path, {"a": 4})
    data = load_folder(tmp_path, image_size=8)
    (tmp_path / "a" / "2.png").write_bytes(b"gone bad")
    batches = micro_batches(data.train, StepOrder(4, 4, 0), start=0, stop=1, workers=workers)
    with pytest.raises(UsageError) as caught:
        next(batches)
    assert "2.png" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_folders_that_cannot_be_used_say_why(tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        ImageFolder(folder=str(tmp_path / "none"), image_size=8).load()
    with pytest.raises(UsageError, match="no sub-folders"):
        load_folder(tmp_path, image_size=8)
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    with pytest.raises(UsageError, match=r"1 images and no sub-folders"):
        load_folder(tmp_path, image_size=8)
    with pytest.raises(UsageError, match="it is a file"):
        load_folder(tmp_path / "loose.png", image_size=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no images in .*empty"):
        load_folder(tmp_path, image_size=8)
    with pytest.raises(UsageError, match="meanflow train digits"):
        ImageFolder().load()


def test_hidden_files_are_passed_over_and_others_counted(tmp_path):
    make_folder(tmp_path, {"a": 2, "b": 2, ".git": 1})
    (tmp_path / "a" / "._0.png").write_bytes(b"a Mac's")
    (tmp_path / "a" / ".cache").mkdir()
    shutil.copy(tmp_path / "a" / "0.png", tmp_path / "a" / ".cache")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    shutil.copy(tmp_path / "a" / "0.png", tmp_path)
    data = load_folder(tmp_path, image_size=8)
    assert (data.class_names, len(data.train), data.skipped) == (("a", "b"), 4, 2)


def test_parts_of_a_data_set_are_not_taken_for_classes(tmp_path):
    make_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    make_folder(tmp_path / "val", {"cat": 1, "dog": 1})
    with pytest.raises(UsageError, match=r"train and val in .* are parts of a data set; .* such as in .*/train"):
        load_folder(tmp_path, image_size=8)
    assert load_folder(tmp_path / "val", image_size=8).class_names == ("cat", "dog")
    (tmp_path / "val").rename(tmp_path / "more")  # classes with sub-folders of the same names
    assert load_folder(tmp_path, image_size=8).class_names == ("more", "train")
    (tmp_path / "more").rename(tmp_path / "val")
    shutil.copy(tmp_path / "train" / "cat" / "0.png", tmp_path / "train")  # images of its own: a class
    assert load_folder(tmp_path, image_size=8).class_names == ("train", "val")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    (tmp_path / "a").mkdir()
    image = Image.new(mode, (8, 8), {"RGBA": (9, 9, 9, 0), "LA": (9, 0), "P": 0}[mode])
    image.save(tmp_path / "a" / "clear.png", **({"transparency": 0} if mode == "P" else {}))
    Image.new("RGBA", (8, 8), (0, 0, 0, 255)).save(tmp_path / "a" / "opaque.png")
    clear, opaque = load_folder(tmp_path, image_size=8).train.images()
    assert (clear.min(), opaque.max()) == (1.0, -1.0)


def test_a_damaged_ppm_is_named(tmp_path):
    make_folder(tmp_path, {"a": 1})
    (tmp_path / "a" / "bad.ppm").write_bytes(b"P6\n8 x\n255\n")  # Pillow raises a ValueError
    with pytest.raises(UsageError, match=r"cannot read the image .*bad\.ppm"):
        load_folder(tmp_path, image_size=8)


def test_classes_are_compared_in_their_order():
    data = load_digits_data()
    data.check_classes(list("0123456789"), "x")
    with pytest.raises(UsageError, match="digits has other classes than x: they are in another order"):
        data.check_classes(list("1023456789"), "x")
    with pytest.raises(UsageError, match="it lacks ten; it has besides 7, 8, 9"):
        data.check_classes([*"0123456", "ten"], "x")


def test_a_folder_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ImageFolder(folder="pets").located() == {"folder": str(tmp_path / "pets")}
    assert Digits().located() == {}
