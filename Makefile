# `make demo` and `make test` do everything from a bare checkout: make .venv, install, run. `make` lists all targets.

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for each in python3.11 python3; do $$each -c '$(NEW_ENOUGH)' 2>&- && echo $$each && break; done)
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/installed
DEEPSPEED := .deepspeed
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo demo-all test test-deepspeed test-gpu check bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(INSTALLED) ## train on digits with wrong labels, with and without regularization; ARGS="--help" for more
	$(BIN)/python examples/label_noise.py $(ARGS)

demo-all: $(INSTALLED) ## the same with proximal L1, max-norm, a Frobenius ball, CPR and dropout as well
	$(BIN)/python examples/label_noise.py --all $(ARGS)

test: $(INSTALLED) ## run the tests; ARGS="tests/test_norms.py -k scaler" for some of them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet -n $(WORKERS) --dist worksteal $(ARGS)

test-deepspeed: $(INSTALLED) ## run the tests of DeepSpeed's stages on the CPU; it compiles an op once, which takes minutes
	test -d $(DEEPSPEED)/deepspeed || DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) install --no-build-isolation --no-deps \
		--target $(DEEPSPEED) deepspeed==0.19.8 einops hjson msgpack ninja psutil py-cpuinfo
	rm -f $(DEEPSPEED)/extensions/*/lock # a build that was killed leaves one, on which later ones wait for ever
	TORCH_EXTENSIONS_DIR=$(CURDIR)/$(DEEPSPEED)/extensions PATH=$(CURDIR)/$(DEEPSPEED)/bin:$$PATH \
		PYTHONPATH=$(DEEPSPEED) DS_ACCELERATOR=cpu DS_BUILD_OPS=0 \
		$(BIN)/python -m pytest --quiet tests/training/test_deepspeed.py $(ARGS)

test-gpu: $(INSTALLED) ## run the tests that need CUDA
	$(BIN)/python -m pytest --quiet -m gpu tests/gpu $(ARGS)

check: $(INSTALLED) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED) ## what each callback costs a step
	for script in benchmarks/*.py; do echo "$$script" && $(BIN)/python "$$script" || exit 1; done

clean: ## remove the environment, and all that was built or run
	rm -rf .venv .deepspeed runs dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that no other requirement can bring a newer one with several GB of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing into .venv with $$($(PYTHON) --version); this takes a minute or two."
	$(PYTHON) -m venv .venv
	$(PIP) install "$(TORCH)"
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
	@touch $@
