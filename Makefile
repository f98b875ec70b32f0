VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# Runs of the suite are split over worker processes; on 2 cores this pays.
WORKERS ?= 2

.PHONY: setup run test clean

setup: $(VENV)/.installed

# The stamp is written last: an interrupted installation is not taken for a whole one.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

run: setup
	$(BIN)/python -m experiments.digits

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n $(WORKERS)

clean:
	rm -rf $(VENV) runs
