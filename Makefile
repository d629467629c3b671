# make demo: set up and run a whole job. make test: set up and pass the tests. make check: what CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check lint clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

build/notes/notes.parquet: | $(VENV)/ready
	$(BIN)/raylab synth build/notes --notes 2000

demo: $(VENV)/ready build/notes/notes.parquet
	$(BIN)/raylab run jobs/quickstart.yaml

test: $(VENV)/ready
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

clean:
	rm -rf $(VENV) build results/*/ .pytest_cache .mypy_cache .ruff_cache .hypothesis
