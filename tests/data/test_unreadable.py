"""Images that cannot be read: refused by name, or left out the same in memory, in workers and in every process."""

import errno
import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import losses

import meanflow.data.encoded as encoded_module
from meanflow import cli
from meanflow.data import ImageData, StepOrder, TensorImages, UnreadableImage, load_folder, micro_batches, read_image
from meanflow.data.check import check_images
from meanflow.data.folder import find_images
from meanflow.errors import UsageError
from meanflow.training.log import read_log


def make_folder(root: Path, classes: dict[str, int], bad: tuple[str, ...] = ()) -> Path:
    """Images of one colour each, "0.png" and so on; those in `bad` ("cat/1") cannot be read."""
    value = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            value += 1
            Image.new("RGB", (8, 8), (value, value, value)).save(root / name / f"{i}.png")
    for name in bad:
        (root / f"{name}.png").write_bytes(b"no picture")
    return root


def values(images: torch.Tensor) -> list[int]:
    """The colour of each image."""
    return [round(float(v)) for v in (images.mean(dim=(1, 2, 3)) + 1) * 127.5]


@pytest.fixture(params=["memory", "lazy"])
def kept(request, monkeypatch):
    """Where the images are."""
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 2**30 if request.param == "memory" else 0)
    return request.param


def test_the_next_image_of_the_class_takes_the_place(tmp_path, kept):
    make_folder(tmp_path, {"cat": 4, "dog": 4}, bad=("cat/1", "cat/3", "dog/0", "dog/1"))
    data = load_folder(tmp_path, image_size=8, skip_unreadable=True)
    expected = [1, 3, 3, 1, 7, 7, 7, 8]  # after the last of a class comes its first
    assert values(data.train.images()) == expected
    assert values(torch.stack([data.train[i][0] for i in (7, 4, 3, 0)])) == [8, 7, 1, 1]
    assert values(data.train.images([3, 1])) == [1, 3]
    assert data.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert sorted(data.left_out.reasons) == [str(tmp_path / f"{n}.png") for n in ("cat/1", "cat/3", "dog/0", "dog/1")]
    assert set(data.left_out.reasons.values()) == {"it is no image of a known format"}


def test_the_split_stays_and_neither_part_takes_from_the_other(tmp_path, kept):
    make_folder(tmp_path / "whole", {"cat": 10, "dog": 10})
    make_folder(tmp_path / "broken", {"cat": 10, "dog": 10}, bad=("cat/0", "cat/1", "cat/2", "cat/3", "dog/5"))
    whole = load_folder(tmp_path / "whole", image_size=8, held_out=0.4)
    broken = load_folder(tmp_path / "broken", image_size=8, held_out=0.4, skip_unreadable=True)
    for part, other in (("train", "held_out"), ("held_out", "train")):
        before, after = getattr(whole, part), getattr(broken, part)
        assert torch.equal(before.labels, after.labels)
        was, now = values(before.images()), values(after.images())
        bad = {1, 2, 3, 4, 16}
        assert [(a in bad) or a == b for a, b in zip(was, now, strict=True)] == [True] * len(was)
        assert not set(now) & (bad | set(values(getattr(broken, other).images())))


def test_a_class_without_any_image_is_an_error(tmp_path, kept):
    make_folder(tmp_path, {"cat": 2, "dog": 2}, bad=("dog/0", "dog/1"))
    with pytest.raises(UsageError, match=r"none of the 2 images of the class of .*dog/0\.png can be read"):
        load_folder(tmp_path, image_size=8, skip_unreadable=True).train.images()


def test_without_the_flag_the_error_says_what_to_do(tmp_path, kept):
    make_folder(tmp_path, {"cat": 2}, bad=("cat/1",))
    with pytest.raises(UsageError, match=r"cat/1\.png.*`meanflow data check FOLDER`.*--skip-unreadable"):
        load_folder(tmp_path, image_size=8).train.images()


def test_a_machine_that_opens_no_more_files_is_no_damaged_image(tmp_path, kept, monkeypatch):
    make_folder(tmp_path, {"cat": 2})

    def refuse(path, **options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UsageError, match=r"cannot open .*Too many open files") as caught:
        load_folder(tmp_path, image_size=8, skip_unreadable=True).train.images()
    assert not isinstance(caught.value, UnreadableImage)


def test_workers_and_processes_see_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 0)
    make_folder(tmp_path, {"cat": 5, "dog": 5}, bad=("cat/4", "cat/0", "dog/2"))
    order = StepOrder(10, 4, seed=3)

    def stream(start=0, world=1, workers=0):
        """Every step's batch from step `start`, and what was left out."""
        ranks, left_out = [], {}
        for rank in range(world):
            data = load_folder(tmp_path, image_size=8, skip_unreadable=True)
            ranks.append(
                list(micro_batches(data.train, order, start=start, stop=6, rank=rank, world=world, workers=workers))
            )
            left_out |= data.left_out.reasons
        return [
            (torch.cat([x for x, _ in step]), torch.cat([y for _, y in step])) for step in zip(*ranks, strict=True)
        ], left_out

    expected, left_out = stream()
    assert len(left_out) == 3
    for options in ({"workers": 2}, {"world": 2}, {"world": 2, "workers": 1}, {"start": 4}):
        found, names = stream(**options)
        for (x, y), (x2, y2) in zip(expected[options.get("start", 0) :], found, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)
        assert set(names) == set(left_out) or "start" in options


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_ten_are_named_once_and_the_others_counted(tmp_path, monkeypatch, capsys, workers):
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 0)
    make_folder(tmp_path, {"cat": 16}, bad=tuple(f"cat/{i}" for i in range(15)))
    data = load_folder(tmp_path, image_size=8, skip_unreadable=True)
    for x, _ in micro_batches(data.train, StepOrder(16, 8, 0), start=0, stop=6, workers=workers):
        assert values(x) == [16] * 8
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert len(set(lines)) == 11
    assert all(line.startswith(f"left out: {tmp_path / 'cat'}/") for line in lines[:10])
    assert lines[10] == "left out: more images, which are counted at the end"
    assert data.left_out.summary().startswith("15 images that cannot be read were left out")
    assert data.left_out.summary().count(".png") == 10
    assert data.left_out.figures()["unreadable"]["count"] == 15


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(depth: int, colour: int, channels: int) -> bytes:
    header = struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0)
    rows = (b"\0" + bytes(8 * channels * depth // 8)) * 8
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(bits: int, planar: int = 1) -> bytes:
    """8×8 pixels in three channels, in one strip or (planar 2) one for each channel."""
    parts, start = (1, 3)[planar - 1], 200
    size = 64 * 3 * bits // 8 // parts
    lists = struct.pack("<3H", bits, bits, bits).ljust(8, b"\0")
    lists += struct.pack(f"<{parts}I", *(start + i * size for i in range(parts))).ljust(12, b"\0")
    lists += struct.pack(f"<{parts}I", *[size] * parts)
    at = 8 + 2 + 9 * 12 + 4
    entries = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, at), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, parts, start if parts == 1 else at + 8), (277, 3, 1, 3)]
    entries += [(279, 4, parts, size if parts == 1 else at + 20), (284, 3, 1, planar)]
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", 0) + lists
    return head.ljust(start, b"\0") + bytes(size * parts)


DEEP = {
    "grey.png": png(16, 0, 1),
    "colour.png": png(16, 2, 3),
    "grey_alpha.png": png(16, 4, 2),
    "colour_alpha.png": png(16, 6, 4),
    "colour.tif": tiff(16),
    "planar.tif": tiff(16, planar=2),
    "grey.pgm": b"P5\n8 8\n65535\n" + bytes(128),
    "colour.ppm": b"P6\n8 8\n65535\n" + bytes(384),
    "ten_bits.ppm": b"P6\n8 8\n1023\n" + bytes(384),
    "plain.ppm": b"P3\n1 1\n65535\n0 65535 3",
}
SHALLOW = {
    "grey.png": png(8, 0, 1),
    "colour.png": png(8, 2, 3),
    "grey_alpha.png": png(8, 4, 2),
    "colour_alpha.png": png(8, 6, 4),
    "two_bits.png": png(2, 0, 1),
    "colour.tif": tiff(8),
    "planar.tif": tiff(8, planar=2),
    "grey.pgm": b"P5\n8 8\n255\n" + bytes(64),
    "hundred.ppm": b"P6\n8 8\n100\n" + bytes(192),
    "plain.ppm": b"P3\n1 1\n255\n0 255 3",
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_eight_bits_are_refused_rather_than_cut_off(tmp_path, name):
    (tmp_path / name).write_bytes(DEEP[name])
    with pytest.raises(
        UnreadableImage, match=rf"{name}: it has more than 8 bits a channel; convert it to 8 bits"
    ) as it:
        read_image(tmp_path / name, 8, grey=False)
    assert str(pickle.loads(pickle.dumps(it.value))) == str(it.value)


@pytest.mark.parametrize("name", SHALLOW)
def test_up_to_eight_bits_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(SHALLOW[name])
    assert read_image(tmp_path / name, 8, grey=False).shape == (3, 8, 8)


def test_five_bits_of_a_bmp_are_read(tmp_path):
    header = struct.pack("<IHHI", 182, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 16, 0, 128, 0, 0, 0, 0)
    (tmp_path / "a.bmp").write_bytes(b"BM" + header + bytes(128))
    assert read_image(tmp_path / "a.bmp", 8, grey=True).shape == (1, 8, 8)


def test_a_folder_is_checked(tmp_path, capsys):
    make_folder(tmp_path / "pets", {"cat": 3, "dog": 2}, bad=("cat/2",))
    (tmp_path / "pets" / "dog" / "deep.png").write_bytes(DEEP["colour.png"])
    (tmp_path / "pets" / "dog" / "notes.txt").write_text("x")
    assert cli.main(["data", "check", str(tmp_path / "pets"), "--image-size", "8", "--grey"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/pets: 6 images in 2 classes, 1 other file",
        "  cat  3",
        "  dog  3",
        f"{tmp_path}/pets/cat/2.png: it is no image of a known format",
        f"{tmp_path}/pets/dog/deep.png: it has more than 8 bits a channel; convert it to 8 bits",
        "2 of 6 images cannot be read; `meanflow train --skip-unreadable` leaves them out",
    ]
    make_folder(tmp_path / "good", {"cat": 1})
    assert cli.main(["data", "check", str(tmp_path / "good")]) == 0
    assert capsys.readouterr().out.endswith("every image can be read\n")
    assert cli.main(["data", "check", str(tmp_path / "none")]) == 2
    assert "data: no folder" in capsys.readouterr().err
    assert cli.main(["data", "check", str(tmp_path / "good"), "--image-size", "0"]) == 2


def test_a_check_of_many_classes_is_short(tmp_path):
    make_folder(tmp_path, {f"class{i:02}": 1 + i % 2 for i in range(30)}, bad=("class04/0",))
    lines = list(check_images(find_images(tmp_path), image_size=8).lines())
    assert len(lines) == 24
    assert lines[21] == "  … and 10 more classes; 1 to 2 images in each"
    assert lines[23] == "1 of 45 images cannot be read; none of class04, and training needs one of each class"


TINY = (
    "train --data pets --image-size 8 --model DiT --hidden-size 16 --depth 1 --num-heads 2 --patch-size 4 "
    "--batch-size 4 --log-every 1 --device cpu --threads 1 --sample-every 0 --steps 6 --workers 0"
)


def test_a_run_that_an_image_ended_goes_on_without_it(tmp_path, monkeypatch, capsys):
    """As if it had been left out from the start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("meanflow.training.run.save_loss_curve", lambda rows, path: None)  # a second each
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 0)
    make_folder(tmp_path / "pets", {"cat": 10, "dog": 10}, bad=("dog/7",))
    assert cli.main([*TINY.split(), "--name", "ended", "--no-evaluate"]) == 2
    assert "--skip-unreadable" in capsys.readouterr().err
    steps = len(read_log(Path("runs/ended/log.jsonl")))
    assert 0 < steps < 6
    assert cli.main(["train", "--resume", "--name", "ended"]) == 2
    capsys.readouterr()
    assert cli.main(["train", "--resume", "--name", "ended", "--skip-unreadable"]) == 0
    said = capsys.readouterr().err
    assert said.count("left out: ") == 1
    assert f"1 image that cannot be read was left out, others of the same class in their places: {tmp_path}" in said
    assert cli.main([*TINY.split(), "--name", "whole", "--skip-unreadable", "--workers", "1"]) == 0
    assert losses("ended") == losses("whole")
    report = json.loads(Path("runs/whole/report.json").read_text())
    assert report["unreadable"]["count"] == 1
    assert report["unreadable"]["files"][0].endswith("pets/dog/7.png")
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 2**30)
    assert cli.main([*TINY.split(), "--name", "in-memory", "--skip-unreadable", "--no-evaluate"]) == 0
    assert losses("in-memory") == losses("whole")
    capsys.readouterr()
    assert cli.main(["evaluate", "whole"]) == 0
    assert "1 image that cannot be read was left out" in capsys.readouterr().out


def test_the_digits_have_no_such_images(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "digits", "--skip-unreadable"]) == 2
    assert "skip_unreadable: expected only with data folder" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_images_in_memory_are_finite(bad):
    images = torch.zeros(4, 1, 2, 2)
    images[2, 0, 1, 0] = bad
    with pytest.raises(ValueError, match=f"images: expected finite values, got {bad}"):
        TensorImages(images, torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="labels: expected one for each of the 4 images, got 3"):
        TensorImages(torch.zeros(4, 1, 2, 2), torch.zeros(3, dtype=torch.long))


def test_labels_have_names():
    source = TensorImages(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="labels: expected 0 to 1, one for each class name, got 0 to 2"):
        ImageData("mine", source, None, ("a", "b"), channels=1, image_size=2)


def test_a_picture_starts_no_program(tmp_path, monkeypatch):
    """Pillow would give a PostScript file, whatever its name, to Ghostscript."""
    started, program = tmp_path / "started", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(UnreadableImage, match=r"cat\.png: it is no image of a known format"):
        read_image(picture, 8, grey=False)
    assert not started.exists()
