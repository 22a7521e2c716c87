PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

# The whole story on one machine: clients train alone, send one file each, the server merges.
demo: .venv/installed
	$(BIN)/python recipes/cifar_resnet.py

# A process for each core, up to eight, and one thread in each: on matrices as small as those of the
# tests, threads that wait for a busy core cost more than they do. `make test JOBS=0` uses no others.
JOBS ?= auto
test: export OMP_NUM_THREADS ?= 1
test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses $(JOBS) --maxprocesses 8 --dist worksteal

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv
