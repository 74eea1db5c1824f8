# `make run` and `make test` need only Python 3.11, make and git; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help run test faults lint format crd install-manifest scan clean
.DEFAULT_GOAL := help

help: ## show this
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Kept apart from .venv itself: an installation that was cut off leaves no stamp and is completed next time.
.venv/ready: pyproject.toml
	@echo "setting up .venv (PyTorch is 3 GB: about two minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[operator,trainer,dev]'
	@touch $@

run: .venv/ready ## train the quickstart job here: a small InternLM on the standard library's sources
	@$(BIN)/internlm run manifests/examples/quickstart.yaml

test: .venv/ready lint ## run all tests; those that this machine cannot run say why
	@$(BIN)/pytest --numprocesses=2

faults: .venv/ready ## hurt jobs in every way on a real cluster (half an hour) and write docs/recovery-times.md
	@INTERNLM_RECOVERY_TIMES=docs/recovery-times.md $(BIN)/pytest -m faults tests/e2e/test_faults.py

lint: .venv/ready ## check format, lint, types and layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: .venv/ready ## format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

crd: .venv/ready ## write the CRD from the models
	@$(BIN)/python -m internlm_operator.crd

install-manifest: .venv/ready ## write manifests/install.yaml, the chart's README and golden renders from the chart
	@$(BIN)/python manifests/install.py

.venv/scanners/ready:
	@$(PYTHON) -m venv .venv/scanners
	@.venv/scanners/bin/python -m pip install --quiet --disable-pip-version-check bandit checkov pip-audit
	@touch $@

# What pip-audit looks up: the packages of .venv, or those of an image (docs/security.md). Strict: what it cannot look
# up is an error, or a machine without access to the index would find everything well.
INSTALLED ?= .venv/installed.txt

scan: .venv/ready .venv/scanners/ready ## look for weaknesses in code, manifests and dependencies (docs/security.md)
	@.venv/scanners/bin/bandit --quiet --recursive --configfile pyproject.toml operator trainer manifests
	@.venv/scanners/bin/checkov --config-file .checkov.yaml
	@$(BIN)/python -m pip freeze --exclude-editable > .venv/installed.txt
	@.venv/scanners/bin/pip-audit --strict --disable-pip --no-deps --requirement $(INSTALLED)

clean: ## remove the environment and what the quickstart wrote
	rm -rf .venv runs

include tests/cluster/cluster.mk
