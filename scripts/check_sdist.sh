#!/usr/bin/env bash
# Builds the sdist, from it a wheel for this machine, and checks both. What they carry is what is released.
#   PYTHON: a Python with scripts/requirements-check.txt
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" scripts/third_party_licenses.py --check
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
# The modules are in it: no proxy is asked for any.
"$python" -m build --no-isolation --sdist --outdir "$out" python >"$out/log" 2>&1 || { cat "$out/log" >&2; exit 1; }
tar -xzf "$out"/bigsmall-*.tar.gz -C "$out"
GOPROXY=off GOMODCACHE="$out/modules" "$python" -m build --no-isolation --wheel --outdir "$out" "$out"/bigsmall-*/ \
	>"$out/log" 2>&1 || { cat "$out/log" >&2; exit 1; }
"$python" scripts/check_wheels.py "$out"/bigsmall-*.tar.gz "$out"/bigsmall-*.whl
