# Two commands are enough: `make demo` and `make test`. Each makes .venv and installs what it needs the first time.
#
#   make demo        the embedded model, start to end: vectors, steering curve, monitoring plot, sparse dictionary; ends
#                    with an HTML report in runs/demo
#   make test        the tests that fit a small machine
#   make test-slow   the long ones too
#   make lint        ruff and mypy
#
# Options: PYTHON=python3.12 (which interpreter), VENV=folder, OUT=folder of the demo's run,
#          TORCH_INDEX=URL (an index with a torch without CUDA: a far smaller download)

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
INSTALLED := $(VENV)/.stamp-installed
# Nothing here needs the network once it is installed; these make sure that nothing tries, or waits for it.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 MPLBACKEND=Agg
# A test process a core, whole files each, since fixtures are made once a file; more than four want more memory than laptops have.
# Slow tests measure, kill and start clusters: they run alone.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-slow lint install clean

demo: $(INSTALLED)
	$(OFFLINE) $(BIN)/pvsae demo --out $(OUT)

test: $(INSTALLED)
	$(OFFLINE) $(BIN)/python -m pytest -m "not slow" $(PARALLEL) --durations=10

test-slow: $(INSTALLED)
	$(OFFLINE) $(BIN)/python -m pytest --durations=20

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy pvsae analyses benchmarks

install: $(INSTALLED)

$(VENV)/.stamp-torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	touch $@

$(INSTALLED): $(VENV)/.stamp-torch pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find pvsae tests analyses benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
