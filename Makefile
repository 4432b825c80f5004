# make run and make test do all of their own set-up: Python environment, dependencies, and, as root, the tests' peers.

VENV ?= .venv
PYTHON_IN = $(VENV)/bin/python
CMD ?=
ARGS ?=

RUN_STAMP = $(VENV)/.run.stamp
DEV_STAMP = $(VENV)/.dev.stamp

.DEFAULT_GOAL := help
.PHONY: help run test check bench clean

help:
	@echo 'make run                   show the gateway at work, on embedded defaults, harmless to this machine'
	@echo "make run CMD='curl -sI …'  run that command with all its traffic through the gateway"
	@echo 'make test                  run every test that this machine allows, and say what was skipped and why'
	@echo '                           (ARGS=… goes to pytest)'
	@echo 'make check                 lint, format and types: ruff and mypy --strict'
	@echo 'make bench                 measure the gateway beside the bare kernel (root)'
	@echo 'make clean                 remove the environment, caches and build output'

# The command reaches Python through the environment, so that no quoting of it is lost on the way.
run: export RINGWAY_DEMO_COMMAND = $(value CMD)
run: $(RUN_STAMP)
	@$(if $(value CMD),$(PYTHON_IN) -m gateway.demo --shell "$$RINGWAY_DEMO_COMMAND",$(PYTHON_IN) -m gateway.demo)

test: $(DEV_STAMP)
	@sh .ci/peers $(VENV)/.peers-missing
	@$(PYTHON_IN) -m pytest -rs $(ARGS)

check: $(DEV_STAMP)
	$(PYTHON_IN) -m ruff check .
	$(PYTHON_IN) -m ruff format --check .
	$(PYTHON_IN) -m mypy --strict gateway workers ipc
	$(PYTHON_IN) -m mypy tests

bench: $(DEV_STAMP)
	@sh .ci/peers $(VENV)/.peers-missing
	@$(PYTHON_IN) -m tests.bench $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN_STAMP): pyproject.toml .ci/environment
	@if [ $(DEV_STAMP) -nt pyproject.toml ] && [ $(DEV_STAMP) -nt .ci/environment ]; then :; else sh .ci/environment $(VENV); fi
	@touch $@

$(DEV_STAMP): pyproject.toml .ci/environment
	@sh .ci/environment $(VENV) '[dev]'
	@touch $@
