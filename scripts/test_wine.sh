#!/usr/bin/env bash
# Runs tests/c/drive.c against the library of the Windows wheel, under Wine (Debian's package wine64).
#
#   scripts/test_wine.sh WHEEL      PYTHON: a Python with scripts/requirements-release.txt
set -euo pipefail
wheel="$(realpath "${1:?the Windows wheel}")"
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
wine="$(command -v wine64 || command -v wine || ls /usr/lib/wine/wine64 2>/dev/null || true)"
[ -n "$wine" ] || { echo "skipped: wine64 is missing"; exit 0; }
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
zig=("$python" -m ziglang)
target=(-target x86_64-windows-gnu)

unzip -q -j "$wheel" bigsmall/libbigsmall.dll -d "$folder"
{
	echo "LIBRARY libbigsmall.dll"
	echo EXPORTS
	sed -n 's/^BS_API .*\b\(bs_[a-z0-9_]*\)(.*/\1/p' include/bigsmall.h
} >"$folder/bigsmall.def"
"${zig[@]}" dlltool -m i386:x86-64 -d "$folder/bigsmall.def" -l "$folder/libbigsmall.a"
"${zig[@]}" cc "${target[@]}" -std=c99 -O1 -Iinclude tests/c/drive.c "$folder/libbigsmall.a" -o "$folder/drive.exe"
# Go takes random numbers from a library of Windows that Wine has since release 9 only.
cat >"$folder/random.c" <<'EOF'
#include <stddef.h>
unsigned char __stdcall SystemFunction036(void *buffer, unsigned long length);
__declspec(dllexport) int __stdcall ProcessPrng(unsigned char *buffer, size_t length) {
	return SystemFunction036(buffer, (unsigned long)length);
}
EOF
"${zig[@]}" cc "${target[@]}" -shared "$folder/random.c" -ladvapi32 -o "$folder/bcryptprimitives.dll"

export WINEPREFIX="$folder/prefix" WINEDEBUG=-all
"$wine" wineboot --init >/dev/null 2>&1
system="$WINEPREFIX/drive_c/windows/system32"
[ -e "$system/bcryptprimitives.dll" ] || cp "$folder/bcryptprimitives.dll" "$system"
mkdir "$folder/out"
cd "$folder"
"$wine" drive.exe out
echo "passed under $("$wine" --version)"
