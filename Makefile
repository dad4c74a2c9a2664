# make demo | make learned-law | make test | make test-conformance | make test-openrlhf | make test-slurm
# make bench | make bench-gpu | make bench-coverage | make lint | make clean-venv
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OPENRLHF := .venv-openrlhf
PEERS := .venv-peers

# What is installed is what the two files say; a change of either installs again.
$(VENV)/.installed: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("mergelaw needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt -r requirements-dev.txt
	$(BIN)/pip install -q --no-deps -e .
	touch $@

# OpenRLHF has an environment of its own, here without GPUs; tests/openrlhf/stand_ins has what it
# imports of flash-attn, which cannot be built without CUDA.
$(OPENRLHF)/.installed: requirements-openrlhf.txt
	$(PYTHON) -m venv $(OPENRLHF)
	$(OPENRLHF)/bin/pip install -q -r requirements-openrlhf.txt
	$(OPENRLHF)/bin/pip install -q --no-deps --no-build-isolation deepspeed==0.19.6 openrlhf==0.11.2
	echo "$(CURDIR)/tests/openrlhf/stand_ins" > $$($(OPENRLHF)/bin/python -c 'import site; print(site.getsitepackages()[0])')/stand_ins.pth
	touch $@

# The peers that we are compared with, apart from what we run on.
$(PEERS)/.installed: requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -r requirements-peers.txt
	touch $@

.PHONY: demo learned-law test test-conformance test-openrlhf test-slurm bench bench-gpu bench-coverage lint format check clean-venv
demo: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/measure.py -- $(BIN)/snakemake --profile profiles/local

# The law of learned merges, on the demo's experts.
learned-law: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake --profile profiles/local --configfile config/learned_law.yaml

test: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 2

# Against mergekit itself.
test-conformance: $(VENV)/.installed $(PEERS)/.installed
	PEERS="$(PEERS)" $(BIN)/python -m pytest tests/conformance

# Times against mergekit, the paper's code and the floor. For an hour nothing else should run.
bench: $(VENV)/.installed $(PEERS)/.installed
	PEERS="$(PEERS)" $(BIN)/python benchmarks/bench.py

# On a GPU: its limits, evaluation, merging; at most eight minutes, each result as soon as it is there.
bench-gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu.py

# Coverage of the intervals, a thousand simulated studies a setting: a fit over several sizes takes a
# second, so this takes days on two cores.
bench-coverage: $(VENV)/.installed
	$(BIN)/python benchmarks/interval_coverage.py --sets 1000

# The first run compiles two extensions of DeepSpeed, for minutes.
test-openrlhf: $(VENV)/.installed $(OPENRLHF)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" MERGELAW_OPENRLHF_PYTHON="$(CURDIR)/$(OPENRLHF)/bin/python" $(BIN)/python -m pytest tests/openrlhf

# On a real SLURM, installed from Debian's packages and started for these tests alone; needs root.
test-slurm: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/slurm/cluster.py $(BIN)/python -m pytest -n 3 -rP tests/slurm

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt workflow rules

# The inner loop: under two minutes. `make test` has the rest.
check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 2 tests/golden tests/versions tests/unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/snakefmt --check workflow rules
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake --lint
	for file in config/*.yaml; do $(BIN)/mergelaw config check $$file || exit 1; done

clean-venv:
	rm -rf $(VENV) $(OPENRLHF) $(PEERS)
