#!/bin/sh
# test_add_an_op.sh - a reader who follows docs/add_an_op.md to the letter gets a tested op.
#
# usage: test_add_an_op.sh SOURCE_DIR SCRATCH_DIR [CC]
# Copies the source tree, applies the page's blocks as their marks say
#     <!-- new file: PATH -->                 the block is the file
#     <!-- PATH, after: TEXT -->              it goes behind the one line that begins with TEXT
# builds the double library and the test of all ops without optimization, and runs that test
# on the new op.  Then it spoils the gradient and expects the test to say so.
set -eu
source=$1 scratch=$2 cc=${3:-cc}
page=$source/docs/add_an_op.md
tree=$scratch/tree build=$scratch/build
die() { echo "$*" >&2; exit 1; }

rm -rf "$scratch"
mkdir -p "$tree" "$scratch/block"
for part in CMakeLists.txt core ops autodiff models cuda frontends docs; do
    [ ! -e "$source/$part" ] || cp -R "$source/$part" "$tree"
done
mkdir "$tree/tests"
cp "$source/tests/test_f64_ops.c" "$tree/tests"

# block/N.mark and block/N.text for every marked block
awk -v to="$scratch/block" '
    /^<!-- new file: / || /^<!-- [^ ]*, after: / { mark = $0; next }
    /^```/ && inside { inside = 0; close(text); next }
    /^```/ && mark != "" {
        n++; text = to "/" n ".text"; inside = 1
        sub(/^<!-- /, "", mark); sub(/ -->$/, "", mark)
        print mark >(to "/" n ".mark"); close(to "/" n ".mark"); mark = ""; next
    }
    inside { print >text }
' "$page"

for mark in "$scratch"/block/*.mark; do
    text=${mark%.mark}.text
    read -r line <"$mark"
    case $line in
    "new file: "*)
        file=$tree/${line#new file: }
        [ ! -e "$file" ] || die "$line: the file is there already"
        cp "$text" "$file" ;;
    *", after: "*)
        file=$tree/${line%%, after: *}
        after=${line#*, after: }
        awk -v after="$after" -v text="$text" '
            { print }
            index($0, after) == 1 { found++; while ((getline l <text) > 0) print l }
            END { exit found != 1 }
        ' "$file" >"$scratch/new" || die "$line: not exactly one line begins so"
        cp "$scratch/new" "$file" ;;
    *) die "$line: what is to be done?" ;;
    esac
done
[ "$(find "$scratch/block" -name '*.mark' | wc -l)" -ge 4 ] || die "$page has lost its blocks"

op=$(sed -n 's/^FG_OP(\([a-z_0-9]*\),.*/\1/p' "$scratch"/block/*.text)
run() {
    "$@" >"$scratch/log" 2>&1 || { cat "$scratch/log"; die "failed: $*"; }
}
make_test() { run cmake --build "$build" --target test_f64_ops --parallel 2; }

launcher=$(command -v ccache || true)
run cmake -S "$tree" -B "$build" -DCMAKE_C_COMPILER="$cc" -DCMAKE_BUILD_TYPE=Debug -DFG_CUDA=OFF \
    -DCMAKE_C_COMPILER_LAUNCHER="$launcher"
make_test
! grep "$op.*warning" "$scratch/log" || die "the page's code gives warnings"
FG_TEST_OP=$op "$build/test_f64_ops" || die "$op fails its test"

sed -i 's/fg_scale(r, 2, 0)/fg_scale(r, 3, 0)/' "$tree/ops/$op.c"
make_test
! FG_TEST_OP=$op "$build/test_f64_ops" >"$scratch/log" 2>&1 || die "a wrong gradient passes"
grep -q "gradient of" "$scratch/log" || { cat "$scratch/log"; die "it fails for another reason"; }
rm -rf "$scratch"
