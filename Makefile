# make run [MEDIA=/some/folder]  the main job on real media    make test  the tests    make dev  the Dagster UI
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null && \
	$$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info < (3,14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
MEDIA ?= samples/media
MEDIA_HOME ?= var
# Of the tests in each file: another one for each commit, the same one wherever it is tested.
ORDER ?= $(shell git rev-parse --short HEAD 2>/dev/null || echo any)
export MEDIA_HOME

.PHONY: run dev test lint lock install python clean

run: install
	$(BIN)/media-assets run $(MEDIA)

dev: install
	$(BIN)/media-assets dev

test: install
	.ci/fresh --offline $(BIN)/python -m pytest -n 2 --no-loadscope-reorder --order=$(ORDER)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: .venv/.installed

.venv/.installed: requirements/lock.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; set PYTHON=/path/to/it"; exit 1; }
	@echo "Installing into .venv (about 8 GB, once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q "uv>=0.8"
	@$(BIN)/uv pip install --require-hashes --compile-bytecode -r requirements/lock.txt
	@mkdir -p .venv/tmp && TMPDIR=.venv/tmp $(BIN)/uv pip install -q --no-deps -e . && rm -r .venv/tmp # a lock file stays there
	@touch $@

# The lock names versions and hashes only, never an index.
lock: | .venv/.installed
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --extra cpu --extra offline --extra ray --extra k8s \
		--extra samples --extra dev --generate-hashes --no-emit-index-url -q -o requirements/lock.txt

# The interpreter itself, not what chooses it.
python:
	@$(PYTHON) -c 'import os, sys; print(os.path.realpath(sys.executable))'

clean:
	rm -rf .venv var
