# Every target sets itself up: Python 3.11 or later and pip are all a machine needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := .demo
FUZZ_SECONDS ?= 600

# Both ends of the ranges in pyproject.toml. torch keeps the version of constraints.txt unless TORCH names another:
# a newer build brings several GB of CUDA libraries on Linux.
NEWEST := .venv-newest
LOWEST := .venv-lowest
SBOM := .venv-sbom
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)

# Without compiled files each process that the tests start compiles the project again: a second of a processor each time.
unexport PYTHONDONTWRITEBYTECODE

# What dependencies compute, read and write; the job first, which fails on a single warning. Tests of the compiler, of
# plans and of the command line's texts depend on few versions and are left to `make test`.
ENDS := tests/cli/test_job.py tests/artifacts tests/checkpoint tests/calibration tests/export \
	tests/engines/generation tests/engines/onnx_runtime

# A file's tests stay in one process, for its fixtures' sake; the longest files come first. Each process holds a model.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz mutants test-newest test-lowest chaos sbom licences docs clean

help:
	@echo "make demo   fetch a small model, export and build it, say where plan, bundle and report lie"
	@echo "make test   lint, format check, types, import contracts, tests"
	@echo "make fuzz   give damaged files to their readers and to whole commands, for FUZZ_SECONDS (now: $(FUZZ_SECONDS))"
	@echo "make test-newest, make test-lowest"
	@echo "            tests and main job with the newest and the lowest versions that pyproject.toml allows"
	@echo "make mutants"
	@echo "            change the core in one place at a time, and see whether a test notices (three quarters of an hour)"
	@echo "make chaos  kill, interrupt and starve the whole job at random moments, and resume it (a quarter of an hour)"
	@echo "make sbom   write the bill of materials of the virtual environment to build/sbom.json (CycloneDX)"
	@echo "make licences"
	@echo "            list the licences of all dependencies in docs/licences.md; an unknown one fails"
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
	PYTHONPATH=.links $(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest $(PARALLEL)

# What failed is kept in .fuzz and tried first the next time.
fuzz: $(INSTALLED)
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest tests/fuzz -q -p no:cacheprovider

test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -qq --disable-pip-version-check torch==$(TORCH)
	$(NEWEST)/bin/python -m pip install -qq --disable-pip-version-check --upgrade --upgrade-strategy eager \
		torch==$(TORCH) -e '.[rtx,dev]'
	$(NEWEST)/bin/python -m pip freeze --disable-pip-version-check --exclude-editable
	$(NEWEST)/bin/python -m pytest -m 'not model' $(ENDS)

# uv resolves, pip installs: torch is excluded from the resolution and lies in the environment before.
test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check torch==$(TORCH) uv
	echo torch > $(LOWEST)/excludes.txt
	$(LOWEST)/bin/uv pip compile -q --python $(LOWEST)/bin/python --resolution lowest-direct --no-annotate \
		--excludes $(LOWEST)/excludes.txt --extra rtx --extra dev -o $(LOWEST)/resolved.txt pyproject.toml
	$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check -r $(LOWEST)/resolved.txt
	$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	$(LOWEST)/bin/python -m pip freeze --disable-pip-version-check --exclude-editable
	$(LOWEST)/bin/python -m pytest -m 'not model' $(ENDS)

# Options, such as MUTANTS='export --count 300', are those of the program. Its operators are mutmut's, which nothing else
# needs; the seconds are those of each of five targets.
mutants: $(INSTALLED)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt mutmut==3.8.1
	$(BIN)/python -m pytest -q tests/mutants
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants --seconds 540 $(MUTANTS)

# Options, such as CHAOS='--kills 200 --seed 7', are those of the program.
chaos: $(INSTALLED)
	$(BIN)/python -m tests.support.chaos $(CHAOS)

# In an environment of its own, so that the bill does not list the program that writes it.
sbom: $(INSTALLED)
	$(PYTHON) -m venv $(SBOM)
	$(SBOM)/bin/python -m pip install -qq --disable-pip-version-check cyclonedx-bom==7.5.0
	@mkdir -p build
	$(SBOM)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON \
		-o build/sbom.json $(BIN)/python

licences: $(INSTALLED)
	$(BIN)/python -m benchmarks.licences docs/licences.md

# A broken link, a broken anchor or a reference to a missing name fails it.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "build/docs/index.html"

clean:
	rm -rf $(VENV) $(NEWEST) $(LOWEST) $(SBOM) $(DEMO) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
