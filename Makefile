# Each command sets up what it needs in .venv and reuses it; nothing has to be installed before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP = $(VENV)/.installed-$(1)

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

$(VENV)/.installed-demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,bench,onnx,dev]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) demo-output .pytest_cache .ruff_cache .hypothesis *.egg-info
