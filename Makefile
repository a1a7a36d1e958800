# make run    set up and run the main job (python launch.py, the quickstart)
# make test   set up and run the tests (under 10 minutes on 2 cores)
# make test-slow  the longer proofs
# make reproduce  the paper's tables, cell by cell; ARGS="--cars DIR --only ..."
# make study  does it help? Runs what docs/study.md misses; ARGS="--cub DIR --cars DIR"
# make scale  writes docs/scale.md: what the paper's tables take on which machine
# make faults  every fault on purpose; writes docs/faults.md
# make soak  MINUTES=60: training with random kills, memory and files watched
# make check  ruff (lint, format), pyright, and the import rule
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test test-slow check format reproduce study scale faults soak clean

run: $(VENV)/.runtime
	$(BIN)/python launch.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

reproduce: $(VENV)/.runtime
	$(BIN)/python -m benchmarks.reproduce $(ARGS)

study: $(VENV)/.runtime
	$(BIN)/python -m benchmarks.study $(ARGS)

scale: $(VENV)/.dev
	$(BIN)/python -m benchmarks.scale --write docs/scale.md

faults: $(VENV)/.dev
	$(BIN)/python -m pytest tests/faults -m "slow or not slow" --write-table docs/faults.md

MINUTES ?= 60
soak: $(VENV)/.dev
	$(BIN)/python tests/faults/soak.py --minutes $(MINUTES) --table docs/faults.md

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.runtime: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
