#!/usr/bin/env bash
# What only a GPU can tell, in one command and at most 8 minutes: is every CUDA path right, and then how fast is it.
#
#     bash scripts/gpu_check.sh [FOLDER]      the log, and all numbers as JSON, go there (gpu-check)
#
# Needs an environment with this project's dependencies and CuPy; PYTHON names its interpreter (python3). With PyTorch in
# it, its kernels and its training step are timed in turns with ours. All kernels are compiled before a part launches
# one. Correctness comes first: every kernel against its reference in float64, on random data, with outputs full of NaN;
# what is wrong is told and not timed. Each part has a time limit of its own, so that one that hangs leaves the others
# theirs, and all of them together have SECONDS_IN_ALL (480). Run again, it goes on with the parts that did not pass.
set -uo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

out="${1:-gpu-check}"
python="${PYTHON:-python3}"
in_all="${SECONDS_IN_ALL:-480}"
export PYTHONUNBUFFERED=1
"$python" -c '
import sys
try:
    import pytest
    from scripts import bench_kernels, bench_training, tune_attention
    from minillm.kernels.device import check_device
    check_device("cuda")
except (ImportError, ValueError) as error:
    sys.exit(f"gpu_check.sh: {error} (asked of {sys.executable}; PYTHON=... names another interpreter)")
' || exit 2
mkdir -p "$out"
failed=()

part() { # part SECONDS NAME COMMAND ...
    local limit="$1" name="$2" begin=$SECONDS status=0
    shift 2
    if [ -e "$out/$name.passed" ]; then
        echo "== $name: passed before"
        return
    fi
    limit=$((limit < in_all - SECONDS ? limit : in_all - SECONDS))
    if [ "$limit" -le 0 ]; then
        failed+=("$name (no time left)")
        return
    fi
    echo "== $name: ${*//$'\n'/; }"
    timeout --kill-after=5 "$limit" "$@" || status=$?
    case $status in
        0) touch "$out/$name.passed" ;;
        124 | 137) failed+=("$name (cut off after $limit s)") ;;
        *) failed+=("$name ($status)") ;;
    esac
    echo "== $name: $((SECONDS - begin)) s"
}

kernels() { # kernels SECONDS DTYPE OPTIONS ...: every kernel in this dtype, checked and timed
    local limit="$1" dtype="$2"
    shift 2
    part "$limit" "kernels-$dtype" "$python" scripts/bench_kernels.py --device cuda --dtype "$dtype" --check \
        --json "$out/kernels-$dtype.json" "$@"
}

bench() { # bench SECONDS NAME OPTIONS ...: a training step beside PyTorch's
    local limit="$1" name="$2"
    shift 2
    part "$limit" "training-$name" "$python" scripts/bench_training.py --device cuda --json "$out/training-$name.json" "$@"
}

compile_all='
import importlib, pkgutil
import minillm.kernels
from minillm.kernels import cuda
modules = [importlib.import_module(f"minillm.kernels.{m.name}") for m in pkgutil.iter_modules(minillm.kernels.__path__)]
sources = {thing for module in modules for thing in vars(module).values() if isinstance(thing, cuda.Source)}
cuda.compile_ahead(sources)
print(f"{sum(len(source.instances) for source in sources)} instances of {len(sources)} files")
'

{
    part 30 gpu nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    part 120 compile "$python" -c "$compile_all"
    # plain pytest is enough: of the project's own options, only the import mode is needed
    part 150 device "$python" -m pytest -v -o addopts=--import-mode=importlib tests/test_blas.py tests/test_device.py \
        tests/test_graph.py -k "gpu_and_the_cpu_agree or runs_on_the_gpu or no_update_waits or on_a_gpu or test_blas"
    kernels 200 bfloat16
    kernels 100 float32 --rounds 3
    gpt2=(--vocab 50304 --width 768 --layers 12 --heads 12 --length 1024 --precision bfloat16)
    bench 150 124M "${gpt2[@]}" --batch 32 --rounds 5 --compile
    if [ "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)" = 9.0 ]; then
        bench 60 124M-wgmma "${gpt2[@]}" --batch 32 --rounds 5 --kernels cuda_wgmma
    fi
    small=(--precision bfloat16 --rounds 10)
    medium=(--vocab 8192 --width 320 --layers 6 --heads 5 --length 256 --precision bfloat16 --rounds 10)
    bench 60 1M "${small[@]}"
    bench 60 1M-graph "${small[@]}" --graph
    bench 60 10M "${medium[@]}"
    bench 60 10M-graph "${medium[@]}" --graph
    bench 60 124M-50257 "${gpt2[@]}" --vocab 50257 --batch 32 --rounds 3  # GPT-2's own vocabulary, no multiple of 8
    part 60 tiles "$python" scripts/tune_attention.py --json "$out/tiles.json"
    kernels 100 float16 --rounds 3
    if [ ${#failed[@]} -gt 0 ]; then
        printf 'FAILED: %s\n' "${failed[@]}"
    else
        echo "all parts passed"
    fi
} 2>&1 | tee -a "$out/log"
tail -n 1 "$out/log" | grep -q '^all parts passed$'
