#!/usr/bin/env bash
# What needs a GPU, in two calls that together take eleven minutes: bench/gpu.sh CALL OUT [--commit C] [--seconds N]
#
#   A    correctness, then `steer`: 4 minutes        machine compile smoke bits stream wide mean counts
#   B    the rest: 7 minutes                         machine compile dense sae generate fsrl memory ncu
#
# CALL is also the name of one stage, for when time is left: ncu, tune (launch parameters), and what fits into neither
# call, with a GPU of one's own: ops (every op against the reference), stress (long), sanitize (all tools of
# compute-sanitizer).
#
# A stage is a process, or a few at once, with a time limit. One that prints nothing for too long is ended with all its
# children, and begins again after the case in which it hung. One that does not fit into what is left of --seconds is
# not started. OUT gets at most four files: results.jsonl, one line per result, each on the disk before the next is
# measured; log.txt, all that was printed; and of ncu triton.ncu-rep and cuda.ncu-rep. The last lines say what ran,
# failed, hung and was not reached, and how long it took.
#
#   bench/gpu.sh A OUT/a --commit "$(git rev-parse --short=12 HEAD)"
#   bench/gpu.sh B OUT/b --commit "$(git rev-parse --short=12 HEAD)"
#   python -m bench.report OUT/a/results.jsonl OUT/b/results.jsonl    # keeps them, and writes the tables
#   bench/gpu.sh tune OUT/t --commit "$(git rev-parse --short=12 HEAD)"
#   python -m bench.tuning OUT/a/results.jsonl OUT/t/results.jsonl    # better launch parameters
#
# It needs a python3 (or PYTHON) with torch, Triton and transformers. The package does not have to be installed. If
# dspa_kernels/libdspa_kernels.so does not load, it is compiled first, which takes nvcc and ninja. Where there is no GPU,
# --rehearse tries all of it at tiny sizes, with kernels in the interpreter and the emulator.
set -euo pipefail
[ -n "${2:-}" ] || { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }
# OUT is relative to the folder of the caller, and everything else to that of the repository.
case $2 in /* | -*) ;; *) set -- "$1" "$PWD/$2" "${@:3}" ;; esac
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
# Emulation, or a backend that somebody named, would be measured instead of the kernels.
unset DSPA_TESTS_EMULATED_CUDA TRITON_INTERPRET DSPA_BACKEND
export PYTHONPATH=".:python${PYTHONPATH:+:$PYTHONPATH}"

# `dspa` reads its own version. Where the package is not installed, metadata of a version 0 stands in.
if ! "$PYTHON" -c 'from importlib.metadata import version; version("dspa-kernels")' 2>/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    mkdir "$site/dspa_kernels-0.dist-info"
    printf 'Metadata-Version: 2.1\nName: dspa-kernels\nVersion: 0\n' >"$site/dspa_kernels-0.dist-info/METADATA"
    PYTHONPATH="$PYTHONPATH:$site"
fi
"$PYTHON" -m bench.device "$@"
