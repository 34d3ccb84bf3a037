# `make demo` and `make test` do everything from a bare checkout: make .venv, install, run. `make` lists all targets.

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for each in python3.11 python3; do $$each -c '$(NEW_ENOUGH)' 2>&- && echo $$each && break; done)
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/installed
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(INSTALLED) ## train on digits with wrong labels, with and without regularization; ARGS="--help" for more
	$(BIN)/python examples/label_noise.py $(ARGS)

test: $(INSTALLED) ## run the tests; ARGS="tests/test_norms.py -k scaler" for some of them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet -n $(WORKERS) --dist worksteal $(ARGS)

check: $(INSTALLED) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED) ## what each callback costs a step
	for script in benchmarks/*.py; do echo "$$script" && $(BIN)/python "$$script" || exit 1; done

clean: ## remove the environment, and all that was built or run
	rm -rf .venv runs dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that no other requirement can bring a newer one with several GB of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing into .venv with $$($(PYTHON) --version); this takes a minute or two."
	$(PYTHON) -m venv .venv
	$(PIP) install "$(TORCH)"
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
	@touch $@
