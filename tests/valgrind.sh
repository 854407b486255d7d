#!/bin/bash
# valgrind.sh BUILD - small test programs and the command under valgrind's memcheck: no invalid
# access, no jump on a value never set, no leak.
#
# Builds the library and the command in BUILD without -march=native, whose instructions valgrind
# may not know.  The tests are files of tests/ compiled against tests/plain, which runs them in one
# process.
set -euo pipefail
build=$1
here=$(cd "$(dirname "$0")/.." && pwd)
cc=${CC:-gcc}
launcher=$(command -v ccache || true)
mkdir -p "$build"
build=$(cd "$build" && pwd)
run() { "$@" >"$build/log" 2>&1 || { tail -30 "$build/log"; echo "failed: $*"; exit 1; }; }

run cmake -S "$here" -B "$build" -DCMAKE_C_COMPILER="$cc" -DCMAKE_C_COMPILER_LAUNCHER="$launcher" \
    -DCMAKE_C_FLAGS_RELWITHDEBINFO="-O1 -g" -DFG_NATIVE=OFF -DFG_TESTS=OFF -DFG_CUDA=OFF
run cmake --build "$build" -j"$(nproc)" --target fox-graph-command fox-graph-static

memcheck() {
    valgrind --quiet --error-exitcode=99 --leak-check=full --num-callers=30 \
        --show-leak-kinds=definite,indirect,possible \
        --errors-for-leak-kinds=definite,indirect,possible \
        --suppressions="$here/tests/valgrind.supp" "$@"
}

mkdir -p "$build/plain"
for name in graph store errors grad json recipe; do
    run "$cc" -std=c11 -O1 -g -fopenmp -D_POSIX_C_SOURCE=200809L -D_DEFAULT_SOURCE \
        -DFIXTURES="\"$here/tests/fixtures\"" -DSOURCE_DIR="\"$here\"" -DBUILD_DIR="\"$build\"" \
        -I"$here/tests/plain" -I"$build/include" -I"$here/core" -I"$here/ops" \
        -I"$here/autodiff" -I"$here/models" -I"$here/frontends" -I"$here/tests" \
        "$here/tests/test_$name.c" -o "$build/plain/test_$name" \
        -Wl,--whole-archive "$build/libfox-graph-static.a" -Wl,--no-whole-archive \
        -ldnnl -lgomp -lm -ldl
    memcheck "$build/plain/test_$name" >"$build/log" 2>&1 ||
        { cat "$build/log"; echo "test_$name fails under valgrind"; exit 1; }
    echo "ok: test_$name, $(tail -1 "$build/log")"
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export FOX_CACHE_DIR=$work/cache FOX_INCLUDE=$build/include
for i in $(seq 300); do echo "line $i says that $((i * 7 % 13)) foxes forget."; done >"$work/text"
model=$here/models/examples/fox_pro_tiny.c
tiny=(--set width=32 --set layers=1 --set heads=2 --set batch=2 --set context=32)

# command STATUS ARGUMENTS: must end with that status, and without an error of valgrind's
command() {
    local want=$1 got=0
    shift
    memcheck "$build/fox-graph" "$@" >"$build/log" 2>&1 || got=$?
    [ "$got" = "$want" ] ||
        { cat "$build/log"; echo "fox-graph $1 under valgrind: status $got, not $want"; exit 1; }
    echo "ok: fox-graph $1 (status $got)"
}
command 0 ops
command 2 train
command 5 check "$work/text"
echo "int broken = ;" >"$work/broken.c"
command 3 check "$work/broken.c"
command 4 check "$here/tests/golden/cli/shapes.c"
command 0 check "$model" "${tiny[@]}"
command 0 dump "$model" "${tiny[@]}" --pass all --heat time --values stats --format json \
    -o "$work/g.json"
for format in text dot svg html; do
    command 0 dump "$work/g.json" --format $format --memory --heat time -o "$work/g.$format"
done
command 1 diff "$work/g.json" "$model" "${tiny[@]}" --set layers=2 --pass all
command 0 train "$model" "${tiny[@]}" --data "$work/text" --steps 2 --set warmup_tokens=64 \
    --threads 1 --out "$work/run" -q
command 0 eval "$work/run" --data "$work/text" --threads 1
command 0 generate "$work/run" --prompt fox --max-tokens 3 --threads 1
