#!/bin/bash
# gpu.sh BUILD - everything that needs a GPU: the tests of the kernels and of the models, the same
# under compute-sanitizer, failures on purpose, and the tables of speeds for docs/benchmarks.md.
#
# BUILD holds the programs (cmake -B BUILD && cmake --build BUILD).  For a machine without Criterion
# or cmake, build elsewhere with -DFG_PLAIN_TESTS=ON and bring the folder.  Run at the top of the
# tree.  QUICK=1 leaves out the sanitizer and the long measurements; LIMIT bounds each of its tools,
# in seconds.
set -u
build=${1:?usage: tests/gpu.sh BUILD}
bad=0
start=$(date +%s)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say() { printf '\n== [%ds] %s\n' $(($(date +%s) - start)) "$*"; }
fail() { echo "FAILED: $*"; bad=1; }
fox() { "$build/fox-graph" "$@"; }

nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader ||
    { echo "there is no NVIDIA GPU here"; exit 2; }

export FG_NEED_GPU=1                     # without it, tests that find no GPU pass
say "kernels and models"
# Several at a time: most of a test's time is the host's.  Those that fill the memory take turns.
tested() {
    local name begin got=0 lock=
    name=$(basename "$1")
    case $name in *_long | *_large) lock="flock $work/memory" ;; esac
    [ "$name" = test_f64_cuda_attention ] && OMP_NUM_THREADS=$((2 * OMP_NUM_THREADS))
    begin=$(date +%s)
    $lock "$1" $([ "$name" = test_cuda_plain ] && echo check) >"$work/$name" 2>&1 || got=$?
    {
        [ $got = 0 ] || { echo "FAILED: $name"; grep -v '^/' "$work/$name" | head -40; }
        tail -n 12 "$work/$name"
        echo "$name: $(($(date +%s) - begin)) s"
    } >"$work/$name.said"
    cat "$work/$name.said"               # at once: others write too
}
export -f tested
export build work
longest="f64_cuda_attention f64_cuda_attention_long cuda_plain f64_cuda_extremes
    f64_cuda_linear_attention f64_cuda_large f64_cuda_ops"
tests=$({ for t in $longest; do echo "$build/test_$t"; done; printf '%s\n' "$build"/test_*cuda*; } |
    awk '!seen[$0]++' | while read -r t; do [ -x "$t" ] && [ -f "$t" ] && echo "$t"; done)
at_once=4
OMP_NUM_THREADS=$((($(nproc) + at_once - 1) / at_once)) xargs -P $at_once -I{} bash -c 'tested {}' \
    <<<"$tests" >"$work/log"
cat "$work/log"
grep -q "^FAILED" "$work/log" && bad=1
[ "$(wc -l <<<"$tests")" -ge "$(ls tests/test_*cuda*.c | wc -l)" ] ||
    fail "$build has fewer tests than tests/"

say "failures on purpose"
# refused STATUS WORDS COMMAND...: ends with that status and says so
refused() {
    local want=$1 words=$2 got=0
    shift 2
    "$@" >"$work/log" 2>&1 || got=$?
    if [ "$got" = "$want" ] && grep -q "$words" "$work/log"; then
        echo "ok: $(grep -m 1 "$words" "$work/log" | cut -c1-150)"
    else
        fail "status $got, not $want, or without \"$words\": $*"
        head -5 "$work/log"
    fi
}
cat docs/*.md README.md >"$work/text"
refused 6 "out of memory" fox bench fox-pro-760m --set batch=16 --set micro_batch=16 \
    --set context=16384 --set recompute=0 --step --repeat 1
refused 6 "there is no cuda:63" fox bench fox-pro-125m --device cuda:63
small=(--set width=64 --set layers=2 --set heads=2 --set batch=4 --set context=64
       --data "$work/text")
fox train models/fox.c "${small[@]}" --steps 20 --set save_every=10 --out "$work/run" -q ||
    fail "a run of 20 steps"
refused 6 "out of memory" fox train models/fox.c "${small[@]}" --set batch=4096 \
    --set micro_batch=4096 --set context=16384 --set eval_fraction=0 --steps 30 \
    --out "$work/run" --force -q
fox eval "$work/run" --data "$work/text" --json >/dev/null || fail "the checkpoint is not whole"
refused 6 "launch failure" fox train tests/golden/gpu/lost.c \
    "${small[@]}" --steps 1000000 --set save_every=100 --out "$work/lost" -q
fox eval "$work/lost" --data "$work/text" --json >/dev/null || fail "no checkpoint of a lost run"
FG_CHECK=1 fox train models/fox.c "${small[@]}" --steps 3 --out "$work/checked" -q ||
    fail "a checked run"
# A card that the library has no code for: the driver may use neither the code for this one nor make
# it from what there is for others.
other=(env CUDA_FORCE_PTX_JIT=1 CUDA_DISABLE_PTX_JIT=1)
refused 6 "is not supported: libfox-graph-cuda.so has no code" "${other[@]}" "$build/fox-graph" \
    train models/fox.c "${small[@]}" --device cuda --steps 1 --out "$work/other" -q
"${other[@]}" "$build/fox-graph" info transformer-llama-125m | tail -n 2 >"$work/log"
grep -q "^  cpu" "$work/log" && grep -q "is not supported" "$work/log" ||
    { fail "info of a card that is not supported"; cat "$work/log"; }
"${other[@]}" "$build/fox-graph" train models/fox.c "${small[@]}" --steps 1 --out "$work/other" \
    -q || fail "the CPU is not taken where the card is not supported"
refused 7 "is not finite\|is nan\|is inf" env FG_CHECK=1 "$build/fox-graph" train \
    tests/golden/cli/nan.c --data "$work/text" --steps 3 --out "$work/nan"

say "the same bits: resumed and not, with and without graphs"
sum() { sha256sum "$1/ckpt/step-000000020/model.safetensors" | cut -c1-16; }
cp -r "$work/run" "$work/half"
rm -r "$work/half/ckpt/step-000000020"
fox train models/fox.c "${small[@]}" --steps 20 --set save_every=10 --out "$work/half" \
    --resume -q ||
    fail "a resumed run"
[ "$(sum "$work/run")" = "$(sum "$work/half")" ] || fail "a resumed run gives other parameters"
FG_NO_GRAPHS=1 fox train models/fox.c "${small[@]}" --steps 20 --out "$work/plain" -q
[ "$(sum "$work/run")" = "$(sum "$work/plain")" ] ||
    fail "a run without graphs gives other parameters"
fox generate "$work/run" --prompt "The " --max-tokens 200 --temperature 0 >"$work/a"
FG_NO_GRAPHS=1 fox generate "$work/run" --prompt "The " --max-tokens 200 --temperature 0 >"$work/b"
cmp "$work/a" "$work/b" || fail "generation without graphs gives other tokens"
if [ -z "${QUICK:-}" ]; then           # 8000 tokens in the caches, weights as they are drawn
    head -c 8000 "$work/text" >"$work/prompt"
    for plain in 0 1; do
        FG_NO_GRAPHS=$plain fox generate fox-pro-760m --prompt-file "$work/prompt" \
            --max-tokens 100 --seed 3 --json >"$work/tokens$plain"
    done
    cmp "$work/tokens0" "$work/tokens1" || fail "fox-pro-760m without graphs gives other tokens"
    echo "fox-pro-760m: $(sha256sum <"$work/tokens0" | cut -c1-16)"
fi
echo "parameters after 20 steps: $(sum "$work/run"), $(sum "$work/half"), $(sum "$work/plain")"

say "speed"
at16k=(--set batch=1 --set context=16384)
echo "\$ fox-graph bench fox-pro-760m --set batch=1 --set context=16384 --set recompute=0 --ops"
fox bench fox-pro-760m "${at16k[@]}" --set recompute=0 --ops --repeat "${REPEAT:-20}" || fail bench
nvidia-smi --query-gpu=clocks.sm,power.draw,temperature.gpu --format=csv,noheader
echo "\$ fox-graph info fox-pro-760m --set batch=1 --set context=16384 --set recompute=0"
fox info fox-pro-760m "${at16k[@]}" --set recompute=0 | sed -n '/memory of training/,$p'
if [ -z "${QUICK:-}" ]; then
    for model in transformer-llama-760m mamba2-760m hgrn2-760m delta-net-760m; do
        echo "\$ fox-graph bench $model ... --set recompute=0 --ops"
        fox bench "$model" "${at16k[@]}" --set recompute=0 --ops --repeat "${REPEAT:-20}" \
            >"$work/log" || fail "bench $model"
        head -n 18 "$work/log"
        fox info "$model" "${at16k[@]}" --set recompute=0 | grep '  total'
    done
    for model in fox-pro-760m mamba2-760m hgrn2-760m delta-net-760m; do
        echo "\$ fox-graph bench $model ... --set recompute=1 --step"
        fox bench "$model" "${at16k[@]}" --set recompute=1 --step --repeat 5 | sed -n 2p
    done
    echo "\$ fox-graph bench fox-pro-760m --decode-at 8192"
    fox bench fox-pro-760m --set recompute=0 --decode-at 8192 || fail "bench --decode-at"
fi
say "from process start to the first step done"
begin=$(date +%s.%N)
"$build/fox-graph" train fox-pro-760m --data "$work/text" "${at16k[@]}" --set recompute=0 \
    --set eval_fraction=0.3 --steps 1000 >"$work/first" 2>&1 &
child=$!
while kill -0 $child 2>/dev/null && ! grep -q "^step 1/" "$work/first"; do sleep 0.05; done
end=$(date +%s.%N)
grep "^step 1/" "$work/first" || fail "no first step: $(tail -n 1 "$work/first")"
echo "$begin $end" | awk '{ printf "fox-pro-760m: %.2f s\n", $2 - $1 }'
kill -TERM $child 2>/dev/null
wait $child
# watched TOOL NAME COMMAND...: under the tool, whose verdict is all that counts; one draw of the
# inputs is too few for the test's own yardstick.
watched() {
    local tool=$1 name=$2 status=0
    shift 2
    FG_TEST_DRAWS=1 FG_NEED_GPU=1 OMP_NUM_THREADS=2 timeout "${LIMIT:-500}" compute-sanitizer \
        --tool "$tool" --error-exitcode 9 --kernel-regex-exclude kns=cutlass \
        --kernel-regex-exclude kns=cublas "$@" >"$work/$tool.$name" 2>&1 || status=$?
    [ $status -le 1 ] && grep -q "SUMMARY: 0 \(errors\|hazards\)" "$work/$tool.$name" && return
    echo "FAILED: $tool of $name: status $status"
    grep '^=====' "$work/$tool.$name" | head -20
}
# The examples of every SHARES-th op.
examined() {
    FG_TEST_OP=$(awk -v n="$SHARES" -v k="$2" 'NR % n == k' "$work/ops" | paste -sd,) \
        watched "$1" "ops$2" "$build/test_f64_cuda_ops"
}
if [ -z "${QUICK:-}" ] && ! command -v compute-sanitizer >/dev/null; then
    fail "compute-sanitizer is not here"
elif [ -z "${QUICK:-}" ]; then
    SHARES=$(nproc)
    export -f watched examined
    export SHARES
    sed -n 's/^FG_OP(\([a-z0-9_]*\).*/\1/p' ops/ops.def >"$work/ops"
    for tool in memcheck initcheck synccheck racecheck; do
        say "compute-sanitizer $tool"
        [ $tool = racecheck ] && export SHARES=$((2 * SHARES)) FG_TEST_RUNS=1    # slow ops apart
        seq 0 $((SHARES - 1)) | xargs -P "$(nproc)" -I{} bash -c "examined $tool {}" >"$work/log"
        cat "$work/log"
        [ -s "$work/log" ] && bad=1
        cat "$work/$tool".ops* |
            awk '/examples have a kernel/ { n += $1 } END { print n, "examples" }'
    done
    say "compute-sanitizer memcheck, sequences of 130 tokens at most"
    for t in attention linear_attention ssd_scan forget_decode; do
        echo "$t"
    done | FG_TEST_LENGTH=130 xargs -P 4 -I{} \
        bash -c 'watched memcheck {} "$build/test_f64_cuda_{}"' >"$work/log"
    cat "$work/log"
    [ -s "$work/log" ] && bad=1
fi

say "$([ $bad = 0 ] && echo "all passed" || echo "something FAILED")"
exit $bad
