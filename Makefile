# Every target installs what it needs into .venv and works from a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
WORKERS ?= 2

.PHONY: quickstart test test-all test-browser test-faults lint format site clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/installed-lint: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --editable ".[lint]"
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

quickstart: $(VENV)/installed  ## the main job on the shipped nano Janus, CPU, three minutes
	JAX_PLATFORMS=cpu $(BIN)/python -m corl_jax.quickstart --out $(OUT)

test: $(VENV)/installed-dev  ## style and the tests that CI runs
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not slow and not browser" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/installed-dev  ## every test but those in a browser
	$(BIN)/python -m pytest -m "not browser"

test-browser: $(VENV)/installed-dev  ## the page of a report in the browser CHROMIUM=PATH
	CHROMIUM="$(CHROMIUM)" $(BIN)/python -m pytest tests/report/test_browser.py

test-faults: $(VENV)/installed-dev  ## kills, full disks, corrupt files: the table of what was survived
	$(BIN)/python -m pytest tests/faults tests/devices/test_several_processes.py

lint: $(VENV)/installed-lint  ## style and types; also as hooks: pre-commit install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

site: $(VENV)/installed-docs  ## the documentation as pages in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) runs .cache site
