# make run    set up and train the quickstart (python launch.py) and its baseline
# make test   set up and run the tests (under 10 minutes on 2 cores)
# make test-slow  the longer proofs
# make test-python PYTHON=python3.12  a part of the tests (about 5 minutes on 2 cores) on
#   that Python (3.11 to 3.13) with the versions of its lock file, requirements/py312.txt
# make lock   writes the lock files: all that requirements.txt installs on Linux, in its
#   newest versions, for each Python
# make reproduce  the paper's tables, cell by cell; ARGS="--cars DIR --only ..."
# make study  does it help? Runs what docs/study.md misses; ARGS="--cub DIR --cars DIR"
# make scale  writes docs/scale.md: what the paper's tables take on which machine
# make faults  every fault on purpose; writes docs/faults.md
# make soak  MINUTES=60: training with random kills, memory and files watched
# make docs   the documentation site, into site/; warnings are errors
# make docs-serve  the same on http://127.0.0.1:8000, built again at each change
# make check  ruff (lint, format), pyright, and the import rule
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run quickstart quickstart-baseline test test-slow test-python lock check \
	format reproduce study scale faults \
	soak docs docs-serve clean

# Both at once. The baseline ends first, and the report of the other run shows its scores.
run: $(VENV)/.runtime
	mkdir -p runs
	$(MAKE) --no-print-directory -j2 quickstart-baseline quickstart

quickstart:
	$(BIN)/python launch.py

quickstart-baseline:
	$(BIN)/python launch.py --config configs/quickstart.py:baseline,plus --workdir runs/quickstart-baseline > runs/quickstart-baseline.log 2>&1

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# What depends most on the versions of Python, jax and scipy, from each part of the package.
PORTABLE_TESTS := tests/test_requirements.py tests/test_imports.py tests/test_configs.py \
	tests/test_geometry.py tests/test_losses.py tests/test_schedule.py \
	tests/test_train_step.py tests/test_launch.py tests/runtime/test_checkpoint.py \
	tests/runtime/test_devices.py tests/runtime/test_provenance.py tests/datasets \
	tests/input tests/inference/test_restore.py tests/inference/test_predict.py \
	tests/inference/test_export.py tests/training/test_dispatch.py \
	tests/training/test_train.py tests/reports/test_uncertainty.py

# Recursive (=), so that only these targets start the interpreter to ask for its version.
PYTHON_VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
LOCKED = $(VENV)-$(PYTHON_VERSION)
LOCK = requirements/py$(subst .,,$(PYTHON_VERSION)).txt

test-python:
	test -x $(LOCKED)/bin/pip || $(PYTHON) -m venv $(LOCKED)
	$(LOCKED)/bin/python -m pip install --quiet -c $(LOCK) -r requirements-dev.txt
	cp $(LOCK) $(LOCKED)/lock.txt
	$(LOCKED)/bin/python -m pytest -m "not slow" -n 2 --dist worksteal $(PORTABLE_TESTS)

lock: $(VENV)/.dev
	for version in 3.11 3.12 3.13; do \
		$(BIN)/uv pip compile requirements.txt --upgrade --quiet --no-annotate \
			--python-version $$version --python-platform linux \
			--custom-compile-command "make lock" \
			--output-file requirements/py$$(echo $$version | tr -d .).txt || exit 1; \
	done

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

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-3.* site .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.runtime: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/.docs: requirements-docs.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements-docs.txt
	touch $@
