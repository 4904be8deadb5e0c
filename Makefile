# Every target sets itself up on a machine that has Python, make and a C compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: compare test lint bench wheel clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

compare: $(VENV)/.ready  ## train SGD and SAM side by side on digits, clean and with 40 % label noise
	$(BIN)/fastsam compare $(ARGS)

test: $(VENV)/.ready  ## run every test
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(VENV)/.ready  ## style and types; mypy sees kernels/ where it is installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types && cp -r fastsam build/types/ && cp -r kernels build/types/fastsam/
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p fastsam

bench: $(VENV)/.ready  ## pytest-benchmark suites
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

wheel: $(VENV)/.ready  ## build the wheel and the source distribution
	rm -rf build dist && $(BIN)/python -m build --quiet

clean:
	rm -rf build dist runs .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info
