#!/bin/bash
# test_same_graph.sh BUILD_A BUILD_B - two compilers build the same graph from one model, and train
# it to the same loss, digit for digit, with 1 and 2 threads.
set -euo pipefail
a=$1 b=$2
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for i in $(seq 3000); do
    printf 'the %d quick brown foxes jump over %d lazy dogs.\n' "$i" $((i * 7 % 13))
done >"$work/text"

compared=0
for model in fox_pro_tiny fox_llama_ops transformer_tiny mamba2_tiny hybrid hgrn2_tiny \
    delta_net_tiny; do
    source=$here/models/examples/$model.c
    for build in "$a" "$b"; do
        cc=$(sed -n 's/^CMAKE_C_COMPILER:[A-Z]*=//p' "$build/CMakeCache.txt")
        name=$(basename "$build")
        # the model file itself is compiled by the same compiler as the library
        export FOX_CC=$cc
        "$build/fox-graph" dump "$source" --pass all --stage planned --stable --json \
            >"$work/$name.dump"
        "$build/fox-graph" dump "$source" --pass all --stable --format html \
            >>"$work/$name.dump"
        for threads in 1 2; do
            out=$work/$model-$name-$threads
            "$build/fox-graph" train "$source" --data "$work/text" --steps 4 --threads $threads \
                --seed 5 --set batch=4 --set context=64 --set warmup_tokens=256 --out "$out" -q
            grep '"kind": *"train"' "$out/metrics.jsonl" | grep -o '"loss": *[0-9.e+-]*' \
                >"$work/$name-$threads.loss"
            [ -s "$work/$name-$threads.loss" ] || { echo "$model: no losses were written"; exit 1; }
        done
    done
    x=$(basename "$a") y=$(basename "$b")
    cmp "$work/$x.dump" "$work/$y.dump" ||
        { diff "$work/$x.dump" "$work/$y.dump" | head -5; exit 1; }
    for other in "$x-2" "$y-1" "$y-2"; do
        cmp "$work/$x-1.loss" "$work/$other.loss" ||
            { paste "$work/$x-1.loss" "$work/$other.loss" | head -5; exit 1; }
    done
    losses=$(tr '\n' ' ' <"$work/$x-1.loss")
    echo "ok: $model: $(wc -l <"$work/$x.dump") lines of graph, losses $losses"
    compared=$((compared + 1))
done
[ $compared = 7 ]
