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

PACKAGE_FILES := find lightning_robust callbacks recipes -type f \( -name '*.py' -o -name '*.yaml' -o -name py.typed \)

.PHONY: help demo test lint format types docs wheel-test conformance setup clean clean-all FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMPS)/demo ## set up .venv, train a standard and a robust model on real digits, print where the results are
	@echo "==> lightning-robust run $(RECIPE)   (offline, CPU, about three minutes on two cores)"
	@$(BIN)/lightning-robust run $(RECIPE)
	@echo "==> results of this run: $$(ls -td runs/$(RECIPE)/*/ | head -n 1)"
	@echo "    again, changed:      $(BIN)/lightning-robust run $(RECIPE) --help"

test: $(STAMPS)/test ## set up .venv, run the whole test-suite on JOBS=2 processes (no network needed)
	@echo "==> pytest -n $(JOBS)"
	@$(TEST_ENV) $(BIN)/pytest -n $(JOBS) --dist worksteal -q $(ARGS)

conformance: $(STAMPS)/test ## compare with recorded values of the papers' code: make conformance GOLDEN=DIR
	@$(TEST_ENV) $(BIN)/pytest tests/conformance $(if $(GOLDEN),--golden $(GOLDEN)) -q

lint: $(STAMPS)/dev ## ruff: style rules and formatting
	@echo "==> ruff check, ruff format --check"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMPS)/dev ## let ruff rewrite the files
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMPS)/dev ## mypy --strict over the whole package, callbacks and recipes included
	@echo "==> mypy --strict"
	@$(BIN)/mypy

docs: $(STAMPS)/dev ## build the documentation into docs/_build/html; warnings are errors
	@echo "==> sphinx-build -W"
	@$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "    open docs/_build/html/index.html"

wheel-test: $(STAMPS)/dev ## build sdist and wheel into dist/, install the wheel elsewhere, use it
	@echo "==> python -m build, then the packaging tests on dist/"
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist . > dist.log 2>&1 || { cat dist.log; rm -f dist.log; exit 1; }
	@rm -f dist.log
	@$(TEST_ENV) $(BIN)/pytest tests/packaging --dist-folder dist -q

setup: $(STAMPS)/dev ## set up .venv with everything a contributor needs

clean: ## remove what was built (documentation, dist, caches); keeps .venv and runs/
	@echo "==> removing built files"
	@rm -rf dist docs/_build docs/api/generated *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find lightning_robust callbacks recipes tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## also remove .venv and its link tree in build/
	@echo "==> removing $(VENV) and build/"
	@rm -rf $(VENV) build

# ---------------------------------------------------------------------------------------------------------------------
# The environment. One stamp per amount of tools: demo (run it) < test (test it) < dev (all). A stamp is renewed when
# pyproject.toml changed or when a file was added to or removed from the package: the link tree of a strict editable
# installation (build/__editable__*) holds one link per file.

# Rewritten only when the list of files really changed, so that it does not make the stamps old every time.
$(STAMPS)/files: FORCE | $(STAMPS)/python
	@$(PACKAGE_FILES) | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@ && [ -e build/tree ]; then rm $@.new; else mv $@.new $@; fi

$(STAMPS)/python:
	@VENV="$(VENV)" PYTHON="$(PYTHON)" bash .ci/create_venv
	@mkdir -p $(STAMPS) && touch $@

# $(call install,EXTRAS,LINE FOR THE READER)
define install
	@echo "==> installing lightning-robust[$(1)] into $(VENV) ($(2))"
	@rm -rf build/__editable__*
	@$(BIN)/python -m pip install --quiet "pip>=23.1" "setuptools>=77"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --config-settings editable_mode=strict -e ".[$(1)]"
	@ln -sfn "$$(cd build && ls -d __editable__*)" build/tree
endef

# Without any index work when the tools are there already: a file was added, only the links are renewed.
$(STAMPS)/demo: pyproject.toml $(STAMPS)/files
	$(call install,plot,the default build of PyTorch is a download of several GB the first time)
	@touch $@

$(STAMPS)/test: pyproject.toml $(STAMPS)/files
	$(call install,test,the default build of PyTorch is a download of several GB the first time)
	@touch $(STAMPS)/demo $@

$(STAMPS)/dev: pyproject.toml $(STAMPS)/files
	$(call install,dev,everything a contributor needs)
	@touch $(STAMPS)/demo $(STAMPS)/test $@
