#!/usr/bin/env bash
# Everything that needs a GPU: bench/gpu.sh STAGE OUT [ARGUMENTS...]
#
#   build      the CUDA library, for this GPU                          dspa_kernels/libdspa_kernels.so
#   check      tests on the GPU, every op against the reference        OUT/check-*.xml
#   sanitize   compute-sanitizer's tools on every kernel               OUT/sanitize-*.log
#   stress     graph replays, streams, torch.compile, equal bits       OUT/stress-*.log
#   bench      the benchmarks of the kernels                           OUT/results/
#   generate   the benchmark of Hugging Face generate()                OUT/results/
#   train      a training step of FSRL, its time and memory            OUT/fsrl.json
#   profile    Nsight Compute on a step that reads the whole encoder   OUT/profile-*.log, .csv, .ncu-rep
#   tune       Triton's launch parameters                              OUT/launch_table.json, OUT/tune.json
#   tune_cuda  where CUDA is faster than Triton, after tune            OUT/cuda_table.json, OUT/tune_cuda.json
#   all        all of these, in this order
#
# Every stage builds first if there is no library. Arguments after OUT go to the stage's program. It needs a python3 (or
# PYTHON) with torch, Triton, transformers and pytest, and nvcc and ninja; the package does not have to be installed. A
# command that takes longer than LIMIT seconds (580) is ended. The exit status is 0 if every command succeeded.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-580}
usage() { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }
[ $# -ge 2 ] || usage
stage=$1 out=$2
shift 2
# Emulation, or a backend that somebody named, would be measured instead of the kernels.
unset DSPA_CUDA_EMULATED TRITON_INTERPRET DSPA_BACKEND
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=".:python${PYTHONPATH:+:$PYTHONPATH}"

# `dspa` reads its own version. Where the package is not installed, metadata of a version 0 stands in.
if ! $PYTHON -c 'from importlib.metadata import version; version("dspa-kernels")' 2>/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    mkdir "$site/dspa_kernels-0.dist-info"
    printf 'Metadata-Version: 2.1\nName: dspa-kernels\nVersion: 0\n' >"$site/dspa_kernels-0.dist-info/METADATA"
    PYTHONPATH="$PYTHONPATH:$site"
fi

if ! $PYTHON -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "bench/gpu.sh needs a CUDA device, and torch finds none" >&2
    exit 2
fi

kernels="triton cuda cuda-ahead cuda-programmatic"
failed=()
# run NAME COMMAND...: runs a command, keeps what it prints in NAME.log, and returns its status.
run() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name: $*"
    timeout --kill-after=10 "$LIMIT" "$@" 2>&1 | tee "$out/$name.log"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || failed+=("$name ($status)")
    echo "== $name: status $status, $((SECONDS - start)) s"
    return "$status"
}

# Builds the library for this GPU where an installation puts it. An old library must not stay.
build() {
    local architecture='import torch; major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + "a" * (major == 9))'
    rm -f dspa_kernels/libdspa_kernels.so dspa_kernels/cuda_build.json
    run build env TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$($PYTHON -c "$architecture")}" \
        $PYTHON csrc/build.py --out build/csrc && cp build/csrc/libdspa_kernels.so dspa_kernels/
}

check() {
    local workers=()
    $PYTHON -c 'import xdist' 2>/dev/null && workers=(-n 8)
    run check-kernels $PYTHON -m pytest -q "${workers[@]}" tests/kernels --junitxml="$out/check-kernels.xml" "$@"
    run check-gpu $PYTHON -m pytest -q -m gpu tests/dspa/steering/test_gpu.py tests/dspa/saes/test_frozen.py --junitxml="$out/check-gpu.xml" "$@"
    run check-ops $PYTHON -m bench.checks.every_kernel
}

# A sanitizer needs registers itself, so that a grid of the usual size may not fit. A first run without one compiles.
sanitize() {
    local tool kernel small=($PYTHON -m bench.checks.every_kernel --programs 16 --rows 1 19)
    run sanitize-plain "${small[@]}" "$@"
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck synccheck initcheck; do
        for kernel in $kernels; do
            run "sanitize-$tool-$kernel" compute-sanitizer --tool "$tool" --error-exitcode 9 \
                "${small[@]}" --backends "$kernel" "$@"
        done
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

stress() {
    local kernel
    for kernel in $kernels; do
        run "stress-$kernel" $PYTHON -m bench.checks.stress --backends "$kernel" "$@"
    done
}

bench() {
    run bench $PYTHON -m pytest -q bench --ignore bench/suite/test_generate.py --results "$out/results" "$@"
}

generate() { run generate $PYTHON -m pytest -q bench/suite/test_generate.py --results "$out/results" "$@"; }

train() { run train $PYTHON -m bench.offline.fsrl --out "$out/fsrl.json" "$@"; }

# From an empty cache, at the present clocks. The log has achieved bandwidth and stall reasons, the table every counter.
profile() {
    local shape kernel name
    for shape in 2304x16384 3584x16384; do
        for kernel in triton cuda; do
            name=profile-$shape-$kernel
            run "$name-record" ncu --profile-from-start off --set full --import-source yes --clock-control none \
                --force-overwrite --export "$out/$name" $PYTHON -m bench.checks.one_step --shape "$shape" --backend "$kernel" "$@" &&
                run "$name" ncu --import "$out/$name.ncu-rep" --page details --print-details all &&
                ncu --import "$out/$name.ncu-rep" --page raw --csv >"$out/$name.csv"
        done
    done
}

tune() {
    run tune $PYTHON -m bench.tuning.triton --seconds "$((LIMIT - 40))" --table "$out/launch_table.json" \
        --state "$out/tune.json" "$@"
}

tune_cuda() {
    local tuned=()
    [ -f "$out/launch_table.json" ] && tuned=(--launch-table "$out/launch_table.json")
    run tune_cuda $PYTHON -m bench.tuning.cuda --seconds "$((LIMIT - 40))" --table "$out/cuda_table.json" \
        --state "$out/tune_cuda.json" "${tuned[@]}" "$@"
}

stages="build check sanitize stress bench generate train profile tune tune_cuda"
case " $stages all " in *" $stage "*) ;; *) usage ;; esac
[ "$stage" = all ] || [ "$stage" = build ] || [ -f dspa_kernels/libdspa_kernels.so ] || build
if [ "$stage" = all ]; then
    for name in $stages; do "$name"; done
else
    "$stage" "$@"
fi

if [ ${#failed[@]} -gt 0 ]; then
    echo "== FAILED: ${failed[*]}"
    exit 1
fi
echo "== all succeeded: $stage"
