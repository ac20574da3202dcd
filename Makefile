# What people and CI run. `make demo` and `make test` do everything on a machine with Python 3.11 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
LINES ?= 500000
WHAT ?= sign
JOBS ?= auto
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test check bench proto clean
help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##/make \1:/p' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## train, prune, build, serve and score on real processes; DATA=file for your own Criteo lines, LINES=n
	@$(BIN)/python -m trainer_tools.demo --lines $(LINES) $(if $(DATA),--data '$(DATA)')

test: $(VENV)/.dev check  ## check, then every test: JOBS=n at a time, then one by one those that need the machine alone
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --maxprocesses 8 --dist worksteal -m 'not alone'
	@$(BIN)/python -m pytest -m alone

check: $(VENV)/.dev  ## format, lint, types, architecture, generated code in step
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_architecture.py tests/test_generated.py

bench: $(VENV)/.dev  ## WHAT=cube|hand_over|http_peers|lookup|overhead|rpc|serving|sign: measure, and write benchmarks/results/
	@$(BIN)/python -m benchmarks.$(WHAT)

proto: $(VENV)/.dev  ## generate the pb/ modules from proto/
	@$(BIN)/python tests/test_generated.py

clean:  ## remove the virtual environment and the demo's data
	rm -rf $(VENV) demo-data

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed: make PYTHON=python3.11 ...'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo 'Python cannot make virtual environments here; on Debian: apt-get install python3-venv'; \
	    test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo 'running that now, as root' && apt-get update -qq && apt-get install -y -qq python3-venv; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.made constraints.txt pyproject.toml
	@echo 'installing (once) ...'
	@$(PIP) --editable '.[torch]'
	@touch $@

$(VENV)/.dev: $(VENV)/.made constraints.txt pyproject.toml
	@echo 'installing (once) ...'
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.demo
