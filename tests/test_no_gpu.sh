#!/bin/sh
# test_no_gpu.sh - what the command says where a GPU, its driver or the backend is missing.  A
# library without a symbol plays the driver.
#
# usage: test_no_gpu.sh BUILD_DIR SCRATCH_DIR [CC]
set -eu
build=$1 scratch=$2 cc=${3:-cc}
mkdir -p "$scratch/driver" "$scratch/alone"
if nvidia-smi -L >/dev/null 2>&1; then echo "there is a GPU: nothing to test"; exit 0; fi

# says WORDS COMMAND...: status 6, and one line with the words
says() {
    words=$1 status=0
    shift
    "$@" >"$scratch/out" 2>"$scratch/error" || status=$?
    if [ $status = 6 ] && [ "$(wc -l <"$scratch/error")" = 1 ] && grep -q "$words" "$scratch/error"
    then echo "ok: $(cat "$scratch/error")"
    else echo "status $status, not 6, or not \"$words\": $*"; cat "$scratch/error"; exit 1
    fi
}

echo 'int nothing;' >"$scratch/nothing.c"
"$cc" -shared -fPIC -o "$scratch/driver/libcuda.so.1" "$scratch/nothing.c"
cp "$build/fox-graph" "$build"/libfox-graph.so* "$scratch/alone/"
model=transformer-llama-125m

says "the NVIDIA driver (libcuda.so.1) is not there\|no CUDA device" \
    "$build/fox-graph" bench $model --device cuda
says "libfox-graph-cuda.so: cannot open shared object file" \
    env LD_LIBRARY_PATH="$scratch/driver:$scratch/alone" "$scratch/alone/fox-graph" \
    bench $model --device cuda
if [ -e "$build/libfox-graph-cuda.so" ]; then
    says "the NVIDIA driver is missing or too old" \
        env LD_LIBRARY_PATH="$scratch/driver" "$build/fox-graph" bench $model --device cuda
fi
LD_LIBRARY_PATH=$scratch/driver "$build/fox-graph" info $model | tail -n 2 | tee "$scratch/out"
grep -q "^  cpu" "$scratch/out"              # without --device the CPU is taken, and it is said why
grep -q "cuda backend\|CUDA device" "$scratch/out"
