# `make run` and `make test` do all their set-up themselves; a second call reuses it.

PYTHON ?= python3
RECIPE ?=
ARGS ?=
TRL_PYTHON ?=

# The torch to install: the pin in requirements.txt, or the one chosen earlier with TORCH=... (`make clean` forgets it).
TORCH ?= $(shell cat .venv/chosen-torch 2>/dev/null || grep '^torch==' requirements.txt)
TORCH := $(TORCH)

# The stamps are named after what was installed and where, so any change of these files or of TORCH is a new set-up.
RUN_STAMP := .venv/run-$(shell { pwd; echo '$(TORCH)'; cat requirements.txt; } | sha256sum | cut -c1-16)
TEST_STAMP := $(RUN_STAMP)-test-$(shell sha256sum < requirements-dev.txt | cut -c1-16)

# TRL is measured in an environment of its own, whose other versions are those of requirements.txt.
TRL := $(shell grep -om1 'trl==[0-9.]*[0-9]' benchmarks/README.md)
TRL_STAMP := .venv-trl/$(TRL)-$(notdir $(RUN_STAMP))

# After SIGTERM torch's launcher kills its ranks so many seconds later; a step and a save may take longer than its 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT ?= 300
export PATH := $(CURDIR)/.venv/bin:$(PATH)
PIP_INSTALL := .venv/bin/python -m pip install -q --disable-pip-version-check
TRL_PIP_INSTALL := $(PIP_INSTALL:.venv/%=.venv-trl/%)

# Two tests at a time: a launch is mostly imports on one core, and many tests wait. One by one those of a cluster, and
# those that take memory away from a rank: it would find what other tests have left in the process.
PYTEST := python -m pytest -q -n 2 --dist worksteal
ALONE := tests/test_worst_case.py

.PHONY: help run test test-fast lint bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

run: $(RUN_STAMP)  ## train: make run RECIPE=configs/recipes/NAME.yaml ARGS="train.max_steps=20"; with neither, a tiny model
	accelerate launch --config_file configs/accelerate/zero3.yaml train.py $(RECIPE) $(ARGS)

test: test-fast  ## every check: lint, the fast tests, then the slow ones
	@tests/slurm/install.sh
	$(PYTEST) -m slow --ignore tests/slurm --ignore $(ALONE)
	python -m pytest -q -m slow $(ALONE) tests/slurm

test-fast: lint  ## lint and the fast tests
	$(PYTEST) -m "not slow" --ignore $(ALONE)
	python -m pytest -q -m "not slow" $(ALONE)

lint: $(TEST_STAMP)  ## ruff and mypy
	ruff check .
	ruff format --check --output-format concise .
	mypy

bench: $(RUN_STAMP) $(if $(TRL_PYTHON),,$(TRL_STAMP))  ## every benchmark: tables, benchmarks/results/, docs/performance.md; ARGS="--only start" for some
	python benchmarks/bench.py --trl-python $(or $(TRL_PYTHON),.venv-trl/bin/python) $(ARGS)

clean:  ## remove .venv, .venv-trl and caches; runs/ stays
	rm -rf .venv .venv-trl .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find launch metrics tests configs -name __pycache__ -prune -exec rm -rf {} +

# From an empty .venv each time: over an installed torch, pip would take the same version for another CUDA as satisfied.
$(RUN_STAMP): export CHOSEN_TORCH := $(TORCH)
$(RUN_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed (make PYTHON=python3.12 ...); $(PYTHON) is " \
	    + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@echo "Installing $$CHOSEN_TORCH and requirements.txt into .venv, once; this takes a few minutes."
	@$(PYTHON) -m venv --clear .venv
	@$(PIP_INSTALL) $$CHOSEN_TORCH
	@grep -v '^torch==' requirements.txt | $(PIP_INSTALL) -r /dev/stdin
	@grep -qxF "$$CHOSEN_TORCH" requirements.txt || echo "$$CHOSEN_TORCH" > .venv/chosen-torch
	@touch $@

$(TEST_STAMP): | $(RUN_STAMP)
	@echo "Installing requirements-dev.txt into .venv, once."
	@$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

$(TRL_STAMP): export CHOSEN_TORCH := $(TORCH)
$(TRL_STAMP):
	@echo "Installing $(TRL) and what it needs into .venv-trl, once, for the benchmarks."
	@$(PYTHON) -m venv --clear .venv-trl
	@$(TRL_PIP_INSTALL) $$CHOSEN_TORCH
	@grep -E '^(transformers|tokenizers|datasets|numpy|pyarrow|jinja2|accelerate|peft)==' requirements.txt \
	    | $(TRL_PIP_INSTALL) $(TRL) -r /dev/stdin
	@touch $@
