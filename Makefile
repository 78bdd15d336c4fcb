# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2

# Not empty if the package holds the model that `continuar sample cifar10` needs.
SHIPPED := $(wildcard src/continuar/shipped/cifar10/config.json)

.PHONY: help house demo digits cifar10 test test-slow test-kernels check format clean

help:
	@echo "make demo       set up, then $(if $(SHIPPED),make cifar10,make digits)"
	@echo "make digits     train on handwritten digits, write a grid to out/ (a few minutes on a CPU)"
	@echo "make test       set up with the test extras, then the test suite"
	@echo "make test-slow  the tests that train real models"
	@echo "make test-kernels  the Triton kernels, interpreted on the CPU (Linux; fetches Triton)"
	@echo "make check      lint, format, types, import layering"
	@echo "make house      measure how much code a reader meets, and compare with the goals"
	@echo "make format     apply the formatter"
	@echo "make clean      remove .venv, out and caches"

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python {v.major}.{v.minor} found; 3.11 to 3.13 needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/demo.stamp

demo: $(if $(SHIPPED),cifar10,digits)

cifar10: $(VENV)/demo.stamp
	$(BIN)/continuar sample cifar10 --per-class 2 --out out/cifar10
	@echo "look at out/cifar10/grid.png: each row is the class that was asked for; next, a training of your own: make digits"

digits: $(VENV)/demo.stamp
	$(BIN)/continuar train digits --out out/digits --resume
	$(BIN)/continuar sample out/digits --classes 0,1,2,3,4,5,6,7,8,9 --per-class 8 --out out/samples
	@echo "look at out/samples/grid.png: each row is the digit that was asked for"

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(WORKERS) -q

test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow -q

# Triton gets a directory of its own: a CPU build of PyTorch does not need it, and should not find it in other runs.
$(VENV)/triton.stamp: $(VENV)/dev.stamp
	$(PIP) --no-deps --target $(VENV)/triton triton==3.6.0
	@touch $@

test-kernels: $(VENV)/triton.stamp
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton $(BIN)/python -m pytest -q tests/sampling/test_triton_kernels.py

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

house: $(VENV)/dev.stamp
	$(BIN)/python tools/house.py

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out build src/*.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
