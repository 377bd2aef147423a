# `make help` lists what can be made. Everything works on a fresh machine with Python 3.11 or newer and no GPU.

PYTHON ?= python3
BIN := .venv/bin
CHECKPOINT ?= harbour/adapter
OUT ?= build/merged
RECIPE ?= recipes/quickstart.yaml
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check audit bench merge-adapter base clean

help: ## list what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/ready ## make .venv with the tested versions

.venv/ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup ## run the whole chain on the embedded model: sft, nf4 adapter, reward model, dpo, ppo; writes report.html
	@$(BIN)/align run recipes/quickstart.yaml --report report.html

test: setup ## the fast tests (8 minutes at most on 2 cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses $(JOBS) --dist loadfile

test-all: setup ## every test, the long proofs too
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --timeout 3600

check: setup ## format, lint and types
	@$(BIN)/ruff format --check align tests data benchmarks
	@$(BIN)/ruff check align tests data benchmarks
	@$(BIN)/mypy
	@$(MAKE) --no-print-directory audit || echo "audit: holes are known, see above; a newer version may have closed them"

audit: setup ## look up known security holes of the installed versions, where a network allows
	@if $(BIN)/python -c "import socket; socket.create_connection(('pypi.org', 443), 5)" 2>/dev/null; \
	then $(BIN)/python -m pip_audit --skip-editable --progress-spinner off; \
	else echo "audit: no network, nothing was looked up"; fi

bench: setup ## beside TRL and transformers on the same work, into docs/performance.md (a quiet machine, an hour); ONLY=sft,dpo for some rows
	@$(BIN)/python benchmarks/bench.py $(if $(ONLY),--only $(ONLY)) --out docs/performance.md

merge-adapter: setup ## merge an adapter into its base: CHECKPOINT=harbour/adapter OUT=build/merged
	@$(BIN)/align merge $(CHECKPOINT) --out $(OUT)

base: setup ## make the embedded model anew, from its generator and recipe (minutes)
	@$(BIN)/python data/harbour/make.py
	@$(BIN)/python data/harbour/make.py --text build/harbour/text.jsonl
	@$(BIN)/align run recipes/harbour-base.yaml
	@$(BIN)/python data/harbour/make.py --export $$($(BIN)/align checkpoints show harbour-base/base --json | $(BIN)/python -c "import json, sys; print(json.load(sys.stdin)[\"path\"])")

clean: ## remove what was built, but not .align, which holds your checkpoints
	@rm -rf build dist report.html .pytest_cache .mypy_cache .ruff_cache *.egg-info
