# Needs Python 3.10 or newer, a C and C++ compiler (torch.compile calls it) and make. Everything else is installed
# into .venv, at the versions of constraints/ci.txt.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OPERATORS = $(shell $(BIN)/python -c 'from iokernels.ops import CASES; print(*CASES)')
ROOMS := $(notdir $(patsubst %/,%,$(wildcard tests/ops/*/)))
CASES ?= 10000
SEED ?= $(shell date +%Y%m%d)

.PHONY: help setup demo quick test fuzz matrix inventory lint format type bench cubins dist clean
.DELETE_ON_ERROR:

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install into .venv; runs by itself, and again when pyproject.toml or constraints/ change

$(READY): pyproject.toml constraints/ci.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'iokernels needs Python 3.10 or newer: make PYTHON=/path/to/python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo '$(PYTHON) has no venv module (Debian, Ubuntu: apt install python3-venv)' >&2; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
		echo 'warning: no C++ compiler found; whatever uses torch.compile will fail' >&2
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints/ci.txt setuptools
	$(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints/ci.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## prove every operator on this machine, time each, train a small language model
	$(BIN)/iokernels check
	for case in $(OPERATORS); do $(BIN)/iokernels bench $$case --suite quick --seconds 0.2 || exit 1; done
	$(BIN)/python docs/examples/language_model.py --mixer flash --short

quick: export OMP_NUM_THREADS ?= 1
quick: $(READY) ## one point an option of one operator, every backend, in a minute: OP=flash_attention
	@$(if $(filter $(OP),$(ROOMS)),:,echo 'make quick OP=one of: $(ROOMS)' >&2; exit 1)
	$(BIN)/python -m pytest tests/ops/$(OP) --tier quick -q -n $(WORKERS) $(ARGS)

test: export OMP_NUM_THREADS ?= 1
test: $(READY) ## all tests; a hundred orders, more drawn calls: ARGS="--orders 100 --examples 10"
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

fuzz: export OMP_NUM_THREADS ?= 1
fuzz: export IOKERNELS_EMULATE_ORDERS ?= 1
fuzz: $(READY) ## drawn calls of every operator and backend against their formulas: CASES=10000 SEED=... WORKERS=2
	$(BIN)/python -m pytest tests/fuzz/test_fuzz.py -q -n $(WORKERS) --cases $(CASES) --seed $(SEED) $(ARGS)

matrix: ## the compile and integration tests at the ends of the declared versions; ARGS="--row torch-2.11"
	$(PYTHON) tests/matrix.py $(ARGS)

inventory: $(READY) ## what is proved and what kernels take; ARGS="--json FILE" keeps it, "--against FILE" compares
	$(BIN)/python tests/inventory.py $(ARGS)

lint: $(READY) ## style, without changing a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## style, repaired where that can be done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(READY) ## static types
	$(BIN)/basedpyright --pythonpath $(BIN)/python

bench: $(READY) ## time every operator against what else is installed
	for case in $(OPERATORS); do $(BIN)/iokernels bench $$case || exit 1; done

cubins: $(READY) ## compile every CUDA kernel for every architecture; the report is docs/guides/cubins.md
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/iokernels cubins --md docs/guides/cubins.md

dist: $(READY) ## wheel and sdist in dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean: ## remove all that make has made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
