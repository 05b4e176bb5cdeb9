# Every target makes its own environment in .venv; only Python 3.11 or newer and pip are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARALLEL := --numprocesses auto --maxprocesses 4
# The data sets that slow tests read, if TFDS prepared some beside the repository.
DATA := $(abspath $(wildcard ../shared/tfds))

.PHONY: demo test test-slow test-whole test-newest docs lint types wheel address clean

demo: $(VENV)/.experiments  ## SGD, SAM and CR-SAM on scikit-learn's digits: a table, metrics and a plot
	$(BIN)/python -m experiments compare digits

ifneq ($(DATA),)
test test-slow test-whole: export TFDS_DATA_DIR ?= $(DATA)
endif

test: $(VENV)/.dev  ## tests, docstring examples and the examples of README.md and docs/
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(VENV)/.dev  ## what `test` leaves out: whole runs in processes of their own, real data sets, the notebook
	$(BIN)/python -m pytest $(PARALLEL) -m slow

test-whole: $(VENV)/.dev  ## the examples' default runs, some minutes in all
	$(BIN)/python -m pytest -m whole

test-newest:  ## the library's own tests on the newest Python installed here, with the newest jax
	.ci/test-newest

docs: $(VENV)/.dev  ## the documentation as HTML in build/docs; a warning is an error
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

wheel: $(VENV)/.dev  ## builds the wheel and imports it on every supported Python that is installed
	PYTHON=$(BIN)/python .ci/check-wheel

address:  ## the repository's address, from setup.cfg to where it is needed too: citation, notebook, badges
	$(PYTHON) .ci/address

clean:
	rm -rf $(VENV) .venv-newest build dist *.egg-info

$(VENV)/.experiments: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[experiments]"
	touch $@

$(VENV)/.dev: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
