# Each command sets up what it needs in .venv and reuses it; nothing has to be installed before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP = $(VENV)/.installed-$(1)
BUILT_FROM = pyproject.toml setup.py constraints.txt $(wildcard perexfx/kernels/cpp/*.cpp perexfx/kernels/cpp/*.h)

.PHONY: demo test lint bench clean

demo: $(call STAMP,demo)
	$(BIN)/python -m perexfx demo

test: $(call STAMP,dev) lint
	$(BIN)/python -m pytest -n auto

lint: $(call STAMP,dev)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(call STAMP,bench)
	$(BIN)/python -m perexfx bench

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(VENV)/bin/python $(BUILT_FROM)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python $(BUILT_FROM)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,bench,examples,onnx,dev]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/bin/python $(BUILT_FROM)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build perexfx/kernels/cpp/*.kernels demo-output .pytest_cache .ruff_cache .hypothesis *.egg-info
