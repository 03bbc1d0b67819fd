#!/usr/bin/env bash
# Compiles kernel.cu to kernel.ptx by NVRTC, which needs no GPU. PYTHON is one that has the package nvidia-cuda-nvrtc of
# scripts/requirements-check.txt. --check compares instead.
set -euo pipefail
cd "$(dirname "$0")"
tmp=$(mktemp -d)
trap 'rm -r "$tmp"' EXIT
"${PYTHON:-python3}" compile.py kernel.cu "$tmp/kernel.ptx"
if [ "${1-}" = --check ]; then
	cmp "$tmp/kernel.ptx" kernel.ptx || { echo "make generate, and commit what it writes"; exit 1; }
else
	mv "$tmp/kernel.ptx" kernel.ptx
fi
