# make demo | make test | make lint | make clean-venv
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What is installed is what the two files say; a change of either installs again.
$(VENV)/.installed: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("mergelaw needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt -r requirements-dev.txt
	$(BIN)/pip install -q --no-deps -e .
	touch $@

.PHONY: demo test lint clean-venv
demo: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/measure.py -- $(BIN)/snakemake --profile profiles/local
	$(BIN)/mergelaw summary --config config/config.yaml

test: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check workflow rules
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake --lint
	for file in config/*.yaml; do $(BIN)/mergelaw config check $$file || exit 1; done

clean-venv:
	rm -rf $(VENV)
