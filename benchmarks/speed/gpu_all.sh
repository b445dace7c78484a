#!/usr/bin/env bash
# All that a GPU has to show, in one call of at most 9 minutes: first the tests of every CUDA path, then the rows with a report.
#
#     bash benchmarks/speed/gpu_all.sh                 lines and a table; also as files in the folder OUT, if that is set
#     bash benchmarks/speed/gpu_all.sh --quick         tiny settings, also without a GPU: does it run?
#
# A part that takes longer than its share is stopped, and the next one runs all the same. Exit code 1: a test or a part failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD:$PWD/tokenizers${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
out="${OUT:-$(mktemp -d)}"
mkdir -p "$out"
export OUT="$out" PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
failed=0

part() { # name, seconds at most, command
    local name="$1" most="$2" code=0 begin="$SECONDS"
    shift 2
    printf '\n== %s\n' "$name"
    timeout "$most" "$@" || code=$?
    local said="ok"
    [[ "$code" == 0 ]] || { said="failed with code $code"; failed=1; }
    [[ "$code" == 124 ]] && said="stopped after $most s"
    printf '%s\t%s\t%s s\n' "$name" "$said" "$((SECONDS - begin))" >>"$out/parts.tsv"
}

: >"$out/parts.tsv"
"$python" -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")' | tee "$out/machine.txt"
part "tests of CUDA paths" 150 "$python" -m pytest -q -n 0 -m cuda tests/test_cuda_paths.py tests/train/test_waits.py
for row in gpu-ceilings gpu-decode gpu-train; do
    most=120
    [[ "$row" == gpu-train ]] && most=200
    [[ "$row" == gpu-ceilings ]] && most=60
    part "$row" "$most" "$python" -m benchmarks.speed "$row" "$@"
done
printf '\n== in all\n'
column -t -s "$(printf '\t')" "$out/parts.tsv" 2>/dev/null || cat "$out/parts.tsv"
exit "$failed"
