#!/usr/bin/env bash
# What only a GPU can tell, in one command and about 8 minutes: is every CUDA path right, and then how fast is it.
#
#     bash scripts/gpu_check.sh [FOLDER]      the log, and all numbers as JSON, go there (gpu-check)
#
# Needs an environment with this project's dependencies and CuPy; PYTHON names its interpreter (python3). With PyTorch in
# it, its kernels and its training step are timed in turns with ours. Correctness comes first: every kernel against its
# reference in float64, on random data, with outputs full of NaN; what is wrong is told and not timed. Each part has a
# time limit of its own, so that one that hangs leaves the others theirs.
set -uo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

out="${1:-gpu-check}"
python="${PYTHON:-python3}"
mkdir -p "$out"
export PYTHONUNBUFFERED=1
failed=()

part() { # part SECONDS NAME COMMAND ...
    local limit="$1" name="$2" begin=$SECONDS
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" || failed+=("$name ($?)")
    echo "== $name: $((SECONDS - begin)) s"
}

bench() { # bench SECONDS NAME OPTIONS ...: a training step beside PyTorch's
    local limit="$1" name="$2"
    shift 2
    part "$limit" "training-$name" "$python" scripts/bench_training.py --device cuda --json "$out/training-$name.json" "$@"
}

{
    part 30 gpu nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    # plain pytest is enough: of the project's own options, only the import mode is needed
    part 110 device "$python" -m pytest -q -o addopts=--import-mode=importlib tests/test_blas.py tests/test_device.py \
        tests/test_graph.py -k "gpu_and_the_cpu_agree or runs_on_the_gpu or no_update_waits or on_a_gpu or test_blas"
    part 150 kernels-bfloat16 "$python" scripts/bench_kernels.py --device cuda --dtype bfloat16 --check \
        --json "$out/kernels-bfloat16.json"
    part 60 kernels-float32 "$python" scripts/bench_kernels.py --device cuda --dtype float32 --check --rounds 3 \
        --json "$out/kernels-float32.json"
    part 60 kernels-float16 "$python" scripts/bench_kernels.py --device cuda --dtype float16 --check --rounds 3 \
        --json "$out/kernels-float16.json"
    gpt2=(--vocab 50304 --width 768 --layers 12 --heads 12 --length 1024 --precision bfloat16 --compile)
    bench 120 124M "${gpt2[@]}" --batch 64 --rounds 5
    small=(--precision bfloat16 --rounds 10)
    medium=(--vocab 8192 --width 320 --layers 6 --heads 5 --length 256 --precision bfloat16 --rounds 10)
    bench 45 1M "${small[@]}"
    bench 45 1M-graph "${small[@]}" --graph
    bench 45 10M "${medium[@]}"
    bench 45 10M-graph "${medium[@]}" --graph
    if [ ${#failed[@]} -gt 0 ]; then
        printf 'FAILED: %s\n' "${failed[@]}"
    else
        echo "all parts passed"
    fi
} 2>&1 | tee "$out/log"
grep -q '^all parts passed$' "$out/log"
