# `make demo` and `make test` need Python 3.10-3.12 and nothing else; both set up .venv first.
PYTHON ?= python3
# Extra arguments for pip, such as an index with CPU-only builds of torch.
PIP_ARGS ?=
FUZZ_SECONDS ?= 60
BIN := .venv/bin
PIP := $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt --disable-pip-version-check -q

.PHONY: setup demo test test-slow test-studio fuzz lint types clean

setup: .venv/ready

# torch comes first: the build of torch that is installed already is kept, for example a CPU build from another index.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13) and "Python 3.10-3.12 is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(PIP) torch setuptools
	$(PIP) -e '.[all,dev]'
	touch $@

demo: .venv/ready
	$(BIN)/pfstorer-rt demo -o demo

# ruff takes a second and comes first; mypy takes a minute without its cache and runs beside the tests.
# One test process for each core, with one thread each, is faster than one process with all threads.
test: lint
	@$(BIN)/mypy > .venv/mypy.log 2>&1 & mypy=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --durations=15; tests=$$?; \
	wait $$mypy || { cat .venv/mypy.log; exit 1; }; exit $$tests

# The page of the studio in headless Chromium. Chromium comes from the system, and is installed where apt and root exist.
test-studio: .venv/ready
	command -v chromium chromium-browser google-chrome >/dev/null || (apt-get update && apt-get install -y chromium)
	$(PIP) -e '.[browser]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/studio/browser

# Minutes and gigabytes: engines of a full-size base, exports that leave the cache of graphs aside.
test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

# Damaged files for every reader; fails with the file's number and a traceback.
fuzz: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py --seconds $(FUZZ_SECONDS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

clean:
	rm -rf .venv .cache build dist *.egg-info demo
