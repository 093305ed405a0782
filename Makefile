# make tutorial | test | test-notebooks | test-browser | test-colab | bench | lab | site | publish | lint | clean.  Every target first makes the environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
WORKERS ?= 1
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=300

.PHONY: tutorial test test-notebooks test-browser test-colab bench lab site publish lint clean

.venv/installed: requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps -e . open-mythos==0.5.0
	touch $@

tutorial: .venv/installed
	MYTHOS_FIGURES=$(CURDIR)/build/figures $(BIN)/python -m mythos_core.batch $(NOTEBOOKS) --workers $(WORKERS) --out build/tutorial

test: .venv/installed
	$(BIN)/python -m pytest tests notebooks --ignore tests/browser --ignore tests/test_colab.py $(NBVAL) -m "not training and not figures"

test-notebooks: .venv/installed
	$(BIN)/python -m pytest tests/test_notebooks.py notebooks $(NBVAL)

test-browser: site
	$(BIN)/python -m pytest tests/browser

test-colab: .venv/installed
	$(BIN)/python -m pytest tests/test_colab.py

bench: .venv/installed
	MYTHOS_FIGURES=$(CURDIR)/figures $(BIN)/python -m pytest tests/bench

lab: .venv/installed
	$(BIN)/python -m jupyter lab notebooks

site: .venv/installed
	$(BIN)/python notebooks/site/build.py build/site

publish: .venv/installed
	rm -rf build/publish
	MYTHOS_FIGURES=$(CURDIR)/figures $(BIN)/python figures/architecture.py
	MYTHOS_FIGURES=$(CURDIR)/figures $(BIN)/python -m mythos_core.batch $(NOTEBOOKS) --workers $(WORKERS) --out build/publish --publish

lint: .venv/installed
	$(BIN)/python -m ruff check .

clean:
	rm -rf .venv build
