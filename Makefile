# Two commands set everything up on a fresh machine: `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
SEED ?= 0
OUT ?= runs/demo
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint format bench mutants proof clean help

help:
	@echo "make demo [SEED=1] [OUT=runs/demo]   the whole recipe on a little world, with a report"
	@echo "make test                            all tests"
	@echo "make lint                            ruff and mypy"
	@echo "make mutants                         breaks the mathematics line by line; the tests must turn red"
	@echo "make proof                           every known answer at full length, over three seeds; writes docs/proof.json"
	@echo "make bench                           throughput of the loops on a fixed workload"

# The environment is made anew when the requirements change.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade -c constraints.txt pip setuptools wheel
	.venv/bin/python -m pip install --quiet -c constraints.txt torch
	.venv/bin/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[demo,dev]'
	touch $@

demo: .venv/ready
	.venv/bin/python -m whet demo --seed $(SEED) --out $(OUT)

test: .venv/ready
	.venv/bin/python -m pytest -q

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/ready
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: .venv/ready
	.venv/bin/python -m benchmarks.throughput

mutants: .venv/ready
	.venv/bin/python -m proof.mutants

proof: .venv/ready
	.venv/bin/python -m proof.run
	.venv/bin/python -m proof.page

clean:
	rm -rf .venv runs build *.egg-info src/*.egg-info
