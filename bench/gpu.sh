#!/usr/bin/env bash
# Everything a GPU has to say, in one command: bench/gpu.sh OUT
# Installs the package beside the torch that is there, runs the tests on the GPU and every benchmark, and writes logs
# and figures (JSON with date, versions and shapes) into the folder OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:?usage: bench/gpu.sh OUT}"
mkdir -p "$out"
MFKERNELS_CUDA=1 python3 -m pip install -q --no-deps --no-build-isolation -e . 2>&1 | tail -n 3
python3 - <<'PY' | tee "$out/machine.txt"
import torch, triton
assert torch.cuda.is_available(), "no CUDA device"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
PY

# The CUDA kernels on their own first: one that hangs is ended here, and then takes nothing else with it.
ignore=()
if timeout 60 python3 bench/attention/ragged.py 2>&1 | tee "$out/cuda.log"; then
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck synccheck; do
            timeout 240 compute-sanitizer --tool "$tool" --error-exitcode 1 python3 bench/attention/ragged.py \
                >"$out/sanitizer_$tool.log" 2>&1
            echo "compute-sanitizer $tool: exit code $?" | tee -a "$out/cuda.log"
        done
    else
        echo "no compute-sanitizer on this machine" | tee -a "$out/cuda.log"
    fi
else
    ignore=(--ignore tests/attention/test_cuda_kernels.py)
fi

python3 -m pytest tests "${ignore[@]}" -p no:cacheprovider 2>&1 | tee "$out/tests.log" | tail -n 15
bench() {  # name of the figures, arguments of pytest
    timeout 300 python3 -m pytest "${@:2}" -s -p no:cacheprovider --json "$out/$1.json" 2>&1 |
        tee "$out/$1.log" | tail -n 60
}
for what in attention dit_block modern_block; do bench "$what" "bench/$what"; done
bench step bench/step/test_step.py
for model in DiT-B/4 DiT-B/2 DiT-L/2 DiT-XL/2; do  # one at a time: what has been measured is kept
    BENCH_MODELS="$model" bench "whole_step_${model//\//_}" bench/step/test_whole_step.py
done
for model in DiT-B/4 DiT-XL/2; do
    timeout 120 python3 bench/step/profile_step.py "$model" >"$out/profile_${model//\//_}.md" 2>&1
done
[ -f "$out/attention.json" ] && python3 bench/attention/plot.py "$out/attention.json"
