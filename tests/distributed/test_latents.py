"""By the command line: pictures; latents by two processes, killed and started again; training on two and on one."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from meanflow.cli import main

pytest.importorskip("diffusers")
import stand_ins

ENCODE = "encode pictures --codec vae --image-size 16 --shard-size 2 --batch-size 2 --device cpu --workers 1 --out"
TRAIN = """
    train DiT-B/4 --data latents --flip --patch-size 2 --hidden-size 16 --depth 1 --num-heads 2 --batch-size 8 --lr 0.01
    --device cpu --threads 1 --log-every 1 --sample-every 0 --checkpoint-every 2
"""


@pytest.fixture
def launch(tmp_path):
    """Starts a command in some processes, without a launcher that would end them all."""
    there = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
    there["PYTHONPATH"] = os.pathsep.join([stand_ins.import_site(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    started = []

    def start(words: str, world: int) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = []
        for rank in map(str, range(world)):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            group.append(
                subprocess.Popen(
                    [sys.executable, "-m", "meanflow", *words.split()],
                    env=there | names | {"MASTER_PORT": port},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        started.extend(group)
        return group

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def ended(processes: list[subprocess.Popen]) -> str:
    """What they said; each has to end well."""
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return "".join(said)


def losses(run: str) -> list[float]:
    return [json.loads(line)["squared_error"] for line in Path(f"runs/{run}/log.jsonl").read_text().splitlines()]


def test_from_pictures_to_samples(tmp_path, monkeypatch, launch):
    monkeypatch.chdir(tmp_path)
    stand_ins.pictures(Path("pictures"), count=30)
    stand_ins.autoencoder(Path("vae"))

    killed = launch(f"{ENCODE} latents", 2)
    while not list(Path("latents").glob("latents-*.json")):
        assert all(process.poll() is None for process in killed), [process.communicate() for process in killed]
        time.sleep(0.005)
    for process in killed:
        process.kill()
        process.communicate()
    there = {path.name: path.stat().st_mtime_ns for path in Path("latents").glob("latents-*.safetensors")}
    assert 0 < len(there) < 30
    assert not Path("latents/index.json").exists()
    assert main(TRAIN.split()) == 2  # not all is encoded

    said = ended(launch(f"{ENCODE} latents", 2))
    assert "60 images in 2 classes" in said
    kept = [name for name, when in there.items() if (Path("latents") / name).stat().st_mtime_ns == when]
    assert len(kept) >= len(there) - 2  # those that were not whole, one of each process at most
    assert main([*ENCODE.split(), "whole"]) == 0  # by one process, at once
    files = [{path.name: path.read_bytes() for path in Path(name).iterdir()} for name in ("latents", "whole")]
    assert files[0] == files[1]

    ended(launch(f"{TRAIN} --steps 4 --name run", 2))
    ended(launch("train --resume --name run --steps 7", 1))
    assert main([*TRAIN.split(), "--steps", "7", "--name", "unbroken"]) == 0
    assert losses("run") == pytest.approx(losses("unbroken"), rel=2e-5)
    assert len(losses("run")) == 7

    with Image.open("runs/run/samples.png") as image:
        pixels = np.asarray(image)  # a row of ten for each class
    assert pixels.shape == (2 * (48 + 2) + 2, 10 * (48 + 2) + 2, 3)  # tiles of 16 pixels, three times as large
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100  # decoded, in colour
    report = json.loads(Path("runs/run/report.json").read_text())
    assert report["frechet_distance"] > 0
