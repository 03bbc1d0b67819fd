#!/usr/bin/env bash
# Installs the library to a folder of its own and uses it as a stranger would: by pkg-config, by CMake, static, from another
# place, under valgrind. What is not on this machine is named and skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(uname -s)" = Linux ] || { echo "skipped: the installation is checked on Linux"; exit 0; }
abi="$(sed -n 's/^#define BS_ABI_VERSION //p' include/bigsmall.h)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
lacks() { ! command -v "$1" >/dev/null && echo "skipped: there is no $1"; }
fail() { echo "check_install: $*" >&2; exit 1; }
strict=(-Wall -Wextra -Werror -pedantic -O1 -g)
cc="${CC:-cc}" cxx="${CXX:-c++}"

# use PREFIX BUILD: builds both examples with what is installed at PREFIX, and runs them.
use() {
	local flags libs
	mkdir -p "$2"
	if lacks pkg-config; then
		flags="-I$1/include" libs="-L$1/lib -lbigsmall"
	else
		flags="$(PKG_CONFIG_PATH="$1/lib/pkgconfig" pkg-config --cflags bigsmall)"
		libs="$(PKG_CONFIG_PATH="$1/lib/pkgconfig" pkg-config --libs bigsmall)"
	fi
	# shellcheck disable=SC2086
	"$cc" -std=c99 "${strict[@]}" $flags examples/c/decode.c $libs -o "$2/decode"
	# shellcheck disable=SC2086
	"$cxx" -std=c++17 "${strict[@]}" $flags examples/c/compress.cpp $libs -o "$2/compress"
	LD_LIBRARY_PATH="$1/lib" run "$2"
}

# run BUILD [DECODE]: compresses and decodes with the programs there.
run() {
	local decode="$1/${2:-decode}" bs="$work/model.bs"
	[ $# -gt 1 ] || "$1/compress" "$bs" 300 200 >"$work/said"
	"$decode" "$bs" >"$work/list"
	grep -q '^layer.weight  float32 \[300, 200\]  240000 bytes' "$work/list" || fail "$decode lists $(cat "$work/list")"
	"$decode" "$bs" layer.bias "$work/bias" >"$work/said"
	grep -qx 'layer.bias: 0 1 -1.5 2 -0 3 0.25 -8' "$work/said" || fail "$decode says $(cat "$work/said")"
	[ "$(stat -c %s "$work/bias")" = 32 ] || fail "$decode wrote $(stat -c %s "$work/bias") bytes"
	if "$decode" "$bs" nothing 2>"$work/said"; then fail "$decode finds what is not there"; fi
	grep -q 'not_found' "$work/said" || fail "$decode says $(cat "$work/said")"
}

command -v "$cxx" >/dev/null || { echo "skipped: there is no C++ compiler"; exit 0; }
PREFIX="$work/first" scripts/install.sh install
use "$work/first" "$work/by-pkg-config"

readelf -d "$work/first/lib/libbigsmall.so" | grep -q "SONAME.*\[libbigsmall.so.$abi\]" || fail "another SONAME"
readelf -d "$work/by-pkg-config/decode" | grep -q "NEEDED.*\[libbigsmall.so.$abi\]" || fail "a program asks for another name"
others="$(nm -D --defined-only "$work/first/lib/libbigsmall.so" | awk '$3 !~ /^bs_/ { print $3 }')"
[ -z "$others" ] || fail "the shared library exports $others"
others="$(nm -g --defined-only "$work/first/lib/libbigsmall.a" | awk 'NF == 3 && $3 !~ /^bs_/ { print $3 }')"
[ -z "$others" ] || fail "the archive exports $others"
"$cc" -std=c99 "${strict[@]}" -I"$work/first/include" examples/c/decode.c "$work/first/lib/libbigsmall.a" -ldl -lpthread \
	-o "$work/by-pkg-config/decode_static"
run "$work/by-pkg-config" decode_static

mv "$work/first" "$work/moved"
use "$work/moved" "$work/moved-build"
if ! lacks cmake; then
	cmake -S examples/c -B "$work/by-cmake" -DCMAKE_PREFIX_PATH="$work/moved" >"$work/cmake.log" &&
		cmake --build "$work/by-cmake" >>"$work/cmake.log" || { cat "$work/cmake.log" >&2; exit 1; }
	run "$work/by-cmake"
	run "$work/by-cmake" decode_static
fi

if ! lacks valgrind; then
	# What is looked for is the program's own errors, and what it has lost.
	check() {
		LD_LIBRARY_PATH="$work/moved/lib" BIGSMALL_CPU=generic valgrind -q --error-exitcode=9 --leak-check=full \
			--show-leak-kinds=definite --errors-for-leak-kinds=definite --suppressions=scripts/go.supp "$@" \
			>"$work/said" 2>"$work/valgrind" || { head -40 "$work/valgrind" >&2; fail "valgrind: $*"; }
	}
	check "$work/moved-build/compress" "$work/model.bs" 100 50
	check "$work/moved-build/decode" "$work/model.bs"
	check "$work/moved-build/decode" "$work/model.bs" layer.weight "$work/weight"
	# And it does find them.
	echo '#include <stdlib.h>
#include <bigsmall.h>
int main(void) { volatile char *lost = malloc(9); lost[0] = (char)bs_workers(); lost = NULL; return 0; }' >"$work/lost.c"
	"$cc" -I"$work/moved/include" "$work/lost.c" -L"$work/moved/lib" -lbigsmall -o "$work/lost"
	if (check "$work/lost") 2>"$work/said"; then fail "valgrind does not see what is lost"; fi
fi

# With a root of its own, and a folder for libraries as Debian has it; what was installed is all that goes.
DESTDIR="$work/root" PREFIX=/usr LIBDIR=/usr/lib/x86_64-linux-gnu scripts/install.sh install
grep -q '^prefix=${pcfiledir}/../../..$' "$work/root/usr/lib/x86_64-linux-gnu/pkgconfig/bigsmall.pc" || fail "bigsmall.pc: $(cat "$work"/root/usr/lib/*/pkgconfig/bigsmall.pc)"
touch "$work/root/usr/lib/x86_64-linux-gnu/libother.so"
DESTDIR="$work/root" PREFIX=/usr LIBDIR=/usr/lib/x86_64-linux-gnu scripts/install.sh uninstall
left="$(find "$work/root" ! -type d -printf '%f\n')"
[ "$left" = libother.so ] || fail "after uninstall there is $left"
