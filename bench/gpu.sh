#!/usr/bin/env bash
# Everything a GPU has to say, in one command: bench/gpu.sh OUT
# Installs the package beside the torch that is there, runs the tests on the GPU and every benchmark, and writes logs
# and figures (JSON with date, versions and shapes) into the folder OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:?usage: bench/gpu.sh OUT}"
mkdir -p "$out"
python3 -m pip install -q --no-deps --no-build-isolation -e . 2>&1 | tail -n 3
python3 - <<'PY' | tee "$out/machine.txt"
import torch, triton
assert torch.cuda.is_available(), "no CUDA device"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
PY
python3 -m pytest tests -p no:cacheprovider 2>&1 | tee "$out/tests.log" | tail -n 15
for what in attention dit_block modern_block step; do
    timeout 240 python3 -m pytest "bench/$what" -s -p no:cacheprovider --json "$out/$what.json" 2>&1 |
        tee "$out/$what.log" | tail -n 60
done
