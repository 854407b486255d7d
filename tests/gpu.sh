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
n=0
for t in "$build"/test_*cuda*; do
    [ -x "$t" ] && [ -f "$t" ] || continue
    n=$((n + 1))
    mode=
    [ "$(basename "$t")" = test_cuda_plain ] && mode=check
    begin=$(date +%s)
    "$t" $mode >"$work/log" 2>&1 ||
        { fail "$(basename "$t")"; grep -v '^/' "$work/log" | head -40; }
    tail -n 12 "$work/log"
    echo "$(basename "$t"): $(($(date +%s) - begin)) s"
done
[ $n -ge "$(ls tests/test_*cuda*.c | wc -l)" ] || fail "$build has $n tests, fewer than tests/"

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
# The examples of every JOBS-th op under a tool.  One draw is too few for the test's own yardstick:
# what counts is the tool's verdict.
examined() {
    local status=0
    FG_TEST_OP=$(awk -v n="$JOBS" -v k="$2" 'NR % n == k' "$work/ops" | paste -sd,) \
        FG_TEST_DRAWS=1 timeout "${LIMIT:-500}" compute-sanitizer --tool "$1" --error-exitcode 9 \
        --kernel-regex-exclude kns=cutlass --kernel-regex-exclude kns=cublas \
        "$build/test_f64_cuda_ops" >"$work/$1.$2" 2>&1 || status=$?
    [ $status -le 1 ] && grep -q "ERROR SUMMARY: 0 errors" "$work/$1.$2" && return
    echo "FAILED: $1, every $JOBS-th op from $2: status $status"
    grep '^=====' "$work/$1.$2" | head -20
}
if [ -z "${QUICK:-}" ] && ! command -v compute-sanitizer >/dev/null; then
    fail "compute-sanitizer is not here"
elif [ -z "${QUICK:-}" ]; then
    JOBS=$(nproc)
    export -f examined
    export build work JOBS
    sed -n 's/^FG_OP(\([a-z0-9_]*\).*/\1/p' ops/ops.def >"$work/ops"
    for tool in memcheck initcheck synccheck; do
        say "compute-sanitizer $tool"
        seq 0 $((JOBS - 1)) | xargs -P "$JOBS" -I{} bash -c "examined $tool {}" >"$work/log"
        cat "$work/log"
        [ -s "$work/log" ] && bad=1
        cat "$work/$tool".* | awk '/examples have a kernel/ { n += $1 } END { print n, "examples" }'
    done
fi

say "$([ $bad = 0 ] && echo "all passed" || echo "something FAILED")"
exit $bad
