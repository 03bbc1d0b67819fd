#!/usr/bin/env bash
# Builds the sdist, and from it the wheels of all platforms, on one Linux machine. zig (package ziglang) is the C compiler and
# linker, since it brings the C libraries of all of them.
#
#   scripts/build_wheels.sh OUT [PLATFORM...]      PYTHON: a Python with scripts/requirements-release.txt
set -euo pipefail
repository="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-python3}"
out="${1:?where to put the wheels}"
shift
platforms=("$@")
[ ${#platforms[@]} -gt 0 ] || platforms=(linux-x86_64 linux-aarch64 windows-x86_64 macos-arm64)

mkdir -p "$out"
out="$(cd "$out" && pwd)"
rm -f "$out"/bigsmall-*.whl "$out"/bigsmall-*.tar.gz
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

# What is in an archive has one date, so that two builds are equal: 2020-02-02 where none is given.
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-1580601600}"
export ZIG_GLOBAL_CACHE_DIR="${ZIG_GLOBAL_CACHE_DIR:-$repository/build/zig}"
unset CGO_CFLAGS CGO_LDFLAGS GOAMD64 GOARM64

# wheel PLATFORM_TAG GOOS GOARCH ZIG_TARGET [LINK_FLAGS]
wheel() {
	echo "building for $1"
	BIGSMALL_PLATFORM=$1 GOOS=$2 GOARCH=$3 BIGSMALL_LINK_FLAGS="${5:-}" CC="$python -m ziglang cc -target $4" \
		"$python" -m build --no-isolation --wheel --outdir "$out" "$scratch"/bigsmall-* >"$scratch/log" 2>&1 ||
		{ cat "$scratch/log" >&2; exit 1; }
}

"$python" -m build --no-isolation --sdist --outdir "$out" "$repository/python" >"$scratch/log" 2>&1 ||
	{ cat "$scratch/log" >&2; exit 1; }
tar -xzf "$out"/bigsmall-*.tar.gz -C "$scratch"

for platform in "${platforms[@]}"; do
	case $platform in
	linux-x86_64) wheel manylinux_2_17_x86_64 linux amd64 x86_64-linux-gnu.2.17 ;;
	linux-aarch64) wheel manylinux_2_17_aarch64 linux arm64 aarch64-linux-gnu.2.17 ;;
	windows-x86_64) wheel win_amd64 windows amd64 x86_64-windows-gnu ;;
	# Go 1.26 wants macOS 12. Its runtime names two system libraries whose descriptions only Apple's SDK has; it calls
	# nothing in them here, so empty ones will do.
	macos-arm64)
		wheel macosx_12_0_arm64 darwin arm64 aarch64-macos.12.0 \
			"-L$repository/scripts/macos -F$repository/scripts/macos"
		;;
	*)
		echo "unknown platform: $platform" >&2
		exit 2
		;;
	esac
done
