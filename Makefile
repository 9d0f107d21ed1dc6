# make demo    train a small LLaMA with AdamW and with compressed state, and compare; make demo ARGS="--data.root DIR"
# make test    lint, types and tests; make test ARGS="tests/kinds -k low_rank"
# make test-quick    the tests that start no ranks and train no model, for daily work
# make docs    write the pages that are generated from the sources, then build the site in docs/_build/html
# make dist    build a source distribution and a wheel, and try both in an empty environment
# The virtual environment is made on first use, and again when the requirements change.

PYTHON ?= $(shell command -v python3.11 2>/dev/null || command -v python3)
VENV ?= .venv
ARGS ?=
# Whole files go to the workers, so that the cases of a file share one process group.
PARALLEL := --numprocesses=auto --maxprocesses=4 --dist=loadfile
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-quick docs dist lint clean venv

demo: $(INSTALLED)
	$(BIN)/python examples/pretrain/compare.py $(ARGS)

test: lint
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-quick: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(ARGS)

docs: $(INSTALLED)
	$(BIN)/python docs/tables.py > docs/recipes.md
	$(BIN)/python docs/names.py > docs/names.md
	$(BIN)/python docs/options.py > docs/options.md
	$(BIN)/python docs/metrics.py > docs/metrics.md
	$(BIN)/python docs/errors.py > docs/errors.md
	$(BIN)/python -m sphinx --fail-on-warning --keep-going docs docs/_build/html

dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m tests.release.smoke dist

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(INSTALLED)

# The stamp is written last: an interrupted installation is repeated.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs lightning_logs build docs/_build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
