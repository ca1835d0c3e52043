# Set-up, demo and checks in one place. `make` lists the commands; .ci/run calls the same ones.
PYTHON ?= python3
BIN := .venv/bin
# pip takes its settings (index, certificates, cache) from the environment; -qq leaves only its errors.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint types docs bench bench-full gpu faults

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.model-ready  ## make .venv with the tested versions and fetch the embedded model

demo: setup  ## tune prompts and weights of a program of two stages on Iris, from the start
	@$(BIN)/cotune fit --config configs/iris_two_stage.yaml --name demo --fresh

# A worker more than cores (tests/conftest.py), one thread each; a file's tests stay together, for what they share.
test: setup  ## run the tests
	@OMP_NUM_THREADS=1 GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-1000} $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: setup  ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

docs: setup  ## build the documentation as a site, any warning an error
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: .venv/.bench-ready  ## measure speed beside other engines, small sizes (minutes; first it installs them)
	@$(BIN)/python -m benchmarks

bench-full: .venv/.bench-ready  ## the figures of benchmarks/README.md (hours; nothing else should run)
	@$(BIN)/python -m benchmarks --full

gpu: setup  ## on an NVIDIA GPU: its tests and speed, in benchmarks/results/gpu.json (minutes)
	@$(BIN)/python -m benchmarks.gpu

faults: setup  ## kill, starve, damage and confuse runs, and write docs/FAULTS.md (hours; it goes on where it was stopped)
	@PYTHONPATH=tests $(BIN)/python -m faults $(FAULTS)

types: setup  ## check types
	@$(BIN)/python -m mypy -p cotune

# Two stamps: the environment is renewed when its requirements change, the model is looked for when its module does.
# A cache that was emptied later is no harm: the first run that needs the model fetches it again.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo \
		"cotune needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make setup PYTHON=python3.12"; \
		exit 1; }
	@test -x $(BIN)/python || { echo "Making .venv with $$($(PYTHON) -V)"; $(PYTHON) -m venv .venv; }
	@echo "Installing cotune and its tested dependencies (a few minutes the first time)"
	@$(PIP) install -c constraints.txt -e ".[dev,docs,retrieval]"
	@touch $@

.venv/.bench-ready: .venv/.model-ready
	@$(PIP) install -c constraints.txt -e ".[bench]"
	@touch $@

.venv/.model-ready: .venv/.installed lightning_modules/embedded.py
	@echo "Looking for the embedded model (93 MB to download the first time)"
	@$(BIN)/python -m cotune.lightning_modules.embedded
	@touch $@
