#!/bin/bash
# test.sh - everything that can be tested on this machine: installs what is missing, checks the
# format, builds with gcc and clang with warnings as errors, runs all tests plain and under the
# address and undefined-behaviour sanitizers, compares what the two compilers build.  Safe to run
# again.
set -euo pipefail
cd "$(dirname "$0")"
jobs=$(nproc)
start=$(date +%s)
say() { printf '\n== [%ds] %s\n' $(($(date +%s) - start)) "$*"; }
fail() { echo "test.sh: $*" >&2; exit 1; }

packages="gcc g++ clang libomp-dev libclang-rt-14-dev cmake make pkg-config libdnnl-dev
          libjansson-dev libcriterion-dev binutils valgrind graphviz fortunes fortunes-min ccache
          chromium chromium-driver python3"
if ! apt-cache show libclang-rt-14-dev >/dev/null 2>&1 &&
   ! dpkg -s libclang-rt-14-dev >/dev/null 2>&1; then
    packages=${packages/libclang-rt-14-dev/}
fi
missing=""
for p in $packages; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q "ok installed" || missing="$missing $p"
done
if [ -n "$missing" ]; then
    say "installing$missing"
    if [ "$(id -u)" = 0 ]; then as_root=""; else as_root=sudo; fi
    mkdir -p build
    $as_root env DEBIAN_FRONTEND=noninteractive sh -c \
        "apt-get update -qq && apt-get install -y -qq $missing" >build/install.log 2>&1 ||
        { tail -5 build/install.log; fail "could not install$missing"; }
fi

# build NAME COMPILER [cmake options]
build() {
    local name=$1 compiler=$2 log=build/$1.log
    shift 2
    say "building $name with $compiler"
    mkdir -p build
    { cmake -B "build/$name" -DCMAKE_C_COMPILER="$compiler" -DCMAKE_C_COMPILER_LAUNCHER=ccache \
            -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache -DFG_WERROR=ON "$@" &&
      cmake --build "build/$name" -j"$jobs"; } >"$log" 2>&1 ||
        { grep -E "error|warning" -A4 "$log" | head -40; fail "building $name failed (see $log)"; }
}
run_tests() {
    say "testing $1"
    (cd "build/$1" && ctest -j"$jobs" --output-on-failure --timeout 900 "${@:2}")
}

build gcc gcc
# what ptxas said of the kernels that may keep a little in memory, if they were built just now
awk '/bytes spill stores/ && $5 + 0 > 128 { print "a kernel spills " $5 " bytes"; bad = 1 }
     END { exit bad }' build/gcc.log || fail "a kernel keeps too much in memory"
run_tests gcc
build clang clang -DFG_CUDA=OFF                          # nvcc takes gcc for its host part
# what no compiler changes, once is enough
run_tests clang -E '^(test_add_an_op|test_browser|check_format)$'
if [ -x tests/test_same_graph.sh ]; then
    say "gcc and clang, 1 and 2 threads: the same graph, the same loss"
    tests/test_same_graph.sh build/gcc build/clang
fi
# gcc warns of null pointers where a sanitizer checks for one: those are not errors
build sanitize gcc -DFG_SANITIZE=address,undefined -DFG_WERROR=OFF \
    -DCMAKE_C_FLAGS_RELWITHDEBINFO="-O1 -g"
export ASAN_OPTIONS=detect_leaks=1:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1
run_tests sanitize
if [ -x tests/valgrind.sh ]; then
    say "valgrind"
    tests/valgrind.sh build/valgrind
fi
say "all tests passed"
