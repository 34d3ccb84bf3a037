# `make demo` and `make test` do everything from a bare checkout: make .venv, install, run. `make` lists all targets.

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for each in python3.11 python3; do $$each -c '$(NEW_ENOUGH)' 2>&- && echo $$each && break; done)
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/installed
LOWEST := .venv-lowest
RELEASE := .venv-release
DEEPSPEED := .deepspeed
PIP := -m pip -qq --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
OLD_WARNINGS := -W ignore::DeprecationWarning -W "ignore:TypedStorage is deprecated:UserWarning"
LOWER_BOUNDS := import importlib.metadata as m, re; print(*("==".join(bound) for bound in \
	re.findall(r"(?m)^([\w-]+)[^>;]*>=([\d.]+)", "\n".join(m.requires("lightning-regularize")))), sep="\n")

.DEFAULT_GOAL := help
.PHONY: help demo demo-all examples docs test test-lowest test-deepspeed test-gpu mutants check dist bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(INSTALLED) ## train on digits with wrong labels, with and without regularization; ARGS="--help" for more
	$(BIN)/python examples/label_noise.py $(ARGS)

demo-all: $(INSTALLED) ## the same with proximal L1, max-norm, a Frobenius ball, CPR and dropout as well
	$(BIN)/python examples/label_noise.py --all $(ARGS)

examples: $(INSTALLED) ## run all examples, and print what each claims and whether it holds; ARGS="--fast grokking"
	$(BIN)/python examples $(ARGS)

docs: $(INSTALLED) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: $(INSTALLED) ## run the tests; ARGS="tests/test_norms.py -k scaler" for some of them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet -n $(WORKERS) --dist worksteal $(ARGS)

test-lowest: $(LOWEST)/installed ## run the tests on the oldest versions that pyproject.toml allows; downloads several GB
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest --quiet -n $(WORKERS) --dist worksteal $(OLD_WARNINGS) $(ARGS)

test-deepspeed: $(INSTALLED) ## run the tests of DeepSpeed's stages on the CPU; it compiles an op once, which takes minutes
	test -d $(DEEPSPEED)/deepspeed || DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python $(PIP) install \
		--no-build-isolation --no-deps --target $(DEEPSPEED) deepspeed==0.19.8 einops hjson msgpack ninja psutil py-cpuinfo
	rm -f $(DEEPSPEED)/extensions/*/lock # a build that was killed leaves one, on which later ones wait for ever
	TORCH_EXTENSIONS_DIR=$(CURDIR)/$(DEEPSPEED)/extensions PATH=$(CURDIR)/$(DEEPSPEED)/bin:$$PATH \
		PYTHONPATH=$(DEEPSPEED) DS_ACCELERATOR=cpu DS_BUILD_OPS=0 \
		$(BIN)/python -m pytest --quiet tests/training/test_deepspeed.py $(ARGS)

test-gpu: $(INSTALLED) ## run the tests that need CUDA
	$(BIN)/python -m pytest --quiet -m gpu tests/gpu $(ARGS)

mutants: $(INSTALLED) ## does a test fail for each mistake of tests/mutants? ARGS="norms decay" for those files alone
	$(BIN)/python -m tests.mutants $(ARGS)

check: $(INSTALLED) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist: $(INSTALLED) $(RELEASE)/installed ## build sdist and wheel, and try both where nothing else is installed
	rm -rf dist build
	$(RELEASE)/bin/python -m build # the wheel is made of the sdist
	$(RELEASE)/bin/twine check --strict dist/*
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/python $(PIP) install "$(TORCH)"
	build/fresh/bin/python $(PIP) install --constraint constraints.txt dist/*.whl
	build/fresh/bin/python -I tests/installed.py
	build/fresh/bin/python $(PIP) install --force-reinstall --no-deps dist/*.tar.gz
	build/fresh/bin/python -I tests/installed.py
	build/fresh/bin/python $(PIP) install --constraint constraints.txt pytorch-lightning
	build/fresh/bin/python -I tests/installed.py pytorch_lightning
	build/fresh/bin/python $(PIP) uninstall --yes lightning
	build/fresh/bin/python -I tests/installed.py pytorch_lightning
	folder=$$(mktemp -d) && trap "rm -rf $$folder" EXIT && tar xzf dist/*.tar.gz --strip-components 1 -C $$folder && \
		cd $$folder && export PYTHONPATH=$$folder OMP_NUM_THREADS=1 && \
		$(CURDIR)/$(BIN)/python -m pytest -qq --collect-only && \
		$(CURDIR)/$(BIN)/python -m pytest --quiet -n $(WORKERS) --dist worksteal tests/test_*.py

bench: $(INSTALLED) ## what each callback costs a step
	for script in benchmarks/*.py; do echo "$$script" && $(BIN)/python "$$script" || exit 1; done
	$(BIN)/python -m tests.rehearsal # launches on a GPU that is not there

clean: ## remove the environment, and all that was built or run
	rm -rf .venv $(LOWEST) $(RELEASE) $(DEEPSPEED) runs dist build site .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that no other requirement can bring a newer one with several GB of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt lightning_regularize/__init__.py # which has the version
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing into .venv with $$($(PYTHON) --version); this takes a minute or two."
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) install "$(TORCH)"
	$(BIN)/python $(PIP) install --constraint constraints.txt --editable ".[dev]"
	@touch $@

# The versions are read off the package's metadata, where they come from pyproject.toml. Old packages use what their newer
# neighbors deprecate, and torch 2.10 its own TypedStorage, so that OLD_WARNINGS are no errors here. For Linux on x86_64
# the index has of a torch this old the build for CUDA only: 3 GB to download and 6 GB on disk, put up with here alone.
$(LOWEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python $(PIP) install --no-deps --editable .
	$(LOWEST)/bin/python -c '$(LOWER_BOUNDS)' > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python $(PIP) install --constraint $(LOWEST)/constraints.txt --editable ".[dev]"
	@touch $@

$(RELEASE)/installed: constraints.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python $(PIP) install --constraint constraints.txt build twine
	@touch $@
