"""An unreadable image in a folder that is decoded as training goes, over several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import losses

import meanflow.data.encoded as encoded_module
from meanflow.cli import main

TINY = (
    "train --data pets --image-size 8 --model DiT --hidden-size 16 --depth 1 --num-heads 2 --patch-size 4 --ratio 0.5 "
    "--batch-size 4 --log-every 1 --device cpu --threads 1 --sample-every 0 --steps 6 --workers 1 "
    "--skip-unreadable --no-evaluate"
)
LAZY = "import meanflow.data.encoded as f; f.CACHE_BYTES = 0; from meanflow.cli import main; main()"


def test_every_number_of_processes_trains_on_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encoded_module, "CACHE_BYTES", 0)
    for label, name in enumerate(("cat", "dog")):
        Path("pets", name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8), (20 * i, 90 * label, 9)).save(f"pets/{name}/{i}.png")
    for name in ("cat/0", "cat/7", "dog/3"):
        Path(f"pets/{name}.png").write_bytes(b"no picture")
    Path("lazy.py").write_text(LAZY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "lazy.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *TINY.split(), "--name", "two"], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert main([*TINY.split(), "--name", "one"]) == 0
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)
    assert "3 images that cannot be read were left out" in done.stderr  # whichever process met them
    assert 3 <= done.stderr.count("left out: ") <= 6  # each process names its own
