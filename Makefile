# Two commands on a fresh clone: `make serve` and `make test`. `make help` lists the rest.
# Overridable: HOST PORT MODEL ARGS (serve), WORKERS TESTS (test), PYTHON VENV PIP_ARGS (install).

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= quire-tiny
ARGS ?=
WORKERS ?= 2
TESTS ?=
OLDEST_TRITON := 3.6.0
OLDEST_TESTS := tests/docs tests/packaging/test_metadata.py tests/loading tests/server/http/test_routes.py

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# A worker takes tests that follow each other, which share servers and engines, and then what others have left.
SPREAD := -n $(WORKERS) --dist worksteal

.PHONY: help serve install dev test parallel coverage architecture aot aotold oldest hostile fuzz loras fuzzapi clients lint format types docs wheel bench check clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 22

serve: install ## serve MODEL on HOST:PORT
	@exec $(BIN)/quire serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

install: $(VENV)/.installed ## make the virtual environment and install Quire into it

dev: $(VENV)/.installed-dev ## what tests, lint and types need

test: dev ## the default test suite (no GPU needed); TESTS=path for a part of it
	$(PYTEST) $(SPREAD) $(TESTS)

coverage: dev ## the same, and the share of the code's lines that it ran
	$(PYTEST) $(SPREAD) --cov --cov-report= $(TESTS)
	@$(BIN)/coverage report
	@echo "coverage: $$($(BIN)/coverage report --format=total) % of lines"

parallel: dev ## models over several ranks: every family, quantization and proposer, and faults; TESTS=path for a part
	$(PYTEST) $(SPREAD) -m parallel $(TESTS)

architecture: dev ## the tests of layering, names and file sizes alone
	$(PYTEST) tests/architecture

aot: dev ## compile every Triton kernel for sm_90, sm_80, sm_89 and sm_100, without a GPU
	env -u TRITON_INTERPRET $(PYTEST) $(SPREAD) -m aot $(TESTS)

aotold: $(VENV)/triton-$(OLDEST_TRITON) ## the same for sm_90 with the oldest Triton that Quire takes
	env -u TRITON_INTERPRET PYTHONPATH=$(abspath $<) $(PYTEST) $(SPREAD) -m aot -k sm_90 $(TESTS)

oldest: $(VENV)/oldest/.installed ## some tests with the oldest version of each dependency that pyproject.toml takes
	PYTHONPATH=$(abspath $(VENV)/oldest) $(PYTEST) $(SPREAD) -W default $(OLDEST_TESTS)

hostile: dev ## plugins that hang or end their process, and what becomes of the requests beside them
	$(PYTEST) -m hostile $(TESTS)

fuzz: dev ## an hour of random requests under pressure, compared with themselves alone; ARGS="--seconds S" or "--seed N"
	@OMP_NUM_THREADS=1 $(BIN)/python tests/e2e/mixed_requests.py $(ARGS)

loras: dev ## ten thousand random events of adapters: load, unload, reload, request, abort
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.sched.test_adapter_machine
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.engine.adapter_traffic $(ARGS)

fuzzapi: $(VENV)/fuzz/.installed $(VENV)/.installed-dev ## a minute of random HTTP requests, by schemathesis; ARGS="--seconds S --seed N"
	@OMP_NUM_THREADS=1 $(BIN)/python tests/server/fuzz_api.py --schemathesis $(VENV)/fuzz/bin/schemathesis $(ARGS)

clients: $(VENV)/clients/.installed $(VENV)/.installed-dev ## agents on the server through OpenAI's SDK, LangChain, LiteLLM, instructor and pydantic-ai
	@OMP_NUM_THREADS=1 $(BIN)/python tests/clients/run.py --python $(VENV)/clients/bin/python $(ARGS)

lint: dev ## ruff: rules and format
	@status=0; $(BIN)/ruff check . || status=1; $(BIN)/ruff format --check . || status=1; exit $$status

format: dev ## rewrite to the format that lint wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: dev ## mypy, strict
	$(BIN)/mypy

docs: dev ## the documentation as a site, into site/; a broken link fails
	$(BIN)/python tools/generate_reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir site

wheel: dev ## sdist and wheel into dist/
	rm -rf dist build
	$(BIN)/python -m build --quiet --no-isolation --outdir dist .

bench: install ## tokens per second of MODEL, beside transformers where it runs
	$(BIN)/quire bench throughput --workload nano --model $(MODEL) $(ARGS)

check: lint types test aot ## everything but the wheel

clean: ## remove what make made
	rm -rf $(VENV) build dist site .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info

# ---- the virtual environment: a stamp per install, so that a second make is instant -------------------------------

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; try: sudo apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$$($(PYTHON) --version) is too old: Quire needs 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || \
	  echo "note: $$($(PYTHON) --version) is newer than those Quire is tested with (3.11, 3.12); if no torch wheel fits it: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module; try: sudo apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) -e .
	@touch $@

$(VENV)/triton-$(OLDEST_TRITON): $(VENV)/.installed-dev
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps --target $@ triton==$(OLDEST_TRITON)

# torch and triton stay those of the environment: a second torch would be gigabytes, and `aotold` has the oldest Triton.
$(VENV)/oldest/.installed: $(VENV)/.installed-dev
	@rm -rf $(@D)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) --target $(@D) \
	  $$($(BIN)/python tools/oldest_dependencies.py --except torch triton setuptools)
	@touch $@

# An environment of its own for each of these extras: they narrow what Quire leaves open, such as pytest's version, and
# need nothing of Quire.
$(VENV)/fuzz/.installed $(VENV)/clients/.installed: $(VENV)/%/.installed: $(VENV)/.installed
	@rm -rf $(@D)
	@$(BIN)/python -m venv $(@D)
	@$(@D)/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) $$($(BIN)/python -c \
	  'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$*"])')
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	rm -rf $(VENV)/autoawq
	$(PIP) --quiet --no-deps --target $(VENV)/autoawq autoawq==0.2.9
	@touch $@
