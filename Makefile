# `make demo` and `make test` set up everything they need in .venv; see README.md.

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
STORE   ?= demo-store
INSTALLED := $(VENV)/installed

.PHONY: help demo test test-fast test-slow lint clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## personalize the sample subject on the embedded backbone, on this machine's CPU
	$(BIN)/python pipelines/personalize.py --store $(STORE)

test: $(INSTALLED)  ## the tests that every change must pass
	$(BIN)/python -m pytest -m "not slow and not alone" --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m "not slow and alone"

test-fast: $(INSTALLED)  ## those of them that take no time: the loop while you work
	$(BIN)/python -m pytest -m "not slow and not alone and not long" --numprocesses 2 --dist loadfile

test-slow: $(INSTALLED)  ## the rest of the tests: minutes each
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,tools]'
	touch $@

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(STORE) build *.egg-info
