# Every target makes the environment it needs. PYTHON picks the interpreter (3.11 or 3.12) that .venv is made with.
PYTHON ?= python3
BIN := .venv/bin
PYTEST ?= $(BIN)/pytest
ARGS ?=
# Tests run in so many processes, in the order of the files: the long end-to-end ones come early, and wait more than they compute.
# WORKERS=0 for a debugger.
WORKERS ?= 3
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
UV := uv==0.13.9
RESOLVE := .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
	--custom-compile-command "make constraints" $(if $(UPGRADE),--upgrade)

export DVC_NO_ANALYTICS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo ui test test-fast test-long check format dvc constraints clean
.DELETE_ON_ERROR:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/installed-demo ## Run the whole loop on the bundled encyclopedia
	$(BIN)/realm demo $(ARGS)

ui: .venv/installed-demo ## Start the services and their web pages
	$(BIN)/realm up $(ARGS)

test: .venv/installed-dev ## Run every test but the long ones (ARGS="-k word" narrows it)
	@$(PYTEST) $(PARALLEL) $(ARGS)

test-fast: .venv/installed-dev ## Run the tests that need neither time nor services
	@$(PYTEST) $(PARALLEL) -m "not slow and not e2e and not faults and not browser and not long" $(ARGS)

test-long: .venv/installed-dev ## Run the soaks and the studies over several seeds; up to hours
	@$(PYTEST) -m long $(ARGS)

check: .venv/installed-dev ## Formatting, lint, types, import contracts, the repository's own rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/dg check defs
	@$(PYTEST) tests/architecture -q

format: .venv/installed-dev ## Rewrite the sources the way check wants them
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

dvc: .venv/installed-demo .venv-dvc/installed ## Run the data pipeline of dvc.yaml, with DVC in its own environment
	@test -d .dvc || .venv-dvc/bin/dvc init --quiet
	PATH="$(CURDIR)/$(BIN):$$PATH" .venv-dvc/bin/dvc repro $(ARGS)

constraints: .venv-lock/installed ## Resolve constraints.txt and requirements-dvc.txt again (UPGRADE=1 lifts the pins)
	$(RESOLVE) pyproject.toml --extra faiss --extra demo --extra postgres --extra s3 --extra hf --extra spacy --extra dev -o constraints.txt
	echo 'dvc[s3]>=3.67,<4' | $(RESOLVE) - -o requirements-dvc.txt

clean: ## Remove environments, caches and build output; results and the artifact store stay
	rm -rf .venv .venv-dvc .venv-lock build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		.import_linter_cache
	find realm_core assets orchestration tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else \
		"$(PYTHON) is Python %d.%d; set PYTHON to a Python 3.11 or 3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

# A file per set of extras, older than what decides its content: nothing is installed twice.
.venv/installed-demo: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,postgres,s3]'
	@touch $@ .venv/installed-demo

.venv-dvc/installed: requirements-dvc.txt
	test -x .venv-dvc/bin/python || $(PYTHON) -m venv .venv-dvc
	.venv-dvc/bin/python -m pip install --quiet --requirement requirements-dvc.txt
	@touch $@

.venv-lock/installed: Makefile
	test -x .venv-lock/bin/python || $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet '$(UV)'
	@touch $@
