# Each target works on a fresh Debian machine with Python 3.11 (and its venv), make and git.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test check proto bench autoscale chaos cancels fuzz clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/python -m gateway.demo

# Three, also on two cores: those that use Ray, one after another, wait most of the time. They begin first (tests/conftest.py), and
# in the order collected: the longest chain must not begin last.
WORKERS ?= 3
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd proto && ../$(BIN)/buf lint
	$(BIN)/python proto/generate.py --check

proto: setup
	$(BIN)/python proto/generate.py

bench: setup
	$(BIN)/python -m benchmarks.decode

# Pipelines 1 → 2 → 1 under load.
autoscale: setup
	$(BIN)/python -m benchmarks.autoscale

# Stages killed at random; with SCENARIO="rolling drain …" (or all) that instead.
KILLS ?= 20
SEED ?= 1
ROUNDS ?= 2
SCENARIO ?=
chaos: setup
ifeq ($(SCENARIO),)
	$(BIN)/python -m tests.chaos.kills --kills $(KILLS) --seed $(SEED)
else
	$(BIN)/python -m tests.chaos.scenarios $(filter-out all,$(SCENARIO)) --rounds $(ROUNDS) --seed $(SEED)
endif

CANCELS ?= 10000
cancels: setup
	$(BIN)/python -m tests.chaos.cancels --cancels $(CANCELS) --seed $(SEED)

MESSAGES ?= 50000
STRINGS ?= 10000
EXAMPLES ?= 50
fuzz: setup
	$(BIN)/python -m tests.chaos.fuzz --messages $(MESSAGES) --strings $(STRINGS) --seed $(SEED)
	$(BIN)/python -m tests.chaos.fuzz_openapi --max-examples $(EXAMPLES) --seed $(SEED)

clean:
	rm -rf $(VENV)
