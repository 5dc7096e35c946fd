#!/usr/bin/env bash
# Everything that needs a GPU: bench/gpu.sh STAGE OUT [ARGUMENTS...]
#
#   check      tests on the GPU, every op beside the reference        OUT/check-*.xml
#   sanitize   compute-sanitizer's memcheck and racecheck              OUT/sanitize-*.log
#   stress     graph replays, streams, torch.compile, equality of bits
#   bench      the benchmarks of the kernels                           OUT/results/
#   generate   the benchmark of Hugging Face generate()                OUT/results/
#   tune       launch parameters [arguments of bench.tune]             OUT/launch_table.json, OUT/tune.json
#   all        check, sanitize, stress, bench and generate
#
# Arguments after OUT go to the stage's program. Needs a python3 (or PYTHON) with torch, Triton, transformers and
# pytest; the package does not have to be installed. A stage that takes longer than LIMIT seconds (580) is ended. The
# exit status says whether all went well.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-580}
usage() { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }
[ $# -ge 2 ] || usage
stage=$1 out=$2
shift 2
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=".:python${PYTHONPATH:+:$PYTHONPATH}"

# `dspa` asks for its own version: where the package is not installed, metadata of a version 0 will do.
if ! $PYTHON -c 'from importlib.metadata import version; version("dspa-kernels")' 2>/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    mkdir "$site/dspa_kernels-0.dist-info"
    printf 'Metadata-Version: 2.1\nName: dspa-kernels\nVersion: 0\n' >"$site/dspa_kernels-0.dist-info/METADATA"
    PYTHONPATH="$PYTHONPATH:$site"
fi

failed=()
# run NAME COMMAND...: what a command prints is kept too.
run() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name: $*"
    timeout --kill-after=10 "$LIMIT" "$@" 2>&1 | tee "$out/$name.log"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || failed+=("$name ($status)")
    echo "== $name: status $status, $((SECONDS - start)) s"
}

check() {
    local workers=()
    $PYTHON -c 'import xdist' 2>/dev/null && workers=(-n 8)
    run check-kernels $PYTHON -m pytest -q "${workers[@]}" tests/kernels --junitxml="$out/check-kernels.xml" "$@"
    run check-gpu $PYTHON -m pytest -q -m gpu tests/dspa/test_gpu.py tests/dspa/test_saes.py --junitxml="$out/check-gpu.xml" "$@"
    run check-ops $PYTHON -m bench.every_kernel
}

# A sanitizer takes registers for itself, so that a grid of its usual size may not fit; a first run without it
# compiles.
sanitize() {
    local small=($PYTHON -m bench.every_kernel --programs 16 --rows 1 19 "$@")
    run sanitize-plain "${small[@]}"
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck; do
        run "sanitize-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "${small[@]}"
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

stress() { run stress $PYTHON -m bench.stress "$@"; }

bench() {
    run bench $PYTHON -m pytest -q bench --ignore bench/test_generate.py --results "$out/results" "$@"
}

generate() { run generate $PYTHON -m pytest -q bench/test_generate.py --results "$out/results" "$@"; }

tune() {
    run tune $PYTHON -m bench.tune --seconds "$((LIMIT - 40))" --table "$out/launch_table.json" \
        --state "$out/tune.json" "$@"
}

case $stage in
check | sanitize | stress | bench | generate | tune) "$stage" "$@" ;;
all) for each in check sanitize stress bench generate; do "$each"; done ;;
*) usage ;;
esac

if [ ${#failed[@]} -gt 0 ]; then
    echo "== FAILED: ${failed[*]}"
    exit 1
fi
echo "== all went well: $stage"
