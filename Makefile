# Every target sets up what it needs in $(VENV), from nothing; a second run starts at once.
# Needs python3 (3.10 or later, with venv), g++ and make.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# More arguments for installing torch, such as an --index-url of builds without CUDA.
TORCH_ARGS ?=
# Arguments of bench.op.
ARGS ?= --quick
# Arguments of tests/gpu_check.py.
GPU_ARGS ?=
# Test processes.
WORKERS ?= 2
# What check-wheel runs the wheel with: interpreters with torch 2.10 or later.
PYTHONS ?= $(PY)
# Arguments of tests/mutants, as in MUTANTS='--only NAME'.
MUTANTS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc -type f -not -path '*/__pycache__/*')
CXX_FILES = $(shell find csrc bench tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# One environment: installations must not run side by side.
.NOTPARALLEL:
.PHONY: help demo test test-full mutants check-wheel check-build gpu-check bench lint lint-ruff lint-format lint-cpp lint-types format clean

help:
	@echo 'make demo    the article, claim by claim; then training on real digits; curves in out/digits.png'
	@echo 'make test    every test, WORKERS=$(WORKERS) at a time, with some of the combinations of independent parameters'
	@echo 'make test-full  with all of them; CONV1X1_TEST_SEED=... repeats the inputs of a run'
	@echo 'make mutants  planted faults, one at a time, and the tests that must catch each; MUTANTS=--list lists them'
	@echo 'make check-wheel  builds a wheel and runs it with each of PYTHONS="$(PYTHONS)"'
	@echo 'make check-build  time and memory of every source that is compiled'
	@echo 'make gpu-check  on a machine with a GPU: build, tests, sanitizers, benchmark, with $(PYTHON) as it is'
	@echo 'make bench   ours against torch and its peers, layer by layer; ARGS="$(ARGS)"'
	@echo 'make lint    ruff, clang-format, mypy'
	@echo 'make format  ruff and clang-format, in place'
	@echo 'make clean   removes everything that was built but $(VENV)'
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH="$(TORCH)" TORCH_ARGS="$(TORCH_ARGS)"'

demo: $(VENV)/.stamp-examples
	$(PY) examples/article.py
	$(PY) examples/digits.py

# worksteal: a worker that is done takes tests from one that is not, so that none is left alone with the slow ones.
PYTEST = $(PY) -m pytest -n $(WORKERS) --dist worksteal tests

test: $(VENV)/.stamp-test
	$(PYTEST)

# Every combination of parameters, in place of tests/covering.py's choice.
test-full: $(VENV)/.stamp-test
	CONV1X1_TEST_FULL=1 $(PYTEST)

check-wheel: $(VENV)/.stamp-test
	rm -rf build/wheel
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(PY) -m zipfile -e build/wheel/*.whl build/wheel/content
	$(PY) tests/check_torch_versions.py --package build/wheel/content $(PYTHONS)

check-build: $(VENV)/.stamp-torch
	$(PY) tests/check_build.py

mutants: $(VENV)/.stamp-test
	$(PY) tests/mutants --jobs $(WORKERS) $(MUTANTS)

# With the torch (with CUDA) of $(PYTHON) itself: it installs nothing. GPU_ARGS=--help tells what else there is.
gpu-check:
	$(PYTHON) tests/gpu_check.py $(GPU_ARGS)

bench: $(VENV)/.stamp-bench
	$(PY) -m bench.op $(ARGS)

# make -k lint reports everything that fails.
lint: lint-ruff lint-format lint-cpp lint-types

lint-ruff: $(VENV)/.stamp-lint
	$(PY) -m ruff check .

lint-format: $(VENV)/.stamp-lint
	$(PY) -m ruff format --check .

lint-cpp: $(VENV)/.stamp-lint
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

lint-types: $(VENV)/.stamp-lint
	$(PY) -m mypy

format: $(VENV)/.stamp-lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist out *.egg-info conv1x1_ext/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.*' -prune -exec rm -rf {} +
	rm -f $(VENV)/.stamp-build

# torch comes alone and first: the library is built against it, and nothing that follows may choose another.
$(VENV)/.stamp-torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH_ARGS) '$(TORCH)'
	$(PIP) install 'setuptools>=77' wheel ninja
	touch $@

$(VENV)/.stamp-build: $(VENV)/.stamp-torch $(SOURCES)
	$(PIP) install --no-build-isolation -e .
	touch $@

# What pyproject.toml's extra of that name asks for; the package itself is there already.
$(VENV)/.stamp-examples $(VENV)/.stamp-test $(VENV)/.stamp-bench $(VENV)/.stamp-lint: $(VENV)/.stamp-%: $(VENV)/.stamp-build
	$(PIP) install 'conv1x1_ext[$*]'
	touch $@
