#!/bin/sh
# check_format.sh - the part of docs/style.md that a machine can see, over every file of ours.
#
# usage: check_format.sh [SOURCE_DIR]
# All text: no blanks at the end of a line, no carriage returns, a newline at the end of the file.
# Code: at most 100 columns.  C and CUDA: no tabs, ASCII alone, a first line "/* name.c - what it
# is", no marks of unfinished work.  Prints offences as FILE:LINE: RULE and fails if there is one.
cd "${1:-$(dirname "$0")/..}" || exit 2

list() {
    if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
        git ls-files --cached --others --exclude-standard
    else
        find . -path ./build -prune -o -type f -print | sed 's|^\./||'
    fi | grep -E '\.(c|h|cu|cuh|def|sh|md|txt)$'
}

list | while IFS= read -r file; do
    [ -f "$file" ] || continue                   # deleted, but not committed yet
    [ -s "$file" ] && [ -n "$(tail -c 1 "$file")" ] && echo "$file:0: no newline at its end"
    LC_ALL=C awk -v file="$file" '
        function offence(rule) { print file ":" FNR ": " rule }
        BEGIN {
            name = file; sub(/.*\//, "", name)
            c = file ~ /\.(c|h|cu|cuh|def)$/
            code = c || file ~ /\.sh$/ || name == "CMakeLists.txt"
            unfinished = "(^|[^A-Za-z0-9_])(TO" "DO|FIX" "ME|X" "XX)([^A-Za-z0-9_]|$)"
        }
        c && FNR == 1 && index($0, "/* " name " - ") != 1 { offence("not \"/* " name " - ...\"") }
        code && length($0) > 100 { offence("has " length($0) " columns, over 100") }
        c && /\t/ { offence("has a tab") }
        c && /[\200-\377]/ { offence("has a character that is not ASCII") }
        c && $0 ~ unfinished { offence("marks unfinished work") }
        /\r/ { offence("has a carriage return") }
        /[ \t]$/ { offence("ends in a blank") }
    ' "$file"
done | { found=0; while IFS= read -r line; do echo "$line"; found=1; done; exit $found; }
