#!/bin/sh
# check_layering.sh - who may include whom, and that ops.def and the pages of ops/ agree.
#
# usage: check_layering.sh CC NM OPS_DEF FOLDER=DIR:DIR... ... -- OBJECT...
# FOLDER=...: the include path that the build gives to a folder.  Each pair below is compiled as a
# one-line file with that path alone; a forbidden include must not be found, an allowed one must.
# OBJECT...: the objects of ops/.  Every line of ops.def needs one record fg_code_NAME among them,
# every record a line.
set -u
cc=$1 nm=$2 ops_def=$3
shift 3
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
bad=0
say() { echo "$*"; bad=1; }

while [ $# -gt 0 ] && [ "$1" != -- ]; do
    echo "${1#*=}" | tr ':' '\n' | sed '/^$/d; s/^/-I/' >"$scratch/${1%%=*}.path"
    shift
done
shift

# compiles FOLDER HEADER: true if a file of that folder could include that header
compiles() {
    [ -f "$scratch/$1.path" ] || { say "the build names no include path for $1/"; return 1; }
    printf '#include "%s"\nextern int some;\n' "$2" >"$scratch/one.c"
    xargs "$cc" -std=c11 -fsyntax-only "$scratch/one.c" <"$scratch/$1.path" 2>"$scratch/why"
}

while read -r folder verb header; do
    if compiles "$folder" "$header"; then
        [ "$verb" = not ] && say "$folder/ can include $header and must not"
    elif [ "$verb" = may ]; then
        say "$folder/ cannot include $header: $(head -n 1 "$scratch/why")"
    elif ! grep -q "$header.*\(No such file\|not found\)" "$scratch/why"; then
        say "$folder/ is refused $header for another reason: $(head -n 1 "$scratch/why")"
    fi
done <<'END'
core      may fox_core.h
core      may graph.h
core      not fox_ops.h
core      not ops.h
core      not fox_autodiff.h
core      not fox_models.h
core      not fox_graph.h
ops       may op.h
ops       may fox_ops.h
ops       not fox_autodiff.h
ops       not fox_models.h
ops       not fox_train.h
autodiff  may graph.h
autodiff  may fox_ops.h
autodiff  not fox_models.h
autodiff  not fox_train.h
models    may fox_core.h
models    may fox_ops.h
models    may fox_models.h
models    not op.h
models    not graph.h
models    not ops.h
models    not internal.h
models    not vec.h
models    not fox_train.h
frontends may fox_graph.h
frontends may fox_train.h
frontends not op.h
frontends not graph.h
frontends not ops.h
frontends not internal.h
END

sed -n 's/^FG_OP(\([a-z0-9_]*\),.*/\1/p' "$ops_def" | sort >"$scratch/lines"
"$nm" "$@" | sed -n 's/^[0-9a-f]* [RDBrdb] fg_code_\([a-z0-9_]*\)$/\1/p' | sort >"$scratch/records"
[ -s "$scratch/lines" ] || say "$ops_def has no lines"
for name in $(uniq -d "$scratch/lines"); do say "ops.def has two lines for $name"; done
for name in $(comm -23 "$scratch/lines" "$scratch/records"); do
    say "ops.def has a line for $name, but no page of ops/ has fg_code_$name"
done
for name in $(comm -13 "$scratch/lines" "$scratch/records"); do
    say "a page of ops/ has fg_code_$name, but ops.def has no line for $name"
done
exit $bad
