# Needs Python 3.11+ and make. Everything else is set up in .venv when it is missing.
#   make demo      train, evaluate and compare four small models        make test       the default tests
#   make lint      ruff and mypy                                        make test-long      whole runs, and several processes
#   make format    let ruff rewrite the code                            make test-survival  real runs, interrupted
#   make test-slow the slow tests
#   make study     the paper's claims 1, 2 and 5, checked on 2 cores in under 45 minutes (DATA=folder of CIFAR-10)
#   make test-lowest   the default tests, or TESTS="FILE ...", with the lowest torch, torchvision and timm that are allowed
#   make clean     remove what make made, but for the study (outputs/study) and results
#   make gpu-results   on a GPU machine: the figures that need one, in slices; again until nothing is left (ARGS=--help)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo study test test-long test-lowest test-survival test-slow lint format clean setup gpu-results

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
LOWEST := .venv-lowest
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)
DEMO_FOLDER ?= outputs/demo

help:
	@sed -n 's/^# *//p' Makefile

demo: setup
	@$(BIN)/python -m scripts.demo $(DEMO_FOLDER)

study: setup
	@$(BIN)/python scripts/study.py scale=laptop $(if $(DATA),data_root=$(DATA))

test: setup
	@$(BIN)/python -m pytest --numprocesses auto

test-lowest: $(LOWEST)/ready
	@$(LOWEST)/bin/python -m pytest --numprocesses auto $(TESTS)

test-long: setup
	@$(BIN)/python -m pytest -m 'long and not slow' --numprocesses auto

test-survival: setup
	@$(BIN)/python -m pytest -m 'survival and not slow' --numprocesses auto

test-slow: setup
	@$(BIN)/python -m pytest -m slow

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

  # Installs nothing: without .venv, the first python that has torch, as GPU machines often have no network.
gpu-results:
	@if test -f $(READY); then python=$(BIN)/python; else \
		for python in $(PYTHON) python3 python; do $$python -c 'import torch' 2>/dev/null && break; done; fi; \
	$$python -m scripts.gpu_results $(ARGS)

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(call install,$(VENV),cat constraints.txt)

$(LOWEST)/ready: pyproject.toml constraints.txt .ci/lowest_versions.py
	$(call install,$(LOWEST),$(PYTHON) .ci/lowest_versions.py)

  # Into the environment $(1), with the constraints that the command $(2) prints.
define install
@{ test -n "$(PYTHON)" && $(PYTHON) -c '$(NEW_ENOUGH)'; } \
	|| { echo "make: Python 3.11 or later is needed; install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
@echo "Setting up $(1) with $$($(PYTHON) --version), once; this downloads torch and takes some minutes ..."
@$(PYTHON) -m venv --clear $(1) || { echo "make: $(PYTHON) cannot make a virtual environment (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
@$(2) > $(1)/constraints.txt
@$(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(1)/constraints.txt --editable '.[train,dev]' \
	|| { echo "make: installing failed, see above; is the Python package index reachable from here?" >&2; exit 1; }
@touch $@
endef

clean:
	rm -rf $(VENV) $(LOWEST) $(DEMO_FOLDER) .pytest_cache .ruff_cache .mypy_cache *.egg-info
