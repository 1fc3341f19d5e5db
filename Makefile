# Two commands: `make demo` trains on the embedded digits and shows the samples, `make test` runs the tests.
# Both make a virtual environment in .venv first; `make test PYTHON=python3.12` chooses the interpreter.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/.demo
	$(BIN)/meanflow train digits
	@echo "Samples: runs/digits/samples.png   Report: runs/digits/report.json"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -p no:benchmark

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m pytest bench

# torch first, pinned: an unpinned one may pull gigabytes of a newer build
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
