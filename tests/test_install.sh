#!/bin/sh
# test_install.sh BUILD_DIR - an installed fox-graph serves outside programs three ways: pkg-config,
# CMake's find_package and the plain compiler; its headers compile alone as C11 and C++17; it
# exports nothing without its prefix.
set -eu
build=$1
cc=${CC:-cc}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cmake --install "$build" --prefix "$work/prefix" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
prefix=$work/prefix
libdir=$(dirname "$(find "$prefix" -name fox-graph.pc)")/..

cat >"$work/program.c" <<'C'
#include <stdio.h>
#include <fox_graph.h>
int main(void)
{
    fg_backend *b = fg_backend_open("cpu", 1);
    fg_store *s = fg_store_new(b);
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(1, 2));
    fg_tensor y = fg_output(fg_scale(x, 3, 1), "y");
    fg_plan *p = fg_plan_new(g, s);
    float in[2] = { 1, 2 }, out[2];
    if (fg_write(p, x, in, sizeof in) || fg_run(p) || fg_read(p, y, out, sizeof out)) return 1;
    printf("%g %g\n", (double)out[0], (double)out[1]);
    fg_plan_free(p);
    fg_graph_free(g);
    fg_store_free(s);
    fg_backend_close(b);
    return 0;
}
C
expect() {
    [ "$1" = "4 7" ] || { echo "$2 program printed '$1', not '4 7'"; exit 1; }
    echo "ok: $2"
}

export PKG_CONFIG_PATH="$libdir/pkgconfig" LD_LIBRARY_PATH="$libdir"
$cc -std=c11 "$work/program.c" -o "$work/by_pkg_config" $(pkg-config --cflags --libs fox-graph)
expect "$("$work/by_pkg_config")" "pkg-config"

$cc -std=c11 "$work/program.c" -I"$prefix/include/fox-graph" -L"$libdir" -lfox-graph \
    -o "$work/by_cc"
expect "$("$work/by_cc")" "plain compiler"

mkdir "$work/outside"
cp "$work/program.c" "$work/outside/"
cat >"$work/outside/CMakeLists.txt" <<'C'
cmake_minimum_required(VERSION 3.25)
project(outside C)
find_package(fox-graph 0.1 REQUIRED CONFIG)
add_executable(program program.c)
target_link_libraries(program PRIVATE fox-graph::fox-graph)
C
cmake -S "$work/outside" -B "$work/outside/build" -DCMAKE_PREFIX_PATH="$prefix" \
      -DCMAKE_C_COMPILER="$cc" >"$work/log" 2>&1 &&
    cmake --build "$work/outside/build" >>"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
expect "$("$work/outside/build/program")" "find_package"

strict="-pedantic -Wall -Wextra -Werror -I$prefix/include/fox-graph -fsyntax-only"
for header in "$prefix"/include/fox-graph/*.h; do
    name=$(basename "$header")
    printf '#include <%s>\n' "$name" >"$work/alone.c"
    cp "$work/alone.c" "$work/alone.cc"
    $cc -std=c11 $strict "$work/alone.c"
    if command -v c++ >/dev/null; then c++ -std=c++17 $strict "$work/alone.cc"; fi
done
echo "ok: headers compile alone"

readelf -d "$libdir/libfox-graph.so" | grep -q 'SONAME.*libfox-graph\.so\.0\]' ||
    { echo "no SONAME libfox-graph.so.0"; exit 1; }
stray=$(nm -D --defined-only "$libdir/libfox-graph.so" | awk '{print $3}' |
        grep -Ev '^(fg_|fox_|transformer_|mamba2_|hgrn2_|delta_net_)' || true)
[ -z "$stray" ] || { echo "exported without the prefix:"; echo "$stray"; exit 1; }
echo "ok: SONAME and exported names"
