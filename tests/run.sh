#!/usr/bin/env bash
# Every check of the repository: format, lint, import directions, types, tests, in this order.
# Arguments go to pytest: bash tests/run.sh -k packing, or -m fast for the tests of two minutes.
# Exits 1 at the end if any check failed.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
cd "$ROOT"
# One thread per rank, so that results do not depend on the machine, and no compilation of
# megatron-core's fused functions, which costs 24-40 s and changes nothing on a CPU.
export OMP_NUM_THREADS=1
# All tests but those marked gpu run on the CPU, so GPUs are hidden from them. To run the others on
# a machine with a GPU: bash tests/run.sh -m gpu
if [[ " $* " != *" -m gpu "* ]]; then
    export TORCH_COMPILE_DISABLE=1 CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
fi

# A machine with its own packages (MOT_PYTHON) has Triton with its torch, if it has a GPU.
if [ -z "${MOT_PYTHON:-}" ] && ! "$PYTHON" -c 'import triton' 2>/dev/null; then
    "$PYTHON" -m pip install --disable-pip-version-check --quiet -r requirements-tests.txt
fi

failed=()

# $1: name of the check; the rest: its command.
check() {
    local name="$1" start=$SECONDS verdict=passed
    shift
    printf '== %s\n' "$name"
    "$@" || {
        verdict=FAILED
        failed+=("$name")
    }
    printf '== %s %s in %d s\n' "$name" "$verdict" "$((SECONDS - start))"
}

check format "$PYTHON" -m ruff format --check .
check lint "$PYTHON" -m ruff check .
check imports "$PYTHON" -c 'from importlinter.cli import lint_imports_command as main; main()'
check types "$PYTHON" -m pyright --pythonpath "$PYTHON"
if [ "${#failed[@]}" -gt 0 ]; then
    printf '== failed before the tests: %s\n' "${failed[*]}"
fi
printf '== tests\n'
# Two tests at a time, because many wait or use one core; -n 0 runs one. The tests of a file run one
# after the other and share what they prepare.
# pytest speaks last: its closing line is what a reader, and CI, look for.
"$PYTHON" -m pytest -n 2 --dist loadfile "$@" || failed+=(tests)
exit "$((${#failed[@]} > 0))"
