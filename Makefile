# Everything sets itself up: make and Python 3.10 to 3.13 are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_VENV := .venv-bench
BENCH_BIN := $(BENCH_VENV)/bin
BENCH_STAMP := $(BENCH_VENV)/.installed

# The pins were resolved on 3.11; some of them have no release for 3.10, which takes what pip resolves.
CONSTRAIN = $(shell $(1)/python -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')
pip_install = $(1)/python -m pip install --quiet --disable-pip-version-check --no-input $(call CONSTRAIN,$(1))
# Two workers fit two cores; tests that start Ray share one xdist_group, so one cluster runs at a time.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format bench bench-quick soak clean
.DELETE_ON_ERROR:

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:[^#]*## /|/' | awk -F'|' '{ printf "make %-12s %s\n", $$1, $$2 }'

setup: $(STAMP) ## make .venv and install the package with what its tests and demo need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 14) else "ray_ckpt needs Python 3.10 to 3.13, but $(PYTHON) is %d.%d: run make PYTHON=python3.11" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call pip_install,$(BIN)) -e '.[dev,demo]'
	@touch $@

# An environment of its own: the peers' frameworks are large, and no test needs them all.
$(BENCH_STAMP): pyproject.toml constraints.txt
	test -x $(BENCH_BIN)/python || $(PYTHON) -m venv $(BENCH_VENV)
	$(call pip_install,$(BENCH_BIN)) -e '.[bench]' torch==2.13.0
	@touch $@

demo: $(STAMP) ## train on four simulated hosts, lose one mid-save, go on with three
	$(BIN)/python examples/demo/run.py

test: check ## check, then every test that is not slow
	$(PYTEST) -m "not slow"

test-slow: $(STAMP) ## the slow tests
	$(PYTEST) -m slow

check: $(STAMP) ## lint, formatting, strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p ray_ckpt

format: $(STAMP) ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(BENCH_STAMP) ## measure against the alternatives, about two hours
	$(BENCH_BIN)/python -m benchmarks.run

bench-quick: $(BENCH_STAMP) ## is it as fast as it was? under 3 minutes
	$(BENCH_BIN)/python -m benchmarks.quick

soak: $(STAMP) ## kill everything for MINUTES (10) by a plan from SEED, while an oracle looks
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

clean: ## remove everything that make made
	rm -rf $(VENV) $(BENCH_VENV) build dist demo-output bench-data *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
