# `make demo` or `make test`: each is enough by itself, with Python 3.11 or newer and nothing installed.
#   PYTHON=python3.12   the interpreter that .venv is made from
#   DEMO="--long"       more flags for halve demo

PYTHON ?= python3
VENV ?= .venv
DEMO ?=
BIN := $(VENV)/bin
# A file's tests share what they set up; the files that take longest come first (tests/conftest.py).
WORKERS := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo test lint quick quick-tests long fuzz shapes cuts docs families gpu-check

demo: $(VENV)/.installed
	$(BIN)/halve demo $(DEMO)

test: lint
	$(BIN)/python scripts/make_docs.py --check
	OMP_NUM_THREADS=1 $(BIN)/pytest $(WORKERS) --durations=20

# Style, types and layers.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Style, types and layers beside the tests that finish in a second each. tests/slow.txt names the others with their
# seconds; `pytest --note-slow` writes this file.
quick: $(VENV)/.installed-dev
	$(MAKE) -j 2 lint quick-tests

quick-tests: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --quick $(WORKERS)

# Longer proofs, by hand before something is called resolved: bad inputs at size, random cuts, every family's proof.
long: fuzz cuts families shapes

# Many more of the bad inputs of which the tests try a few; CASES of each kind.
CASES ?= 100
fuzz: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 tests/fuzz --cases $(CASES)

# Counts of random shapes against built models, of every family; the tests look at ten of them.
shapes: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 tests/search/test_shapes_built.py --every-family

# Random cuts of the demo's teacher on few tokens and many, each beside the plain cut: some minutes.
cuts: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 tests/cut/test_any_number_of_tokens.py --cuts 20

# Pages that are generated from the code, and the site of all pages in docs/_build, where a warning is an error.
docs: $(VENV)/.installed-dev $(VENV)/.installed-docs
	$(BIN)/python scripts/make_docs.py
	$(BIN)/sphinx-build -q -n -W --keep-going docs docs/_build
	@echo docs/_build/index.html

# The walk through all families takes an hour and resumes. It is needed when a quirk, discovery or the proof changes.
families: $(VENV)/.installed-dev
	$(BIN)/python scripts/families.py

# What needs a GPU: exact losses, their memory, resume, speed, the memory plan. Without one it says so.
gpu-check: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/gpu_check.py

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit('halve needs Python 3.11 or newer: make PYTHON=python3.12' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)
