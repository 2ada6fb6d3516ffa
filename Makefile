# Every target sets itself up: Python 3.11 or later and pip are all a machine needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := .demo

.DEFAULT_GOAL := help
.PHONY: help demo test docs clean

help:
	@echo "make demo   fetch a small model, export and build it, say where plan, bundle and report lie"
	@echo "make test   lint, format check, types, import contracts, tests"
	@echo "make docs   build the documentation site into build/docs"
	@echo "make clean  remove the virtual environment, the demo and all caches"
	@echo "PYTHON=...  the interpreter to set up with (now: $(PYTHON))"

# Installing twice is safe, so an interrupted installation is simply carried on.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (takes a minute or two)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[rtx,dev,docs]'
	@touch $@

# The command's last lines say where plan, bundle and report lie.
demo: $(INSTALLED)
	@mkdir -p $(DEMO)
	@model=$$($(BIN)/python benchmarks/fetch_models.py) && \
		echo "spike-export $$model --out $(DEMO)/engine.plan" && \
		$(BIN)/spike-export "$$model" --out $(DEMO)/engine.plan

test: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	PYTHONPATH=.links $(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest

# A broken link, a broken anchor or a reference to a missing name fails it.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "build/docs/index.html"

clean:
	rm -rf $(VENV) $(DEMO) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
