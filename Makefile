# Everything runs from a bare checkout: each target first makes the virtual environment in .venv, if need be.

# The first Python on the path that is new enough; `make PYTHON=/path/to/python3.12 ...` names another one.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$python; break; }; \
	done)
# Installed before the rest, so that it can be chosen: `make TORCH="torch --index-url https://..." ...` takes another build.
TORCH ?= torch==2.13.0
BIN := .venv/bin
STAMP := .venv/.installed

DEMO_OUT ?= runs/demo
# Further options of `luffy demo`, such as `make demo DEMO="--steps 100 --link 100mbit"`.
DEMO ?=
# Seconds of the epoch from which the demo counts its time: a clone of the last hour, else now.
STARTED := $(shell now=$$(date +%s); cloned=$$(stat -c %Y .git/description 2>/dev/null || echo 0); \
	[ $$((now - cloned)) -lt 3600 ] && echo $$cloned || echo $$now)
PYTEST_OPTIONS ?=
# Processes that run tests side by side, a file of them each at a time: one a core, up to 8.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 8 ] && n=8; echo $$n)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help venv demo docs soak wheel test test-slow test-titan test-all test-multigpu check format clean bench-cpu bench-gpu bench-multigpu

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## make the virtual environment in .venv

# The stamp is touched last: an installation that broke off is begun again.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { \
		echo "luffy needs Python 3.11 or newer, and none is on the path: install one, or run 'make PYTHON=/path/to/python3.12'" >&2; \
		exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "luffy needs Python 3.11 or newer, and PYTHON=$(PYTHON) is not: name another one" >&2; exit 2; }
	@$(PYTHON) -m venv .venv || { \
		echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian: apt install python3-venv)" >&2; \
		exit 2; }
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## the case for Luffy in about two minutes: four recipes compared on a small model
	$(BIN)/luffy demo --out $(DEMO_OUT) --since $(STARTED) $(DEMO)

# With root, runs stand behind emulated links of these rates: `make BENCH_CPU_LINK=1gbit ...` takes another, an empty
# one none.
BENCH_CPU_LINK ?= $(shell [ "$$(id -u)" = 0 ] && echo 250mbit)
BENCH_GPU_LINK ?= $(shell [ "$$(id -u)" = 0 ] && echo 4gbit)
BENCH_RANKS ?= 8
BENCH_OPTIONS ?=

bench-cpu: $(STAMP)  ## a reduced set of the benchmarks, under 15 minutes on 2 cores
	$(BIN)/python benchmarks/run_all.py --small --device cpu --ranks 4 --steps 24 --budget-seconds 840 --out runs/bench-cpu \
		$(if $(BENCH_CPU_LINK),--link $(BENCH_CPU_LINK)) $(BENCH_OPTIONS)

bench-gpu: $(STAMP)  ## the full set, for as long as 9 minutes; call it again to continue
	$(BIN)/python benchmarks/run_all.py --device cuda --ranks $(BENCH_RANKS) --budget-seconds 540 --out runs/bench-gpu \
		$(if $(BENCH_GPU_LINK),--link $(BENCH_GPU_LINK)) $(BENCH_OPTIONS)

test: $(STAMP)  ## run the fast tests
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_OPTIONS)

test-slow: $(STAMP)  ## run only the longer tests
	$(PYTEST) -m "slow and not gpu" $(PYTEST_OPTIONS)

test-all: $(STAMP)  ## run every test that needs no GPU
	$(PYTEST) -m "not gpu" $(PYTEST_OPTIONS)

# torchtitan asks for another `datasets` than TRL does, so it has an environment of its own.
.venv-titan/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-titan
	.venv-titan/bin/python -m pip install --quiet $(TORCH)
	.venv-titan/bin/python -m pip install --quiet -e '.[titan]' triton pytest pytest-xdist hypothesis
	@touch $@

test-titan: .venv-titan/.installed  ## run the tests of torchtitan, in an environment that has it
	OMP_NUM_THREADS=1 .venv-titan/bin/python -m pytest -n $(WORKERS) --dist loadfile tests/titan $(PYTEST_OPTIONS)

SOAK_MINUTES ?= 15
SOAK_SEED ?= 0

soak: $(STAMP)  ## random faults for a quarter of an hour: nothing lost, nothing left behind, equal ends
	$(BIN)/python -m benchmarks.soak --minutes $(SOAK_MINUTES) --seed $(SOAK_SEED) --out runs/soak

test-multigpu: $(STAMP)  ## run the tests of ranks with a GPU each, over NCCL (two GPUs at least)
	$(BIN)/python -m pytest -m multigpu tests/gpu/test_multigpu.py -rs $(PYTEST_OPTIONS)

bench-multigpu: $(STAMP)  ## all recipes with a GPU a rank, over NVLink and over sockets
	$(BIN)/python benchmarks/multigpu.py --ranks "$$(ls /dev/nvidia[0-9]* | wc -l)" --budget-seconds 540 -- $(BENCH_OPTIONS)

docs: $(STAMP)  ## build the documentation as a site in runs/site; warnings and broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "site: runs/site/index.html"

# Pythons that `make wheel` tries, each in a fresh environment.
PYTHONS ?= $(PYTHON)

wheel:  ## build the wheel, install it without extras into a fresh environment, and train with it
	.ci/wheel "$(TORCH)" $(PYTHONS)

check: $(STAMP)  ## lint, check the format, check the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## put the code into its standard format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches and build products (runs and .venv stay)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
