# make bench      build, then the quick benchmarks beside PyTorch: a table, figures and JSON in build/bench
# make test       build, then the tests
# make lint       formatting, lint and types of every file;  make format  writes what it can
# make sanitize   the native tests and the contract on a build with address and undefined-behaviour checks
# make gpu-check  offline, with the torch that PYTHON has: verify and time every GPU backend
# make clean      forget .venv and every build
#
# Each sets up what it needs, .venv included, and does again only what has changed.
# PYTHON=python3.12 picks the interpreter; CMAKE_ARGS and CMAKE_BUILD_PARALLEL_LEVEL reach CMake.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CXX_FILES = $(wildcard $(foreach end,h cc cuh cu,csrc/*/*.$(end) kernels/*/*.$(end) tests/*.$(end)))

.PHONY: build bench test lint format sanitize gpu-check clean

build: build/cmake/installed
	@cmake --build build/cmake -- --quiet

bench: build
	$(BIN)/fastattn bench --quick --plot build/bench --json build/bench/results.jsonl

test: build
	$(BIN)/python -m pytest

lint: .venv/requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: .venv/requirements
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# ---- The environment: three steps, each with a stamp -------------------------------------------------

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'fastattn needs Python 3.10 or later; pass one with PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo '$(PYTHON) cannot create environments: install its venv package (python3-venv on Debian)'; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

# torch first, and alone: from a wheel that pip is configured to find on disk; else, where no GPU is, from
# PyTorch's index of CPU wheels if that answers (they are a tenth of the size); else from PyPI.
TORCH = $(shell grep '^torch==' requirements.txt)
CPU_WHEELS := https://download.pytorch.org/whl/cpu
ASK = import signal, urllib.request; signal.alarm(10); \
  urllib.request.urlopen("$(CPU_WHEELS)/torch/", timeout=5); print("--extra-index-url $(CPU_WHEELS)")

.venv/requirements: requirements.txt | .venv/created
	$(BIN)/pip install --quiet --no-index --no-deps '$(TORCH)' 2>/dev/null || $(BIN)/pip install '$(TORCH)' \
	  $$(command -v nvidia-smi >/dev/null || $(PYTHON) -c '$(ASK)' 2>/dev/null)
	$(BIN)/pip install --quiet -r requirements.txt
	@touch $@

build/cmake/installed: .venv/requirements pyproject.toml setup.py
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

# ---- Builds beside the installed one -----------------------------------------------------------------

# Sanitizers must be loaded before Python; libstdc++ too, or they do not see exceptions.
SANITIZE = $(foreach lib,libasan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(lib)))

sanitize: .venv/requirements
	CMAKE_ARGS='$(CMAKE_ARGS) -DFASTATTN_SANITIZE=ON' \
	  $(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/site
	PYTHONPATH=$(CURDIR)/build/sanitize/site LD_PRELOAD='$(SANITIZE)' ASAN_OPTIONS=detect_leaks=0 \
	  sh -ec '$(BIN)/pytest -q tests/test_native.py; $(BIN)/pytest -q tests/test_contract.py --backend cpu \
	    -k "not -float16- and not avx512-"'

# The environment is left alone: the package is built beside it, from what is there, and run from there.
gpu-check: export PYTHONPATH := $(CURDIR)/build/gpu/site
gpu-check:
	$(PYTHON) setup.py --quiet build --build-base build/gpu --build-lib build/gpu/site
	cd build/gpu && $(PYTHON) -m fastattn verify --device cuda --json results.jsonl
	cd build/gpu && $(PYTHON) -m fastattn bench --device cuda --quick --peers --json results.jsonl

clean:
	rm -rf .venv build *.egg-info fastattn/_c*.so
