# Two commands do all: `make demo` shows it, `make test` proves it. Each sets up what it needs first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export UV_PYTHON_DOWNLOADS := never
# Hundreds of processes are started by the tests: none of them is to compile what all of them run.
unexport PYTHONDONTWRITEBYTECODE
BIN := .venv/bin
SOURCES := pyproject.toml uv.lock hatch_build.py $(wildcard proto/resilver/v1/*.proto)

.PHONY: help setup demo test thorough openzfs simulate fuzz bench lint check format clean
help: ## What there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: .venv/.ready ## Virtual environment, and as root the packages that tests and demo use

.venv/.ready: $(SOURCES)
	@./deploy/setup.sh
	@touch $@

demo: setup ## A cluster on this machine: three nodes, one stale, one diverged, brought back (KEEP=1 leaves it running)
	@$(BIN)/resilver demo $(if $(KEEP),--keep)

test: setup ## The tests, a file at a time on each of three workers
	@$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

thorough: setup ## All tests, with every kind of volume killed at every step in every state: hours
	@RESILVER_THOROUGH=1 RESILVER_MACHINE=all $(BIN)/pytest -n 3 --dist loadfile

openzfs: setup ## As root: tests on the kernel's OpenZFS, in an emulated machine that is built first; ARGS are pytest's
	@./deploy/openzfs-setup.sh
	@$(BIN)/python -m tests.openzfs.run $(ARGS)

simulate: setup ## The cluster that fails in every way, SEEDS=100000 times; a seed that fails is a line that replays it
	@$(BIN)/python -m tests.simulation --seeds $(or $(SEEDS),10000) --first $(or $(FIRST),1)

fuzz: setup ## Every fuzz target, MINUTES=30 together, guided by coverage; what breaks something is written to .fuzz/found
	@UV_PROJECT_ENVIRONMENT=.venv .tools/bin/uv sync --quiet --locked --inexact --group fuzz
	@$(BIN)/python -m fuzz --minutes $(or $(MINUTES),30) $(ARGS)

bench: setup ## As root: us and the others on the same change, in turn; tables, JSON and plots into docs/benchmarks
	@./deploy/bench-setup.sh
	@$(BIN)/python -m bench.suite $(ARGS)

lint: setup ## Format, lint, types, layers, proto lint
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/buf lint proto

check: lint test ## Everything that must pass before a commit

format: setup ## Formats, and mends what can be mended without thought
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## Removes the environment and caches
	@rm -rf .venv .tools .openzfs .hypothesis .mypy_cache .ruff_cache dist
