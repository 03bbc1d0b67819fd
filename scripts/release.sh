#!/usr/bin/env bash
# Everything that a release publishes, in OUT: wheels, sdist, licences, checksums. Each is built twice and must come out the same.
#
#   scripts/release.sh OUT      PYTHON: a Python with scripts/requirements-release.txt
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:?where to put it}"
version="$(sed -n 's/^const Version = "\(.*\)"$/\1/p' core/version.go)"
grep -q "^## $version\b" CHANGELOG.md || { echo "CHANGELOG.md has no section for $version" >&2; exit 1; }

rm -rf "$out"
scripts/build_wheels.sh "$out"
cp THIRD_PARTY_LICENSES LICENSE include/bigsmall.h "$out"
again="$(mktemp -d)"
trap 'rm -rf "$again"' EXIT
# From a copy elsewhere, with nothing that Go kept of the first time.
mkdir "$again/sources"
git ls-files | tar -cf - -T - | tar -xf - -C "$again/sources"
GOCACHE="$again/cache" ZIG_GLOBAL_CACHE_DIR="$PWD/build/zig" "$again/sources/scripts/build_wheels.sh" "$again/out"
for file in "$again"/out/*; do
	cmp "$file" "$out/$(basename "$file")"
done
echo "built twice: the same bytes"
"${PYTHON:-python3}" scripts/check_wheels.py "$out"/*.whl "$out"/*.tar.gz
(cd "$out" && sha256sum -- * >SHA256SUMS)
ls -l "$out"
