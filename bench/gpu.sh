#!/usr/bin/env bash
# Everything a GPU has to say, in parts of a few minutes each: bench/gpu.sh [--rehearse] OUT [PART...]
#   right     what is right, several at a time, and nothing timed: python -m mfkernels.check, the tests that use a GPU,
#             the CUDA kernel's pieces one by one, its ragged cases, compute-sanitizer, runs of the digits in each
#             precision; networks that `step` times are compiled, for the compilers' caches
#   step      whole steps of DiT-B/2 at batch 256 next to a plain DiT's through SDPA, eager and compiled, and the JVP peers;
#             where the time goes; attention's launches tuned, and the step with what was found
#   kernels   attention and the elementwise ops next to peers and ceilings
#   sizes     the sampler; B/4, XL/2, L/2; other backwards of attention, CUDA graphs, its CUDA forward
#   jax       the same step in JAX, whose compiler takes minutes: only where it is named
# The most telling comes first, in the order of the parts and within each. A part ends by itself after BENCH_SECONDS (240;
# jax: 600), whatever hangs; figures are on disk after every row, and OUT/all.tgz has all of OUT after every stage.
# Without a part's name, the first four run. Nothing is installed: the package runs from here, PYTHONPATH may name a
# folder with what the machine lacks, and an extension that was compiled elsewhere (setup.py) is taken as it is.
# TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR, kept from one machine to the next, spare it minutes.
# --rehearse runs every stage on a CPU, in small, with Triton's interpreter and the emulator; its figures mean nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
usage="usage: bench/gpu.sh [--rehearse] OUT [right] [step] [kernels] [sizes] [jax]"
rehearse=
if [ "${1:-}" = --rehearse ]; then rehearse=1 && shift; fi
case "${1:-}" in "" | -*) echo "$usage" >&2 && exit 2 ;; esac
mkdir -p "$1" && out="$(cd "$1" && pwd)" || exit 2
shift
for part in "$@"; do
    case "$part" in right | step | kernels | sizes | jax) ;; *) echo "no part $part; $usage" >&2 && exit 2 ;; esac
done
if [ $# = 0 ]; then set -- right step kernels sizes ${rehearse:+jax}; fi

python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# the plugins that are needed alone: what else a machine has takes seconds to load, and warns
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
pytest=("$python" -m pytest -p xdist -p pytest_timeout -p no:cacheprovider -W default)
row_seconds="${BENCH_ROW_SECONDS:-100}"  # a network is compiled in one or two minutes, unless the caches have it
workers=6       # for the tests
emulator=()     # for the CUDA kernels
triton=()       # for what a GPU would serve by Triton anyway
if [ -n "$rehearse" ]; then
    export BENCH_REHEARSAL=1 BENCH_ROUNDS=1 TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
    workers=1 emulator=(--emulator) triton=(env MFKERNELS_BACKEND=triton)
fi
pack() { (cd "$out" && flock 9 && { tar czf .all --exclude all.tgz -- * || [ $? = 1 ]; } && mv .all all.tgz) 9<"$out"; }

# stage NAME SECONDS COMMAND...: ends with its part at the latest, and goes on with the next stage whatever happens
stage() {
    local name="$1" limit="$2" left=$((deadline - SECONDS)) start=$SECONDS code=
    shift 2
    echo "=== $part: $name" | tee -a "$log"
    if [ "$left" -lt 10 ]; then
        code="left out: the part's time is over"
    else
        # SIGINT: Python still ends in order. No pipe: something that cannot be ended would keep it open
        timeout -s INT -k 10 "$((limit < left ? limit : left))" "$@" >>"$log" 2>&1
        code="exit code $?"
        tail -n 80 "$log"
    fi
    printf '%s\t%s\t%s\t%s s\n' "$part" "$name" "$code" "$((SECONDS - start))" | tee -a "$out/stages.tsv"
    pack
    [ "$code" = "exit code 0" ]
}

# beside NAME COMMAND...: stages at the same time as others, with a log of their own; in a rehearsal one after the other,
# unless BENCH_BESIDE is set
beside() {
    local name="$1"
    shift
    if [ -n "$rehearse" ] && [ -z "${BENCH_BESIDE:-}" ]; then "$@"; else (log="$out/$part-$name.log" && "$@") & fi
}

# bench NAME SECONDS COMMAND...: a run of pytest whose figures go to OUT/NAME.json. One process runs the rows one by one;
# where a row hangs or kills it, another process goes on with the next row.
bench() {
    local name="$1" limit="$2"
    shift 2
    stage "$name" "$limit" "$@" --json "$out/$name.json" -n 1 --max-worker-restart 1000 --timeout "$row_seconds" \
        --timeout-method thread -p no:logging --tb short
}
whole_step=("${pytest[@]}" bench/step/test_whole_step.py::test_whole_step)

extension() {  # as it is, where there is one for this Python
    if [ -n "$rehearse" ] || "$python" -c "import mfkernels._C" 2>/dev/null; then return; fi
    stage build 100 "$python" -c "import setup; setup.build_in_place()"
}

pieces() {
    stage bringup 120 "$python" bench/attention/bringup.py "${emulator[@]}"
    stage ragged 120 "$python" bench/attention/ragged.py --json "$out/ragged.json" "${emulator[@]}" ${rehearse:+--only 2}
    if [ -n "$rehearse" ]; then return; fi  # the rest is `ragged` again, under a tool that only a GPU's machine has
    for tool in memcheck racecheck synccheck; do
        stage "sanitizer, $tool" 60 compute-sanitizer --tool "$tool" --kernel-name kns=ForwardKernel --error-exitcode 1 \
            "$python" bench/attention/ragged.py --only 2
    done
}

checked() {
    stage check 200 "$python" -m mfkernels.check --no-times --json "$out/check.json" "$@"
    if [ -n "$rehearse" ]; then return; fi
    export BENCH_ROUNDS=1 BENCH_STEPS="DiT-B/2:256:off:plain-compiled,mf-compiled"
    stage warm 200 "${whole_step[@]}"
}

right() {
    local tests few=()
    mapfile -t tests < <(grep -lrw DEVICE --include 'test_*.py' tests | sort)
    if [ -n "$rehearse" ]; then
        few=(--ops timestep_embedding) tests=(tests/test_timing.py)
    fi
    extension
    beside check checked "${few[@]}"
    beside pieces pieces
    beside tests stage tests 200 "${pytest[@]}" "${tests[@]}" -n "$workers" --max-worker-restart 1000 --timeout 60 \
        --timeout-method thread --continue-on-collection-errors --tb short -rf
    beside train stage train 200 "$python" bench/step/precisions.py --out "$out" ${rehearse:+--steps 2}
    wait
}

step() {
    export BENCH_STEPS="
        DiT-B/2:256:off:plain,fm,mf,plain-compiled,mf-compiled
        DiT-B/2:256:on:plain,mf
        DiT-B/2:128:off:plain,mf,jvp,jvp-flash
        DiT-B/2:256:off:fm-compiled,mf-all,jvp-compiled"
    bench step 120 "${whole_step[@]}"
    stage profile 30 "$python" bench/step/profile_step.py --ways mf plain
    local ops=(attention_forward attention_forward_primal attention_backward_dq attention_backward_dkdv)
    local tuned=(--ops "${ops[@]}" --head-dims 64 72 --tokens 256 64 --seconds 30)
    if [ -n "$rehearse" ]; then
        tuned=(--dry-run --ops "${ops[1]}" --head-dims 8 --tokens 9 --total 9 --dtype float32)
    fi
    export MFKERNELS_CACHE_DIR="$out/tuned" BENCH_STEPS="DiT-B/2:256:off:fm,mf"
    stage tune 50 "$python" -m mfkernels.tune "${tuned[@]}"
    row_seconds="${BENCH_ROW_SECONDS:-20}"
    bench step_tuned 40 "${whole_step[@]}"
    unset MFKERNELS_CACHE_DIR
}

kernels() {
    row_seconds="${BENCH_ROW_SECONDS:-40}"
    extension
    bench attention 110 "${triton[@]}" "${pytest[@]}" bench/attention/test_attention.py::test_{forward,backward}
    bench ops 80 "${triton[@]}" "${pytest[@]}" bench/dit_block/test_ops.py
    bench cuda 60 "${triton[@]}" "${pytest[@]}" bench/attention/test_attention.py::test_forward_by_cuda
}

sizes() {
    export BENCH_STEPS="
        DiT-B/4:256:off:plain,fm,mf
        DiT-XL/2:64:off:plain,fm,mf
        DiT-B/2:256:off:mf-cudnn,mf-flash
        DiT-B/4:32:off:plain,fm,mf
        DiT-L/2:64:off:plain,fm,mf
        DiT-B/4:256:off:plain-compiled,mf-compiled
        DiT-B/2:256:off:mf-graphs
        DiT-XL/2:64:off:plain-compiled,mf-compiled"
    extension
    bench sizes 180 "${pytest[@]}" bench/step/test_whole_step.py::test_{sampler,whole_step}
    export BENCH_STEPS="DiT-B/2:256:off:mf-cuda,mf-cublaslt"
    row_seconds="${BENCH_ROW_SECONDS:-30}"
    bench sizes_cuda 60 "${whole_step[@]}"
}

jax() {
    export BENCH_STEPS="DiT-B/2:256:off:mf DiT-B/4:256:off:mf"
    row_seconds=300
    bench jax 600 "${pytest[@]}" bench/step/test_whole_step.py::test_jax
}

for part in "$@"; do
    deadline=$((SECONDS + ${BENCH_SECONDS:-$([ "$part" = jax ] && echo 600 || echo 240)}))
    log="$out/$part.log"
    ("$part")  # what it exports is its own
done
echo "done: $out/all.tgz"
