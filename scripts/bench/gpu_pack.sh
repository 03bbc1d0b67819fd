#!/usr/bin/env bash
# Makes a folder that runs gpu.py and the GPU tests on a machine with CUDA, torch, transformers and cupy but without this
# project's tools or a network: gpu_pack.sh FOLDER [PYTHON_VERSION]. Needs `make build/venv-test/.bigsmall` and the weights of minilm.
#
#   PYTHONPATH=FOLDER/site python3 FOLDER/bench/gpu.py --models FOLDER/models
#   PYTHONPATH=FOLDER/site python3 -m pytest FOLDER/tests
set -euo pipefail
out=$(realpath -m "$1")
version=${2:-3.12}
cd "$(dirname "$0")/../.."
python=build/venv-test/bin/python
rm -rf "$out"
mkdir -p "$out"/{site,models,tests,bench}
package=$($python -c 'import bigsmall, os; print(os.path.dirname(bigsmall.__file__))')
cp -r "$package" "$out/site/"
cp -r "$($python -c 'import importlib.metadata as m; print(m.distribution("bigsmall")._path)')" "$out/site/"
find "$out" -name __pycache__ -prune -exec rm -r {} +
$python -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
	--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 -d "$out/wheels" cffi pycparser
$python -m pip download -q --no-deps -d "$out/wheels" dfloat11 dahuffman
for wheel in "$out"/wheels/*.whl; do $python -m zipfile -e "$wheel" "$out/site"; done
rm -r "$out/wheels"
cp scripts/bench/{gpu,dfloat11_package}.py "$out/bench/"
cp tests/py/test_gpu.py "$out/tests/"
for model in build/weights/minilm-l6-v2-bf16; do
	$python -m bigsmall --quiet compress "$model"/*.safetensors -o "$out/models/$(basename "$model").bs"
done
du -sh "$out"
