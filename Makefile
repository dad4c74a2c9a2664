# make demo | make test | make test-conformance | make bench | make lint | make clean-venv
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

# The peers that we are compared with, apart from what we run on.
PEERS := .venv-peers
$(PEERS)/.installed: requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -r requirements-peers.txt
	touch $@

.PHONY: demo test test-conformance bench lint clean-venv
demo: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/measure.py -- $(BIN)/snakemake --profile profiles/local
	$(BIN)/mergelaw summary --config config/config.yaml

test: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 2 --ignore tests/conformance

# Against mergekit itself.
test-conformance: $(VENV)/.installed $(PEERS)/.installed
	PEERS="$(PEERS)" $(BIN)/python -m pytest tests/conformance

# Times against mergekit, the paper's code and the floor. For half an hour nothing else should run.
bench: $(VENV)/.installed $(PEERS)/.installed
	PEERS="$(PEERS)" $(BIN)/python benchmarks/bench.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check workflow rules
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake --lint
	for file in config/*.yaml; do $(BIN)/mergelaw config check $$file || exit 1; done

clean-venv:
	rm -rf $(VENV) $(PEERS)
