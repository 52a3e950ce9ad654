# Every target creates its virtual environment once and reuses it until pyproject.toml or the Python
# version changes. `make test PYTHON=python3.12 VENV=.venv312` keeps a second one.

PYTHON ?= python3
VENV ?= .venv
FIXTURE := tests/data/shakespeare-neox

# Suppress notices about newer releases of pip and pyright.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

BIN := $(VENV)/bin
# The Python version is part of the stamps' names, so another Python rebuilds everything.
STAMP := $(VENV)/.stamp-$(shell $(PYTHON) -c 'import platform; print(platform.python_version())')

.DEFAULT_GOAL := help
.PHONY: help demo test lint parity fuzz tpu tpu-all bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 14

demo: $(STAMP)-core  ## load a small GPT-NeoX onto eight virtual devices and generate text
	$(BIN)/mtj-loader load $(FIXTURE) --mesh mp=8 --cpu-devices 8
	$(BIN)/mtj-loader generate $(FIXTURE) --mesh mp=8 --cpu-devices 8 --prompt "ROMEO." \
	  --max-new-tokens 120 --temperature 0.8 --top-k 40 --seed 1

test: $(STAMP)-test  ## run the tests that need no torch
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not parity and not tpu"

lint: $(STAMP)-lint  ## check style, types and import layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

parity: $(STAMP)-parity  ## compare logits and text with Hugging Face transformers
	$(BIN)/python -m pytest -n auto --dist loadfile -m parity

fuzz: $(STAMP)-parity  ## load thousands of malformed inputs
	$(BIN)/python -m tests.fuzz

tpu: $(STAMP)-tpu,test  ## compile every family for TPUs with libtpu; needs no TPU
	$(BIN)/python -m pytest -n 2 --dist worksteal -m tpu tests/tpu

tpu-all: $(STAMP)-tpu,test  ## the same for every family on every slice; takes an hour
	MTJ_TPU_ALL=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m tpu -v tests/tpu

bench: $(STAMP)-bench  ## measure load time against other loaders
	$(BIN)/python -m benchmarks.load

clean:  ## remove the virtual environment, caches and build products
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find mtj_loader tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(STAMP)-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

# `core` is the package without extras; any other name is an extra of pyproject.toml.
$(STAMP)-core $(STAMP)-test $(STAMP)-lint $(STAMP)-parity $(STAMP)-bench $(STAMP)-tpu,test: $(STAMP)-%: pyproject.toml | $(STAMP)-venv
	$(BIN)/python -m pip install --quiet --editable ".$(patsubst %,[%],$(filter-out core,$*))"
	touch $@
