# From a fresh clone, with Python 3.11 or later, a C++20 compiler and git: `make test`, `make train`.
# Both make what they need: .venv, with Kénotron installed in it to be edited in place, and the C++ engine built.

PYTHON ?= python3
# Handed to the script that `make train` or `make bench` runs: make train ARGS="--steps 30"
ARGS ?=
# For `make test-native`: "thread" finds races, which the two together do not.
SANITIZE ?= address,undefined

VENV := .venv
PY := $(VENV)/bin/python
REQUIREMENTS := $(VENV)/.requirements
INSTALLED := $(VENV)/.installed
ENGINE_SOURCES := callbacks_native/CMakeLists.txt $(wildcard callbacks_native/src/*)

.DEFAULT_GOAL := help
.PHONY: help install train test test-all conformance test-native lint format bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv and build the C++ engine (the targets below do so by themselves)

train: $(INSTALLED) ## Train a small model on the standard library's source (ARGS="--steps 30")
	$(PY) examples/pretrain_stdlib.py $(ARGS)

test: $(INSTALLED) ## Run the tests, without the slow ones
	$(PY) -m pytest tests -m "not slow"

test-all: $(INSTALLED) ## Run all tests
	$(PY) -m pytest tests

conformance: $(INSTALLED) ## Run Lightning's own tests with Kénotron (LIGHTNING=<checkout> ARGS=<words in their ids>)
	$(PY) tests/conformance/compare.py $(LIGHTNING) $(ARGS)

test-native: $(INSTALLED) ## Run the C++ tests under ASan and UBSan (SANITIZE=thread for TSan)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" && \
	cmake -S callbacks_native -B build/native -DKENOTRON_TESTS=ON -DKENOTRON_SANITIZE=$(SANITIZE) && \
	cmake --build build/native --parallel $$(getconf _NPROCESSORS_ONLN) && \
	ctest --test-dir build/native --output-on-failure

lint: $(INSTALLED) ## Check style (ruff) and types (mypy)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(INSTALLED) ## Mend style: what ruff can fix by itself
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(INSTALLED) ## Run every script in bench/
	@for script in bench/*.py; do echo "== $$script"; $(PY) "$$script" $(ARGS) || exit 1; done

clean: ## Delete what was built, .venv included
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Built without pip's isolation, in .venv itself: isolated, every build would unpack its tools anew into another folder
# and CMake, seeing other paths, would compile everything again. Thus the tools are installed first. The last of them is
# scikit-build-core's own answer to "what else": cmake and ninja, where PATH has none that will do.
$(REQUIREMENTS): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet -c constraints.txt scikit-build-core nanobind
	$(PY) -m pip install --quiet -c constraints.txt nanobind \
	  $$($(PY) -c 'from scikit_build_core.build import get_requires_for_build_editable as needs; print(*needs())')
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[test,dev]'
	@touch $@

# Again for the engine alone, which compiles what has changed since: the first time nothing, later in seconds.
$(INSTALLED): $(REQUIREMENTS) $(ENGINE_SOURCES)
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Kénotron needs Python 3.11 or later, and $(PYTHON) is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another, for instance: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2
	$(PYTHON) -m venv $(VENV)
