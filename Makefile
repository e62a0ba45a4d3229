# Two commands set everything up on a fresh machine: `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
SEED ?= 0
OUT ?= runs/demo
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-seeds test oldest-newest wheel pythons zoo engines engines-long lint format bench bench-growth bench-real bench-gpu mutants proof fuzz soak soak-local real real-short gpu bench-push clean help

help:
	@echo "make demo [SEED=1] [OUT=runs/demo]   the whole recipe on a little world, with a report"
	@echo "make demo-seeds                      the demo with three seeds; writes docs/demo.md and its pictures"
	@echo "make test                            all tests"
	@echo "make oldest-newest                   all tests on the oldest and on the newest versions of the packages that pyproject.toml allows"
	@echo "make wheel                           the wheel, installed into a new environment: the command, the short demo (2 minutes)"
	@echo "make pythons                         the same for every supported Python of this machine, with a part of the tests"
	@echo "make zoo                             every causal architecture of transformers, tiny, against its own forward"
	@echo "make engines                         the tests of vLLM, FSDP2, DeepSpeed and Ray, in an environment of their own"
	@echo "make engines-long                    all of these tests, the long ones too"
	@echo "make lint                            ruff and mypy"
	@echo "make mutants                         breaks the mathematics line by line; the tests must turn red"
	@echo "make proof                           every known answer at full length, over three seeds; writes docs/proof.json"
	@echo "make fuzz                            10,000 mutated inputs of each kind of file and of command lines; each succeeds or ends with one error"
	@echo "make soak                            a run on a local Ray cluster whose workers are killed twenty times"
	@echo "make soak-local                      runs of every method that are killed a hundred times, and at each file operation, against uninterrupted ones"
	@echo "make real                            every verb on SmolLM2-135M-Instruct, with checks, before and after (25 CPU minutes)"
	@echo "make real-short                      a few steps of each of these verbs (5 CPU minutes)"
	@echo "make gpu                             engines, NCCL, bf16 and a short learning run on a machine with GPUs"
	@echo "make bench                           whet, TRL and lean hand-written loops in turns on the same work; writes benchmarks/RESULTS.md (hours)"
	@echo "make bench-growth                    how cost grows with lengths, groups, batch, vocabulary and model; checked against bounds"
	@echo "make bench-real                      SFT, GRPO and generation of the real 135M model beside plain loops"
	@echo "make bench-gpu                       DPO, GRPO and PPO steps of 0.5B and 1.5B shapes beside TRL, on a machine with a GPU"
	@echo "make bench-push                      seconds of a weight update of a vLLM engine, at two sizes"

# The environment is made anew when the requirements change.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade -c constraints.txt pip setuptools wheel
	.venv/bin/python -m pip install --quiet -c constraints.txt torch
	.venv/bin/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# vLLM wants exact versions and packages that have no CPU build, so its tests have an environment of their own.
.venv-engines/ready: pyproject.toml requirements-engines.txt
	$(PYTHON) -m venv .venv-engines
	.venv-engines/bin/python -m pip install --quiet --no-deps -r requirements-engines.txt
	DS_BUILD_OPS=0 .venv-engines/bin/python -m pip install --quiet --no-deps --no-build-isolation deepspeed==0.19.8
	.venv-engines/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

.venv-gpu/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet -c constraints.txt torch
	.venv-gpu/bin/python -m pip install --quiet -e '.[dev,vllm,deepspeed,ray]'
	touch $@

.venv/real: .venv/ready
	.venv/bin/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[real]'
	touch $@

demo: .venv/ready
	.venv/bin/python -m whet demo --seed $(SEED) --out $(OUT)

demo-seeds: .venv/ready
	.venv/bin/python -m proof.demo_seeds

test: .venv/ready
	.venv/bin/python -m pytest -q -n 2 --dist worksteal --ignore tests/engines

oldest-newest: .venv/ready
	.venv/bin/python -m proof.versions

wheel: .venv/ready
	.venv/bin/python -m proof.wheel

pythons: .venv/ready
	.venv/bin/python -m proof.wheel --pythons

zoo: .venv/ready
	.venv/bin/python -m pytest -q -n 2 --dist worksteal --long tests/zoo

# Everything listens on loopback alone.
QUIET = VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 GLOO_SOCKET_IFNAME=lo

engines: .venv-engines/ready
	$(QUIET) .venv-engines/bin/python -m pytest -q tests/engines

engines-long: .venv-engines/ready
	$(QUIET) .venv-engines/bin/python -m pytest -q --long tests/engines

soak: .venv-engines/ready
	$(QUIET) .venv-engines/bin/python -m proof.soak

soak-local: .venv/ready
	.venv/bin/python -m proof.soak_local

real: .venv/real
	rm -rf runs/real
	.venv/bin/python -m proof.real

real-short: .venv/real
	rm -rf runs/real
	.venv/bin/python -m proof.real --short

gpu: .venv-gpu/ready
	.venv-gpu/bin/python -m proof.gpu

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/ready
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# TRL has an environment of its own, with the same torch; PPO is only in its older version.
.venv-peer/ready: benchmarks/requirements-peer.txt constraints.txt
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install --quiet -c <(grep '^torch==' constraints.txt) torch
	.venv-peer/bin/python -m pip install --quiet -c <(grep '^torch==' constraints.txt) -r benchmarks/requirements-peer.txt
	.venv-peer/bin/python -m pip install --quiet --no-deps --target .venv-peer/ppo trl==1.12.0
	touch $@

.venv-peer-gpu/ready: benchmarks/requirements-peer.txt constraints.txt
	$(PYTHON) -m venv .venv-peer-gpu
	.venv-peer-gpu/bin/python -m pip install --quiet -c <(grep '^torch==' constraints.txt) torch
	.venv-peer-gpu/bin/python -m pip install --quiet -r benchmarks/requirements-peer.txt
	.venv-peer-gpu/bin/python -m pip install --quiet --no-deps --target .venv-peer-gpu/ppo trl==1.12.0
	touch $@

BENCH = .cache/bench/$$(date +%Y-%m-%d).jsonl

bench: .venv/ready .venv-peer/ready
	.venv/bin/python -m benchmarks.pairs --lines --n 3 --trl grouplen --out $(BENCH)
	.venv/bin/python -m benchmarks.results $(BENCH)

bench-growth: .venv/ready
	.venv/bin/python -m benchmarks.growth --out .cache/growth.jsonl
	.venv/bin/python -m benchmarks.generation

bench-real: .venv/real
	.venv/bin/python -m benchmarks.real --out .cache/real.jsonl

bench-gpu: .venv-gpu/ready .venv-peer-gpu/ready
	.venv-gpu/bin/python -m benchmarks.gpu --out .cache/gpu.jsonl

bench-push: .venv-engines/ready
	$(QUIET) .venv-engines/bin/python -m benchmarks.pushes

mutants: .venv/ready
	.venv/bin/python -m proof.mutants

proof: .venv/ready
	.venv/bin/python -m proof.run
	.venv/bin/python -m proof.page

fuzz: .venv/ready
	.venv/bin/python -m proof.fuzz

clean:
	rm -rf .venv .venv-* .cache runs build dist *.egg-info src/*.egg-info
