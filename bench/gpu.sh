#!/usr/bin/env bash
# Everything a GPU has to say, in one command: bench/gpu.sh OUT [PART...]
# Installs the package beside the torch that is there, runs the tests on the GPU and the benchmarks, and writes logs and
# figures (JSON with date, versions and shapes) into the folder OUT, and all of it once more as OUT/all.tgz. WHEELS: a
# folder of wheels for what is missing, on a machine without a registry. Parts, in this order, all by default:
#   cuda                               the CUDA kernels on their own, then under compute-sanitizer
#   tests                              all tests
#   attention dit_block modern_block   the kernels against their peers and floors
#   step whole                         a step's forward and backward; whole steps of DiT-B/4 to XL/2, profiles, sampler
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:?usage: bench/gpu.sh OUT [PART...]}"
shift
parts=" ${*:-cuda tests attention dit_block modern_block step whole} "
mkdir -p "$out"

install() {  # MFKERNELS_CUDA
    MFKERNELS_CUDA="$1" python3 -m pip install -q --no-deps --no-build-isolation -e . 2>&1 |
        tee -a "$out/install.log" | tail -n 3
}
if [ -n "${WHEELS:-}" ]; then  # a folder of wheels, for a machine without a registry
    python3 -m pip install -q --no-index --find-links "$WHEELS" tyro pytest-benchmark pytest-xdist
fi
install 1 || install 0 || exit 1  # without the CUDA kernels rather than not at all
python3 - <<'PY' | tee "$out/machine.txt"
import torch, triton
assert torch.cuda.is_available(), "no CUDA device"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
PY

# Warnings that only a GPU gives (TF32, cuBLAS contexts) are for the logs. SIGINT: pytest then still writes its figures.
run() {  # seconds, arguments of pytest
    timeout -s INT -k 20 "$1" python3 -m pytest "${@:2}" -W default -p no:cacheprovider 2>&1
}
bench() {  # name of the figures, arguments of pytest
    run 300 "${@:2}" -s --json "$out/$1.json" | tee "$out/$1.log" | tail -n 60
}
asked() { [[ "$parts" == *" $1 "* ]]; }

# The CUDA kernels on their own first, whatever is asked for: one that hangs or is wrong is ended here, and then takes
# nothing else with it.
ignore=()
parallel=()
if timeout -k 10 60 python3 bench/attention/ragged.py 2>&1 | tee "$out/cuda.log"; then
    if asked cuda && command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck synccheck; do
            timeout 240 compute-sanitizer --tool "$tool" --error-exitcode 1 python3 bench/attention/ragged.py \
                >"$out/sanitizer_$tool.log" 2>&1
            echo "compute-sanitizer $tool: exit code $?" | tee -a "$out/cuda.log"
        done
    elif asked cuda; then
        echo "no compute-sanitizer on this machine" | tee -a "$out/cuda.log"
    fi
else
    ignore=(--ignore tests/attention/test_cuda_kernels.py)
    rm -f mfkernels/_C*.so  # the benchmarks run every backend that is there
fi

if asked tests; then
    python3 -c "import xdist" 2>/dev/null && parallel=(-n 8 --dist loadfile)
    run 540 tests "${parallel[@]}" "${ignore[@]}" -p no:benchmark --continue-on-collection-errors | tee "$out/tests.log" | tail -n 15
fi
for what in attention dit_block modern_block; do
    if asked "$what"; then bench "$what" "bench/$what"; fi
done
if asked step; then bench step bench/step/test_step.py; fi
if asked whole; then
    for model in DiT-B/4 DiT-B/2 DiT-L/2 DiT-XL/2; do  # one at a time: what has been measured is kept
        BENCH_MODELS="$model" BENCH_COMPILE=0 bench "whole_step_${model//\//_}" bench/step/test_whole_step.py
        BENCH_MODELS="$model" BENCH_BATCHES=fill bench "whole_step_compiled_${model//\//_}" \
            bench/step/test_whole_step.py -k whole_step
        timeout 120 python3 bench/step/profile_step.py "$model" >"$out/profile_${model//\//_}.md" 2>&1
    done
fi
if [ -f "$out/attention.json" ]; then python3 bench/attention/plot.py "$out/attention.json"; fi
tar czf "$out/all.tgz" --exclude all.tgz -C "$out" .
