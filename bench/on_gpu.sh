#!/bin/sh
# Everything that needs a GPU, in under ten minutes: environment, tests, proofs, benchmarks.
#
#   bench/on_gpu.sh OUT
#
# OUT receives log.txt (all that was printed), env.json, check.json, a JSON and a Markdown file for each operator, and
# summary.txt, which is printed last. A step that fails or takes too long does not stop the others; the exit code is 0
# only if none did. Without a GPU the quick forms run, on the CPU.
#
#   PYTHON   the interpreter to use (python3)
#   SECONDS_TOTAL   time for everything (570)
#   TESTS    what pytest runs (the whole suite; without a GPU one short file)
set -u

if [ $# -ne 1 ]; then
    echo "usage: $0 OUT" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd) || exit 2
root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
cd "$root" || exit 2
python=${PYTHON:-python3}
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
COLUMNS=${COLUMNS:-160}
export PYTHONPATH COLUMNS
started=$(date +%s)
deadline=$((started + ${SECONDS_TOTAL:-570}))
failures=0
: >"$out/log.txt"
: >"$out/summary.txt"

# step NAME LIMIT COMMAND...: run a command for at most LIMIT seconds and note how it ended.
step() {
    name=$1 limit=$2
    shift 2
    left=$((deadline - $(date +%s)))
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -le 0 ]; then
        failures=$((failures + 1))
        echo "no time  $name" >>"$out/summary.txt"
        return
    fi
    echo "== $name: $*" | tee -a "$out/log.txt"
    before=$(date +%s)
    timeout -k 10 "$limit" "$@" >"$out/step.txt" 2>&1
    code=$?
    tee -a "$out/log.txt" <"$out/step.txt"
    rm -f "$out/step.txt"
    took=$(($(date +%s) - before))
    case $code in
        0) result=ok ;;
        124 | 137) result="timeout" ;;
        *) result="exit $code" ;;
    esac
    [ $code -eq 0 ] || failures=$((failures + 1))
    printf '%-8s %-28s %4d s\n' "$result" "$name" "$took" >>"$out/summary.txt"
}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>>"$out/log.txt"; then
    quick='' bench='--pass fwd,bwd --seconds 0.3' tests=${TESTS:-tests}
else
    echo "no GPU that PyTorch can use: the quick forms run, on the CPU" | tee -a "$out/log.txt" "$out/summary.txt"
    quick='--quick' bench='--suite quick --seconds 0.05' tests=${TESTS:-tests/bench/test_shape.py}
fi

# Compiling takes most of the tests' time, so it is spread over the cores where pytest-xdist is installed.
workers=$("$python" -c 'import os, xdist; print("-n", max(1, min(8, (os.cpu_count() or 1) // 2)))' 2>/dev/null) || workers=''

step env 60 "$python" -m iokernels env --json "$out/env.json"
# shellcheck disable=SC2086 # several words on purpose
step tests 240 "$python" -m pytest -q $workers $tests
# shellcheck disable=SC2086
step check 120 "$python" -m iokernels check $quick --json "$out/check.json"

operators=$("$python" -c 'from iokernels.ops import CASES; print(*CASES)' 2>>"$out/log.txt") || operators=''
if [ -z "$operators" ]; then
    failures=$((failures + 1))
    echo "failed   list of operators" >>"$out/summary.txt"
fi
waiting=$(echo "$operators" | wc -w)
for operator in $operators; do
    # What time is left is shared out evenly.
    limit=$(((deadline - $(date +%s)) / waiting))
    waiting=$((waiting - 1))
    # shellcheck disable=SC2086
    step "bench $operator" "$limit" "$python" -m iokernels bench "$operator" $bench \
        --json "$out/$operator.json" --md "$out/$operator.md"
done

echo "total $(($(date +%s) - started)) s, $failures failed" >>"$out/summary.txt"
echo
cat "$out/summary.txt"
[ "$failures" -eq 0 ]
