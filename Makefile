# Everything a contributor or a newcomer types. `make help` lists the targets; each needs only Python >= 3.11.
#
#   PYTHON=/path/to/python make demo     choose the interpreter (only used when .venv does not exist yet)
#   VENV=/somewhere/env make test        keep the environment elsewhere
#   JOBS=8 make test                     number of parallel test processes

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
STAMPS := $(VENV)/.lightning-robust
RECIPE ?= digits-robust
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Two test processes on two cores: more threads per process only fight for the same cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help demo test lint format types docs wheel-test conformance compatibility tree setup clean clean-all

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMPS)/demo ## set up .venv, train a standard and a robust model on real digits, print where the results are
	@echo "==> lightning-robust run $(RECIPE)   (offline, CPU, about a minute on two cores)"
	@$(BIN)/lightning-robust run $(RECIPE)
	@echo "==> results of this run: $$(ls -td runs/$(RECIPE)/*/ | sed -n 1p)"
	@echo "    again, changed:      $(BIN)/lightning-robust run $(RECIPE) --help"

test: $(STAMPS)/test ## set up .venv, run the whole test-suite on JOBS=2 processes (no network needed)
	@echo "==> pytest -n $(JOBS)"
	@$(TEST_ENV) $(BIN)/pytest -n $(JOBS) --dist loadgroup -q $(ARGS)

conformance: $(STAMPS)/test ## compare with recorded values of the papers' code: make conformance GOLDEN=DIR
	@$(TEST_ENV) $(BIN)/pytest tests/conformance $(if $(GOLDEN),--golden $(GOLDEN)) -q

compatibility: $(STAMPS)/test ## run the Trainer matrix and write docs/compatibility.json, the table of the documentation
	@$(TEST_ENV) $(BIN)/pytest tests/integration -n $(JOBS) --dist loadgroup -q \
		--record-compatibility docs/compatibility.json

lint: $(STAMPS)/dev ## ruff: style rules and formatting
	@echo "==> ruff check, ruff format --check"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMPS)/dev ## let ruff rewrite the files
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMPS)/dev tree ## mypy --strict over the whole package, callbacks and recipes included
	@echo "==> mypy --strict"
	@$(BIN)/mypy

docs: $(STAMPS)/dev ## build the documentation into docs/_build/html; warnings are errors
	@echo "==> sphinx-build -W"
	@rm -rf docs/api
	@$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "    open docs/_build/html/index.html"

wheel-test: $(STAMPS)/dev ## build sdist and wheel into dist/, install the wheel elsewhere, use it
	@echo "==> python -m build, then the packaging tests on dist/"
	@rm -rf dist && mkdir -p build
	@$(BIN)/python -m build --outdir dist . > build/log.txt 2>&1 || { cat build/log.txt; exit 1; }
	@$(TEST_ENV) $(BIN)/pytest tests/packaging --dist-folder dist -q

setup: $(STAMPS)/dev tree ## set up .venv with everything a contributor needs

# mypy and editors look for files and know nothing of the mapping in pyproject.toml, so they get it as links.
tree: ## build/tree: the package as it is installed, made of links, for mypy and editors
	@rm -rf build/tree && mkdir -p build/tree/lightning_robust
	@rm -rf lightning_robust/__pycache__
	@for entry in lightning_robust/* callbacks recipes; do ln -s "../../../$$entry" build/tree/lightning_robust/; done

clean: ## remove what was built (documentation, dist, caches); keeps .venv and runs
	@echo "==> removing built files"
	@rm -rf dist docs/_build docs/api *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find lightning_robust callbacks recipes tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## also remove .venv and build/
	@echo "==> removing $(VENV) and build/"
	@rm -rf $(VENV) build

# ---------------------------------------------------------------------------------------------------------------------
# The environment. One stamp per amount of tools: demo (run it) < test (test it) < dev (all). A stamp is renewed when
# pyproject.toml changed; the installation is editable, so new and changed source files are seen without it.

$(STAMPS)/python:
	@VENV="$(VENV)" PYTHON="$(PYTHON)" bash .ci/create_venv
	@mkdir -p $(STAMPS) && touch $@

# $(call install,EXTRAS,LINE FOR THE READER); silenced is setuptools' reminder, each time, that the installation is editable
define install
	@echo "==> installing lightning-robust[$(1)] into $(VENV) ($(2))"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -e ".[$(1)]"
endef

$(STAMPS)/demo: pyproject.toml | $(STAMPS)/python
	$(call install,plot,the first time a download of several GB: the default build of PyTorch)
	@touch $@

$(STAMPS)/test: pyproject.toml | $(STAMPS)/python
	$(call install,test,the first time a download of several GB: the default build of PyTorch)
	@touch $(STAMPS)/demo $@

$(STAMPS)/dev: pyproject.toml | $(STAMPS)/python
	$(call install,dev,everything a contributor needs)
	@touch $(STAMPS)/demo $(STAMPS)/test $@
