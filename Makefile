# `make demo` and `make test` need Python 3.10-3.12 and nothing else; both set up .venv first.
PYTHON ?= python3
# Extra arguments for pip, such as an index with CPU-only builds of torch.
PIP_ARGS ?=
FUZZ_SECONDS ?= 60
BIN := .venv/bin
TOOLS := .cache/tools/bin
PIP := $(BIN)/python -m pip install $(PIP_ARGS) --disable-pip-version-check -q

SOAK_MINUTES ?= 60

.PHONY: setup demo test test-slow test-studio fuzz fuzz-guided soak lock sbom audit lint types clean

setup: .venv/ready

# torch, triton and setuptools come first: the build of torch may be chosen, such as a CPU build from another index, so
# it has no hash. Everything else must have a hash of requirements.lock.
.venv/ready: pyproject.toml constraints.txt requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13) and "Python 3.10-3.12 is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt torch setuptools 'triton>=3.6; sys_platform == "linux"'
	$(PIP) --require-hashes --no-deps -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
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
# `make test-studio STUDIO_TESTS=browser` also drives the shipped base, which takes minutes.
STUDIO_TESTS ?= browser and not slow
test-studio: .venv/ready
	command -v chromium chromium-browser google-chrome >/dev/null || (apt-get update && apt-get install -y chromium)
	$(PIP) -c constraints.txt -e '.[browser]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '$(STUDIO_TESTS)' tests/studio/browser

# Minutes and gigabytes: engines of the shipped base and of a full-size base, exports that leave the cache of graphs aside.
test-slow: .venv/ready
	$(BIN)/python -m pytest -m 'slow and not browser'

# Damaged files for every reader; fails with the file's number and a traceback.
fuzz: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py --seconds $(FUZZ_SECONDS)

# The same readers, guided by the coverage of the code. FUZZ_SECONDS is the time for each reader.
fuzz-guided: .venv/ready
	$(PIP) -c constraints.txt atheris
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz_guided.py --seconds $(FUZZ_SECONDS)

# Restores with several plans in turn; fails if a result changes, the memory grows or handles stay open.
soak: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py --minutes $(SOAK_MINUTES)

# Tools for the dependencies, in an environment of their own, so that they are in none of the lists.
.cache/tools/ready: Makefile
	$(PYTHON) -m venv .cache/tools
	$(TOOLS)/python -m pip install $(PIP_ARGS) --disable-pip-version-check -q \
		uv==0.13.9 cyclonedx-bom==7.5.0 pip-licenses==5.5.5 pip-audit==2.10.1
	touch $@

# The versions and hashes that `make setup` installs, for all supported systems and versions of Python.
lock: .cache/tools/ready
	$(TOOLS)/uv pip compile pyproject.toml --extra all --extra dev --universal --python-version 3.10 \
		--generate-hashes -c constraints.txt --no-header --no-annotate --default-index https://pypi.org/simple \
		--no-emit-package torch --no-emit-package triton --no-python-downloads -q -o requirements.lock

# All installed packages (CycloneDX), and their licences.
sbom: .venv/ready .cache/tools/ready
	$(TOOLS)/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o sbom.json
	@printf '# Licences\n\nLicences of the packages that `make setup` installs, from their metadata. `make sbom` writes this page.\n\n' \
		> docs/licences.md
	$(TOOLS)/pip-licenses --python $(BIN)/python --from=mixed --format=markdown | tr -s ' -' >> docs/licences.md

# Known vulnerabilities of the locked packages. `--strict`: without an answer of PyPI about a package, pip-audit would
# leave the package out and report success.
audit: .cache/tools/ready
	@$(TOOLS)/pip-audit --strict --require-hashes --disable-pip -r requirements.lock || { echo \
		'audit failed: a vulnerability was found, or PyPI did not answer for every package; see the lines above' >&2; exit 1; }

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

clean:
	rm -rf .venv .cache build dist *.egg-info demo
