# CONTRIBUTING.md says what each target does. Every target first makes the environment in .venv;
# site and test-browser put requirements-site.txt in it too, test-floors and test-python make one of
# their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
WORKERS ?= 2
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=900

# Notebooks are tested and published on one thread each: how many there are decides how sums are rounded, and so what a training becomes.
test test-notebooks publish: export OMP_NUM_THREADS := 1

.PHONY: tutorial test test-notebooks test-arithmetics test-browser test-colab test-wheel \
        test-floors test-python gpu bench lab site publish lint clean

$(VENV)/installed: requirements.txt $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt -c $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --no-deps -e . open-mythos==0.5.0
	touch $@

$(VENV)/site: $(VENV)/installed requirements-site.txt
	$(BIN)/python -m pip install --quiet -r requirements-site.txt -c $(CONSTRAINTS)
	touch $@

tutorial: $(VENV)/installed
	MYTHOS_FIGURES=$(CURDIR)/build/figures $(BIN)/mythos batch $(NOTEBOOKS) --workers $(WORKERS) --out build/tutorial

# Notebooks first: by itself xdist begins with the files of most tests, and ends with one worker at a notebook that trains.
test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder notebooks tests \
	    --ignore tests/browser --ignore tests/notebooks/test_colab.py $(NBVAL) -m "not training and not wheel"

test-notebooks: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/notebooks/test_notebooks.py notebooks $(NBVAL)

# What trains, under other arithmetics that this processor can do; ONLY=NAME for one of them, FILES=... for some tests.
test-arithmetics: $(VENV)/installed
	$(BIN)/python tests/arithmetics.py --workers $(WORKERS) $(if $(ONLY),--only $(ONLY)) $(FILES)

test-browser: site
	$(BIN)/python -m pytest tests/browser

test-colab: $(VENV)/installed
	$(BIN)/python -m pytest tests/notebooks/test_colab.py

test-wheel: $(VENV)/installed
	$(BIN)/python -m pytest tests/house/test_wheel.py

# The oldest of everything that requirements.txt allows; `make test-floors PYTHON=python3.10` for the oldest Python too.
test-floors: build/floors.txt
	$(MAKE) test VENV=build/floors CONSTRAINTS=$<

build/floors.txt: requirements.txt
	mkdir -p build
	sed 's/>=/==/' $< > $@

# The newest of everything; `make test-python PYTHON=python3.13` for another Python.
test-python: build/newest.txt
	$(MAKE) test VENV=build/$(notdir $(PYTHON)) CONSTRAINTS=$<

build/newest.txt:
	mkdir -p build
	touch $@

# With the PyTorch that PYTHON has: its packages are seen, and only what is missing is installed.
GPU := build/gpu-env
CUDA := import torch; raise SystemExit(not torch.cuda.is_available())
gpu:
	@if $(PYTHON) -c "$(CUDA)"; then $(MAKE) $(GPU)/installed && $(GPU)/bin/python tests/gpu.py; \
	else echo "$(PYTHON) has no PyTorch that finds a CUDA device: nothing to do"; fi

$(GPU)/installed: requirements.txt
	$(PYTHON) -m venv $(GPU)
	$(PYTHON) -c "import site; print(*site.getsitepackages(), sep='\n')" \
	    > $$(echo $(GPU)/lib/python*/site-packages)/beside.pth
	$(GPU)/bin/python -m pip install --quiet -r requirements.txt
	$(GPU)/bin/python -m pip install --quiet --no-deps -e . open-mythos==0.5.0
	touch $@

bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet x-transformers==2.31.10 -c $(CONSTRAINTS)
	MYTHOS_FIGURES=$(CURDIR)/figures $(BIN)/python -m pytest tests/bench

lab: $(VENV)/installed
	$(BIN)/python -m jupyter lab notebooks

site: $(VENV)/site
	$(BIN)/python notebooks/site/build.py build/site

publish: $(VENV)/installed
	rm -rf build/publish
	MYTHOS_FIGURES=$(CURDIR)/figures $(BIN)/python figures/architecture.py
	MYTHOS_FIGURES=$(CURDIR)/figures $(BIN)/mythos batch $(NOTEBOOKS) --workers $(WORKERS) --out build/publish --publish
	$(BIN)/python tests/gate.py > figures/arithmetic.txt

lint: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-logo --no-cache

clean:
	rm -rf .venv build
