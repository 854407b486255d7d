#!/bin/sh
# quickstart.sh - from a fresh Debian 12 or Ubuntu 24.04 to a trained model: installs what is
# missing, builds, and trains, evaluates and samples a small FoX (Pro) on English text.  Safe to
# run again.
set -eu
cd "$(dirname "$0")"

say() { printf '\n== %s\n' "$*"; }
fail() { echo "quickstart: $*" >&2; exit 1; }

missing=""
for p in gcc cmake make pkg-config libdnnl-dev libjansson-dev libc6-dev fortunes fortunes-min; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q "ok installed" || missing="$missing $p"
done
if [ -n "$missing" ]; then
    say "installing$missing"
    if [ "$(id -u)" = 0 ]; then as_root=""
    elif command -v sudo >/dev/null; then as_root=sudo
    else fail "needs$missing; run as root or install sudo"; fi
    $as_root env DEBIAN_FRONTEND=noninteractive sh -c \
        "apt-get update -qq && apt-get install -y -qq $missing" >install.log 2>&1 ||
        fail "could not install$missing (see install.log)"
    rm -f install.log
fi

say "building in build/quickstart"
mkdir -p build
if nvidia-smi -L >/dev/null 2>&1; then cuda=AUTO; else cuda=OFF; fi
{ cmake -B build/quickstart -DFG_TESTS=OFF -DFG_CUDA=$cuda &&
  cmake --build build/quickstart -j"$(nproc)"; } >build/quickstart.log 2>&1 ||
    fail "the build failed (see build/quickstart.log)"

text=build/fortunes.txt
if [ ! -s "$text" ]; then
    say "collecting text: the fortunes that the distribution packages"
    folder=/usr/share/games/fortunes
    [ -d "$folder" ] || fail "$folder is missing; is the package fortunes installed?"
    find "$folder" -maxdepth 1 -type f ! -name '*.dat' ! -name '*.u8' | LC_ALL=C sort |
        while IFS= read -r f; do cat "$f"; done >"$text.part"
    mv "$text.part" "$text"
fi
echo "$text: $(wc -c <"$text") bytes"

say "training, evaluating and sampling: fox-graph run models/examples/fox_pro_tiny.c"
exec build/quickstart/fox-graph run models/examples/fox_pro_tiny.c --data "$text" \
    --out build/quickstart-run --force "$@"
