#!/bin/sh
# test_docs.sh - what README.md and docs/write_a_model.md show is true of this build.
#
# usage: test_docs.sh SOURCE_DIR BUILD_DIR [CC]
#     <!-- file: NAME.c -->       the next block is a whole file: a program is compiled and run, a
#                                 model is checked and trained for 3 steps
#     <!-- mistake: NAME.c -->    the next two blocks are a model and lines of what check says
# The table of recipe keys and that of refused commands are compared with the command, too.
set -eu
source=$1 build=$2 cc=${3:-cc}
page=$source/docs/write_a_model.md
fox=$build/fox-graph
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export FOX_CACHE_DIR="$work/cache" FOX_CC="$cc"
die() { echo "$*" >&2; exit 1; }
attempt() { "$@" >log 2>&1 || { cat log; die "failed: $*"; }; }

# NAME.c and, for a mistake, NAME.c.says; the names in files and mistakes
awk '
    /^<!-- (file|mistake): / { kind = $2; name = $3; next }
    /^```/ && to != "" { close(to); to = ""; next }
    /^```c$/ && kind != "" {
        to = name; print name >(kind == "file:" ? "files" : "mistakes")
        if (kind == "file:") name = ""
        kind = ""; next
    }
    /^```text$/ && name != "" { to = name ".says"; name = ""; next }
    to != "" { print >to }
' "$source/README.md" "$page"
[ "$(wc -l <files)" -ge 4 ] && [ "$(wc -l <mistakes)" -ge 5 ] || die "the pages lost their blocks"

awk 'BEGIN { for (i = 1; i <= 3000; i++) print "First, the " i "th line of a text." }' >text.txt

while read -r name; do
    base=${name%.c}
    if grep -q '^int main' "$name"; then
        attempt "$cc" -std=c11 -D_POSIX_C_SOURCE=200809L -Wall -Wextra -Wpedantic -Werror \
            -I"$build/include" "$name" -o "$base" -L"$build" -lfox-graph -Wl,-rpath,"$build"
        attempt "./$base" text.txt "$base.out"
        if grep -q "^    ./$base\$" "$page"; then
            grep -qxF "    $(cat log)" "$page" || die "$base prints '$(cat log)', the page differs"
        fi
        [ ! -d "$base.out" ] || attempt "$fox" generate "$base.out" --prompt It --max-tokens 2
    else
        attempt "$fox" check "$name"
        grep -q "no problems" log || die "check does not praise $name"
        attempt "$fox" train "$name" --data text.txt --steps 3 --set batch=2 --set context=16 -q
    fi
    echo "ok: $name"
done <files

# The line of a library file is not part of a message's claim.
plain() { sed 's/at layers\.c:[0-9]*/at layers.c/' "$1"; }
while read -r name; do
    if "$fox" check "$name" >log 2>&1; then die "check finds no mistake in $name"; fi
    plain log >said
    plain "$name.says" >wanted
    while IFS= read -r line; do
        grep -qxF -- "$line" said || { cat log; die "$name: check does not say: $line"; }
    done <wanted
    echo "ok: mistake $name"
done <mistakes

# The recipe: every key, in order, with its default.
cat >model.c <<'C'
#include <fox_graph.h>
fg_tensor fg_model(fg_tensor tokens)
{
    const fox_config c = fox_pro_config(64, fg_setting_int(tokens.graph, "width", 32), 1, 2);
    return fox_lm(tokens, &c);
}
C
"$fox" info model.c --show-config | sed -n '/^data /,/^bos /p' |
    awk '{ print $1 "|" (NF > 2 ? $2 : "") }' >keys.command
sed -n '/^| key | default/,/^$/p' "$page" |
    awk -F' *[|] *' '/^[|] `/ { gsub("`", "", $2); print $2 "|" $3 }' >keys.page
[ -s keys.command ] || die "info --show-config prints no recipe"
diff keys.command keys.page || die "the page's recipe (>) is not the command's (<)"
echo "ok: recipe"

sed -n '/^| command | answer/,/^$/p' "$page" | awk -F'`' '/^[|] `/ { print $2 "\t" $4 }' >refusals
[ -s refusals ] || die "the page lost its table of refused commands"
while IFS="$(printf '\t')" read -r command answer; do
    # shellcheck disable=SC2086
    if "$fox" $command >log 2>&1; then die "fox-graph $command is not refused"; fi
    grep -qxF "fox-graph: $answer" log || { cat log; die "not the answer to fox-graph $command"; }
done <refusals
echo "ok: refused commands"
