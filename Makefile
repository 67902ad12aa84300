# Everything that is done with this repository. `make demo` is the place to start.
#
#   make demo             build .venv, then simulate, fit and plot into demo/
#   make test             the default tests              ARGS="tests/test_x.py -k name" narrows them
#   make test-slow        the slow tests alone
#   make test-lowest      the default tests with the oldest versions that are supported, in .venv-lowest
#   make reliability      fits killed 50 times, a full disk, memory over 10,000 steps: minutes; tests/reliability/README.md
#   make test-new-python  the default tests on Python 3.12 or 3.13, in .venv-new    NEW_PYTHON=... chooses
#   make fuzz             100,000 hostile files, for every reader      FUZZ_CASES=1000 for fewer
#   make lint types       ruff, mypy
#   make notebooks        run every notebook in its short form; notebooks-new-python on the newer Python
#   make wheel-check      build the wheel, install it apart from this tree, import every module of it
#   make demo-locked      the demo from files whose hashes are known, demo.lock, in .venv-locked
#   make sbom             a bill of materials of .venv: sbom.json, CycloneDX
#   make bench            the benchmarks: a table each, and JSON into bench/    BENCHMARKS=, ARGS= narrow them
#   make clean distclean  remove what was generated; the environments too

SHELL := bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
NEW_VENV ?= .venv-new
LOWEST_VENV ?= .venv-lowest
LOCKED_VENV ?= .venv-locked
SBOM_VENV ?= .venv-sbom
WORKERS ?= 2
ARGS ?=
FUZZ_CASES ?= 100000

BIN := $(VENV)/bin
# One thread for each process: small recurrent products are slower on two.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
BENCHMARKS := $(sort $(filter-out tests/benchmarks/_%,$(wildcard tests/benchmarks/*.py)))

.PHONY: help venv demo demo-locked sbom test test-slow test-new-python test-lowest reliability fuzz lint types notebooks notebooks-new-python wheel-check bench clean distclean

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

# $(1): the folder of an environment. Setuptools comes first, so that the pinned one builds the package.
define install
@echo "installing into $(1), as constraints.txt says"
@$(1)/bin/python -m pip install --quiet --constraint constraints.txt setuptools
@$(1)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
    --editable ".[dev,notebooks,nwb,zarr]"
@touch $(1)/.installed
endef

# $(1): the folder of an environment.
define run_notebooks
@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && for notebook in $(NOTEBOOKS); do \
    $(ONE_THREAD) METASSM_SHORT=1 MPLBACKEND=agg JUPYTER_PREFER_ENV_PATH=1 $(1)/bin/python -m nbconvert \
        --log-level WARN --execute --to notebook --output-dir "$$out" $$notebook || exit 1; \
done
@echo "$(words $(NOTEBOOKS)) notebooks ran"
endef

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(call install,$(VENV))

$(NEW_VENV)/.installed: pyproject.toml constraints.txt
	python=$$(.ci/new-python) && "$$python" -m venv $(NEW_VENV)
	$(call install,$(NEW_VENV))

demo: venv
	$(BIN)/metassm demo --out demo

# With hashes pip takes nothing else, and builds nothing; the package itself is built with the setuptools of the lock.
$(LOCKED_VENV)/.installed: demo.lock pyproject.toml
	$(PYTHON) -m venv $(LOCKED_VENV)
	$(LOCKED_VENV)/bin/python -m pip install --quiet --require-hashes --only-binary :all: --requirement demo.lock
	$(LOCKED_VENV)/bin/python -m pip install --quiet --no-deps --no-index --no-build-isolation .
	@touch $@

demo-locked: $(LOCKED_VENV)/.installed
	$(LOCKED_VENV)/bin/metassm demo --out demo

# The tool has an environment of its own: it is no part of what it lists.
$(SBOM_VENV)/.installed:
	$(PYTHON) -m venv $(SBOM_VENV)
	$(SBOM_VENV)/bin/python -m pip install --quiet cyclonedx-bom==7.5.0
	@touch $@

sbom: venv $(SBOM_VENV)/.installed
	$(SBOM_VENV)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	    --output-file sbom.json $(BIN)/python

test: venv
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

# pytest's status 5 says that no test is marked slow.
test-slow: venv
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) -m slow $(ARGS) || [ $$? -eq 5 ]

test-new-python: $(NEW_VENV)/.installed
	$(ONE_THREAD) $(NEW_VENV)/bin/python -m pytest -n $(WORKERS) $(ARGS)

# Python 3.11. Old releases use what is deprecated by now, so warnings are not errors here.
$(LOWEST_VENV)/.installed: pyproject.toml lowest.txt
	$(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/python -m pip install --quiet "setuptools==77.0.3"
	$(LOWEST_VENV)/bin/python -m pip install --quiet --constraint lowest.txt --no-build-isolation --editable ".[dev,nwb,zarr]"
	@touch $@

test-lowest: $(LOWEST_VENV)/.installed
	$(ONE_THREAD) $(LOWEST_VENV)/bin/python -m pytest -n $(WORKERS) -o filterwarnings=default $(ARGS)

# The full forms of what the default tests do in short; the figures go into tests/reliability/README.md.
reliability: venv
	$(BIN)/python tests/reliability/kills.py --kills 50
	$(BIN)/python tests/reliability/memory.py --num-steps 10000
	$(BIN)/python tests/reliability/full_disk.py
	METASSM_CASES=400 $(ONE_THREAD) $(BIN)/python -m pytest -m slow tests/reliability/test_numbers.py

fuzz: venv
	$(ONE_THREAD) $(BIN)/python tests/reliability/fuzz.py --cases $(FUZZ_CASES)

lint: venv
	$(BIN)/ruff check .

types: venv
	$(BIN)/mypy

notebooks: venv
	$(call run_notebooks,$(VENV))

# The same on the newer Python, which comes with ArviZ 1.x.
notebooks-new-python: $(NEW_VENV)/.installed
	$(call run_notebooks,$(NEW_VENV))

wheel-check: venv
	.ci/wheel-check $(BIN)/python

bench: venv
	@set -e; for script in $(BENCHMARKS); do \
	    echo "== $$script"; \
	    $(BIN)/python "$$script" --json "bench/$$(basename "$$script" .py).json" $(ARGS); \
	done

clean:
	rm -rf bench build dist demo sbom.json bifurcations* limit_cycles* harder* *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find pyro_metassm models guides tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(NEW_VENV) $(LOWEST_VENV) $(LOCKED_VENV) $(SBOM_VENV)
