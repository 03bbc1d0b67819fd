#!/usr/bin/env bash
# Builds the library and a C program that drives it with the address sanitizer, and runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
cc=${CC:-cc}
flags=(-std=c99 -Wall -Wextra -Werror -pedantic -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Iinclude)
mkdir -p build/asan
if ! echo 'int main(void) { return 0; }' | "$cc" "${flags[@]}" -x c - -o build/asan/probe 2> build/asan/probe.txt; then
	echo "skipped: $cc has no address sanitizer: $(tail -n 1 build/asan/probe.txt)"
	exit 0
fi
CGO_ENABLED=1 go build -asan -buildmode=c-shared -trimpath -ldflags "-extldflags '-Wl,--version-script=$PWD/capi/exports.map'" \
	-o build/asan/libbigsmall.so ./capi
"$cc" "${flags[@]}" tests/c/drive.c -o build/asan/drive -Lbuild/asan -lbigsmall -Wl,-rpath,'$ORIGIN'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
build/asan/drive "$folder"
