# Every target sets up what it needs: only Python 3.11 or newer and make have to be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
ROWS ?=
KEEP ?=
# Of chaos: how many runs, or for how many seconds; and the first one's seed.
RUNS ?= 300
BUDGET ?=
SEED ?=
# Each process has servers of its own, and often waits for them: four keep two cores busy. With 0 the tests run in
# one, which is easier to debug.
PROCESSES ?= 4

.DEFAULT_GOAL := help
.PHONY: help demo test check chaos bench format lock clean

help:
	@echo "make demo    the whole move on two embedded PostgreSQL servers (ROWS=100000 for more, KEEP=yes to leave them)"
	@echo "make test    all tests, on real servers"
	@echo "make check   ruff and mypy --strict"
	@echo "make chaos   random faults, and kill -9 at every point of a cutover (RUNS=300, or BUDGET=seconds; SEED=n plays a run again)"
	@echo "make bench   speed and memory, beside the raw COPY pipe and pg_dump (ARGS='--quick')"
	@echo "make clean   remove the virtual environment and caches"

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up $(VENV) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)
	@$(BIN)/pipeline demo $(if $(ROWS),--rows $(ROWS)) $(if $(KEEP),--keep)

test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

chaos: $(READY)
	CHAOS_RUNS=$(RUNS) CHAOS_BUDGET=$(BUDGET) CHAOS_SEED=$(SEED) $(BIN)/python -m pytest -m chaos tests/chaos tests/acceptance/test_cutover_kills.py $(ARGS)

bench: $(READY)
	$(BIN)/python benchmarks/bench.py $(ARGS)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# pgserver is the old legacy of the tests; hatchling and editables build the project itself.
lock: $(READY)
	$(BIN)/python -m pip install --quiet "pip-tools>=7.5"
	printf 'hatchling\neditables\npgserver\n' > $(VENV)/lock.in
	$(BIN)/pip-compile --quiet --generate-hashes --no-header --no-annotate --no-emit-index-url \
	  --no-emit-find-links --no-emit-trusted-host --strip-extras --allow-unsafe \
	  --extra demo --extra dev --extra monitor --extra report --output-file requirements.lock pyproject.toml $(VENV)/lock.in
	sed -i '1i # Every version and hash that a development environment is made of; `make lock` writes it.' requirements.lock

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
