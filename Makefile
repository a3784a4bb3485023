# `make quickstart` and `make test` need Python 3.11+, make and pip; everything else they install themselves.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest

# The first interpreter that is new enough and can make environments; `make PYTHON=/some/python` overrides.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
  "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

.PHONY: help quickstart test test-oldest parity gpu lint clean chromium

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.all ## install, fetch two small models, run the bundled study, print where its report is
	$(BIN)/equipoise study run quickstart

test: $(VENV)/.dev chromium lint ## lint, types and tests, as .ci/run does
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not parity and not gpu"

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: $(VENV)/.dev ## step by step against TRL 1.16 (minutes; outside CI)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,parity]'
	$(BIN)/python -m pytest -m parity tests

gpu: $(VENV)/.dev ## on a machine with a CUDA device: its tests, then its benchmark into gpu.json (under 8 minutes)
	status=0; timeout -s INT -k 20 220 $(BIN)/python -m pytest -n 6 -v -m gpu tests/gpu/test_training.py tests/gpu/test_parity.py || status=$$?; \
	$(BIN)/python benchmarks/gpu.py --budget-seconds 200 > gpu.json && exit $$status

# The engine on the oldest transformers it supports, without datasets or TRL.
test-oldest: $(OLDEST)/.core ## the core on transformers 5.17
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 -m "not slow and not parity and not gpu and not browser" \
	  tests/core tests/data tests/models tests/objectives tests/reference tests/training

clean: ## remove environments, caches and build products; runs/ and downloaded models stay
	rm -rf $(VENV) $(OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# ---- environments; a stamp is newer than what it was made from, so a second run is quick

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "No Python 3.11 or newer with the venv module was found. Debian/Ubuntu: apt-get install python3 python3-venv; or make PYTHON=/path/to/python" >&2; exit 1; fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/.all: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[all]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.all

$(OLDEST)/.core: pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "No Python 3.11 or newer was found; make PYTHON=/path/to/python" >&2; exit 1; fi
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install -c $(OLDEST)/constraints.txt -e '.[gguf]' transformers==5.17.0 pytest pytest-xdist hypothesis
	@touch $@

# ---- the browser the report is tested in

chromium:
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Chromium with apt-get, for the test that opens a report"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } \
	    || echo "Chromium could not be installed: the browser test will be skipped."; \
	else \
	  echo "Chromium is not here, and installing it takes root and apt-get: the browser test will be skipped. (Debian: sudo apt-get install chromium)"; \
	fi
