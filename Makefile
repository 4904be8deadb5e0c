# Every target sets itself up on a machine that has Python, make and a C compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FRAMEWORKS ?= .venv-frameworks
ARGS ?=
OUT ?= runs/compare-$(shell date +%Y%m%d-%H%M%S)

.PHONY: compare test test-all test-faults test-exactness test-frameworks test-wheel test-versions lint gate count-gate cpu-gate bench bench-gpu readme docs clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

compare: $(VENV)/.ready  ## train SGD and SAM side by side on digits, clean and with 40 % label noise
	$(BIN)/fastsam compare --out $(OUT) $(ARGS)

test: $(VENV)/.ready  ## run every test
	$(BIN)/python -m pytest -n auto --dist loadgroup $(ARGS)

test-faults: $(VENV)/.ready  ## cut 5,000 steps short by exceptions and 500 by Ctrl-C; figures in build/faults.json
	OMP_NUM_THREADS=1 $(BIN)/python tests/run_faults.py $(ARGS)

# the tests that hold results to a bound on their error; planted faults do not depend on the processor
EXACTNESS := $(addprefix tests/kernels/,test_error_bounds.py test_reference.py test_ema.py \
	$(addprefix test_kernels.py::,test_norm test_perturb_and_restore) \
	$(addprefix test_kernel_steps.py::,test_sgd test_adam test_states_and_gradients_of_other_dtypes) \
	$(addprefix test_trajectory_loss.py::,test_few_classes test_targets test_teacher test_logits_far_apart))

test-fuzz: $(VENV)/.ready  ## 1,000 generated sets of arguments and 2,000 random orders of calls; figures in build/fuzz.json
	$(BIN)/python -m pytest -q tests/fuzz --hypothesis-profile=full --hypothesis-seed=13 $(ARGS)

test-exactness: $(VENV)/.ready  ## tests of exactness with the code that torch has for processors without AVX-512, or AVX2
	for capability in avx2 default; do \
		ATEN_CPU_CAPABILITY=$$capability $(BIN)/python -m pytest -n auto -q $(EXACTNESS) \
			-k "not loss_of_accuracy and not fast_instructions" $(ARGS) || exit 1; \
	done

lint: $(VENV)/.ready  ## style and types; mypy sees kernels/ where it is installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types && cp -r fastsam build/types/ && cp -r kernels build/types/fastsam/
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p fastsam

gate: $(VENV)/.ready  ## compile every Triton kernel for GPUs that need not be here and compare with the baseline
	$(BIN)/python -m benchmarks gate static $(ARGS)

count-gate: $(VENV)/.ready  ## launches, operations and host reads of a step of every method, against the record
	$(BIN)/python -m benchmarks gate count $(ARGS)

cpu-gate: $(VENV)/.ready  ## CPU time and memory traffic beside eager SAM and the base optimizer, within bounds
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks gate cpu $(ARGS)

readme: $(VENV)/.ready  ## write README's table anew from the recorded results
	$(BIN)/python -m benchmarks readme

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

docs: $(VENV)/.docs  ## the site of docs/ and of the docstrings, into build/site; a broken link or anchor is an error
	rm -rf build/site
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/site $(ARGS)

bench: $(VENV)/.ready  ## pytest-benchmark suites, each function beside a reference, against the record of their ratios
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks -q --benchmark-only --benchmark-columns=min,median,iqr $(ARGS)

bench-gpu: $(VENV)/.ready  ## with a GPU: the kernels' tests, their bandwidth and whole steps, beside the record
	# where it cannot be fetched its arms are listed as not run
	-$(BIN)/pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks gate gpu $(ARGS)

test-all: $(VENV)/.ready  ## every law of the methods in the full product of methods, bases and ways
	$(BIN)/python -m pytest -n auto --all-cells tests/common $(ARGS)

$(FRAMEWORKS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/pip install --quiet -c constraints.txt torch
	$(FRAMEWORKS)/bin/pip install --quiet -c constraints.txt -e ".[dev,frameworks]"
	touch $@

test-frameworks: $(FRAMEWORKS)/.ready  ## training frameworks beside loops written by hand, in an environment of their own
	OMP_NUM_THREADS=1 $(FRAMEWORKS)/bin/python -m pytest -q -n 2 --dist loadgroup tests/frameworks $(ARGS)

test-wheel: $(VENV)/.ready  ## build the wheel and run the optimizer tests on it, outside the tree
	rm -rf build/wheel && mkdir -p build/wheel && cp -r pyproject.toml README.md LICENSE fastsam kernels build/wheel/
	cd build/wheel && $(abspath $(BIN))/pip wheel --quiet --no-deps --no-build-isolation -w . .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --quiet --no-deps build/wheel/*.whl
	# borrow the dependencies but not the editable install: a .pth in a borrowed folder is not read
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(build/wheel/venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth
	outside=$$(mktemp -d) && cp -r tests $$outside/ && cp pyproject.toml $$outside/options.toml && cd $$outside && \
		$(abspath build/wheel/venv/bin/python) -m pytest -n auto -q -c options.toml --rootdir . \
		tests/common/test_equation.py tests/common/test_restore.py tests/common/test_resume.py tests/common/test_protocols.py -k "not triton" && \
		rm -rf $$outside

test-versions:  ## the tests on the lowest versions that pyproject.toml claims and on some between; needs Python 3.10 and 3.12
	$(PYTHON) tests/packaging/versions.py $(ARGS)

clean:
	rm -rf build dist runs .venv $(FRAMEWORKS) .mypy_cache .pytest_cache .ruff_cache *.egg-info
