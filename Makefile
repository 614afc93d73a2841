# From a bare machine with python3 and g++: `make demo`, `make test`. Targets that are up to date are not rebuilt.
PYTHON ?= python3
VENV   ?= .venv

export PATH := $(abspath $(VENV))/bin:$(PATH)
export CMAKE_GENERATOR ?= Ninja
# Else each process of the tests compiles the package and them anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup build test test-fast test-zoo demo bench bench-full bench-gpu docs lint wheels clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12
	@echo
	@echo 'TEST_ARGS, DEMO_ARGS, BENCH_ARGS and WHEEL_ARGS are passed through: make demo DEMO_ARGS="--subset 2000 --out runs/small"'

setup: $(VENV)/.done  ## .venv with the pinned development environment
$(VENV)/.done: pyproject.toml requirements-dev.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	COARSEGRAD_NATIVE=0 $(VENV)/bin/pip install -r requirements-dev.txt
	touch $@

# Built into the working copy, where .venv's editable install finds it.
build: setup  ## the native library and the C++ tests
	cmake -S . -B build -DPython_EXECUTABLE=$(abspath $(VENV))/bin/python -DCOARSEGRAD_CUDA=$(or $(COARSEGRAD_CUDA),auto)
	cmake --build build
	cmake --install build --prefix python

test: build  ## all tests, C++ and Python
	ctest --test-dir build --output-on-failure -j $$(nproc)
	python -m pytest -n auto $(TEST_ARGS)

test-fast: build  ## the tests to run after each change: one backend for each property
	python -m pytest --fast -n auto $(TEST_ARGS)

test-zoo: build  ## converts every architecture of transformers that can be built small; takes minutes
	python -m pytest tests/quantization/test_zoo.py -m "slow or not slow" -n auto $(TEST_ARGS)

demo: build  ## trains LeNet-5 on MNIST, float and then with 2-bit activations, and converts it to integers
	python -m coarsegrad mnist --bits 2 --convert $(DEMO_ARGS)

bench: build  ## times kernels and peers on this machine in a few minutes; into build/bench
	python -m bench.kernels --quick --out build/bench/kernels.csv $(BENCH_ARGS)
	python -m bench.peers --quick --out build/bench/peers.csv $(BENCH_ARGS)
	python -m bench.report --results build/bench --page build/bench/benchmarks.md

bench-full: build  ## all benchmarks, docs/benchmarks.md and its figures; needs a quiet machine; peers if installed
	python -m bench.kernels
	python -m bench.threads
	python -m bench.peers
	python -m bench.training
	python -m bench.memory
	python -m bench.inference
	python -m bench.layers
	python -m bench.report

bench-gpu: build  ## the benchmarks on a GPU and docs/benchmarks-cuda.md; brevitas and torchao if installed
	python -m bench.kernels --device cuda
	python -m bench.peers --device cuda
	python -m bench.memory --device cuda
	python -m bench.mlp --device cuda
	python -m bench.report

docs: setup  ## the documentation site in build/docs; warnings and broken links are errors
	python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet -b html docs build/docs

lint: setup  ## ruff and clang-format: rules and format; mypy: types
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $$(find csrc tests/cpp -type f)
	mypy

wheels: setup  ## dist: the sdist, a wheel for every platform, and manylinux ones for the pinned torch and each Python
	python -m tools.wheels $(WHEEL_ARGS)

clean:  ## removes .venv and build outputs
	rm -rf build dist $(VENV) python/coarsegrad.egg-info python/coarsegrad/_C.* python/coarsegrad/_build.py
