# `make demo` and `make test` need Python 3.10-3.12 and nothing else; both set up .venv first.
PYTHON ?= python3
# Extra arguments for pip, such as an index with CPU-only builds of torch.
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: setup demo test test-slow tools lint types clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13) and "Python 3.10-3.12 is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt --disable-pip-version-check -q torch setuptools
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt --disable-pip-version-check -q -e '.[metrics,dev]'
	touch $@

demo: .venv/ready
	$(BIN)/pfstorer-rt demo -o demo

# The tests run OpenVINO, and build TensorRT-RTX engines, for which no GPU is needed.
tools: .venv/tools

.venv/tools: .venv/ready
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt --disable-pip-version-check -q -e '.[metrics,dev,openvino,tensorrt-rtx]'
	touch $@

# One process for each core, with one thread each, goes quicker than all threads in one process.
test: lint types tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# Minutes and gigabytes: engines of a full-size base.
test-slow: tools
	$(BIN)/python -m pytest -m slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info demo
