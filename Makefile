# Every target sets up .venv when it is not there or older than pyproject.toml; nothing else is needed than Python 3.10+.
PYTHON ?= python3
VENV ?= .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
READY := $(VENV)/.ready
# Two processes of one thread each; tests/conftest.py says which tests stay together.
PYTEST := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder

.PHONY: help setup demo test test-full test-matrix lint bench bench-fusion clean

help:
	@echo "make demo       phantom PET/CT -> nnU-Net dataset -> train, predict, ensemble, score (demo_output/)"
	@echo "make test       the tests (15 minutes on 2 slow cores)"
	@echo "make test-full  the tests for every feature and network"
	@echo "make test-matrix  the tests with nnU-Net 2.8.0 and the newest 2.x (TESTS=tests/training: some)"
	@echo "make lint       ruff"
	@echo "make bench      benchmarks"
	@echo "make bench-fusion  which network makes the most of two modalities (hours; goes on where it was)"
	@echo "make clean      remove .venv and outputs"

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# pip compiles on one core, and tests as well: half of the time of the installation.
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev]"
	$(BIN)/python -c "import compileall, re, sysconfig; compileall.compile_dir(sysconfig.get_paths()['purelib'], quiet=2, workers=0, rx=re.compile('[^a-z_](tests?|_internal)[^a-z_]'))"
	$(BIN)/python -c "import pathlib; pathlib.Path('$(READY)').touch()"

demo: $(READY)
	$(BIN)/h2a_demo -o demo_output

test test-full test-matrix: export OMP_NUM_THREADS = 1
test test-full test-matrix bench-fusion: export OMP_WAIT_POLICY = PASSIVE

test: $(READY)
	$(PYTEST) -m "not full" --durations=40 --durations-min=10

test-full: $(READY)
	$(PYTEST) --durations=12

test-matrix: $(READY)
	$(BIN)/python tests/matrix.py -n 2 --no-loadscope-reorder $(TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python benchmarks/networks.py
	$(BIN)/python benchmarks/networks.py --patch 256 256
	$(BIN)/python benchmarks/selective_scan.py
	$(BIN)/python benchmarks/conversion.py --repeats 1

bench-fusion: $(READY)
	$(BIN)/python benchmarks/fusion.py --table docs/fusion.md

clean:
	$(PYTHON) -c "import shutil; [shutil.rmtree(p, ignore_errors=True) for p in ('$(VENV)', '.matrix', 'demo_output', 'fusion_benchmark', 'build', 'dist')]"
