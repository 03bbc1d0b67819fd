#!/usr/bin/env bash
# Installs the C library, its header and what pkg-config and CMake look for; or takes away what it installed.
#
#   scripts/install.sh install|uninstall      PREFIX (/usr/local), LIBDIR (PREFIX/lib), DESTDIR (nothing), CC
#
# The names are those of Linux: libbigsmall.so -> libbigsmall.so.ABI -> libbigsmall.so.VERSION.
set -euo pipefail
action="${1:?install or uninstall}"
prefix="${PREFIX:-/usr/local}"
libdir="${LIBDIR:-$prefix/lib}"
destdir="${DESTDIR:-}"
for folder in "$prefix" "$libdir"; do
	[[ $folder = /* ]] || { echo "$folder is no absolute path" >&2; exit 2; }
done
cd "$(dirname "$0")/.."
version="$(sed -n 's/^const Version = "\(.*\)"$/\1/p' core/version.go)"
abi="$(sed -n 's/^#define BS_ABI_VERSION //p' include/bigsmall.h)"
soname="libbigsmall.so.$abi"
shared="libbigsmall.so.$version"
cmake="$libdir/cmake/bigsmall"

if [ "$action" = uninstall ]; then
	rm -f "$destdir$prefix/include/bigsmall.h" "$destdir$libdir"/{libbigsmall.so,"$soname","$shared",libbigsmall.a} \
		"$destdir$libdir/pkgconfig/bigsmall.pc" "$destdir$cmake"/bigsmall-config{,-version}.cmake
	rmdir "$destdir$cmake" 2>/dev/null || true
	exit 0
fi
[ "$action" = install ] || { echo "$action: install or uninstall" >&2; exit 2; }

# What pkg-config and CMake are told is relative to where they find it, so that the tree can be moved.
if [[ $libdir/ = "$prefix"/* ]]; then
	below="${libdir#"$prefix"}"
	up="$(sed 's|/[^/]*|/..|g' <<<"$below")" # from libdir to prefix
	pc_prefix="\${pcfiledir}/..$up" pc_libdir="\${prefix}$below" cmake_include="../..$up/include"
else
	pc_prefix="$prefix" pc_libdir="$libdir" cmake_include="$prefix/include"
fi
fill() {
	sed -e "s|@VERSION@|$version|; s|@SHARED@|$shared|; s|@SONAME@|$soname|; s|@PREFIX@|$pc_prefix|; s|@LIBDIR@|$pc_libdir|" \
		-e "s|@INCLUDEDIR@|$2|" "capi/$1.in"
}

build="$(mktemp -d)"
trap 'rm -rf "$build"' EXIT
export CGO_ENABLED=1 GOTOOLCHAIN=local CGO_CFLAGS="${CGO_CFLAGS:--O2 -g -fvisibility=hidden}"
go build -buildmode=c-shared -trimpath -o "$build/$shared" \
	-ldflags "-s -w -extldflags '\"-Wl,--version-script=$PWD/capi/exports.map\" -Wl,-soname,$soname'" ./capi
# One object with no global names but bs_*, so that a program may hold another library written in Go, or names like ours.
go build -buildmode=c-archive -trimpath -ldflags "-s -w" -o "$build/archive.a" ./capi
"${LD:-ld}" -r -d --whole-archive "$build/archive.a" -o "$build/bigsmall.o"
"${OBJCOPY:-objcopy}" --wildcard --keep-global-symbol='bs_*' --strip-debug "$build/bigsmall.o"
"${AR:-ar}" rcsD "$build/libbigsmall.a" "$build/bigsmall.o"

install -d "$destdir$prefix/include" "$destdir$libdir/pkgconfig" "$destdir$cmake"
install -m 644 include/bigsmall.h "$destdir$prefix/include"
install -m 755 "$build/$shared" "$destdir$libdir"
ln -sf "$shared" "$destdir$libdir/$soname"
ln -sf "$soname" "$destdir$libdir/libbigsmall.so"
install -m 644 "$build/libbigsmall.a" "$destdir$libdir"
fill bigsmall.pc "\${prefix}/include" >"$destdir$libdir/pkgconfig/bigsmall.pc"
fill bigsmall-config.cmake "$cmake_include" >"$destdir$cmake/bigsmall-config.cmake"
fill bigsmall-config-version.cmake "" >"$destdir$cmake/bigsmall-config-version.cmake"
