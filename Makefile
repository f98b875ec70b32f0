VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# Runs of the suite are split over worker processes; on 2 cores this pays.
WORKERS ?= 2

.PHONY: setup run test small soak clean

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

# A learned optimizer that fits any network, on 12 diverse tasks.
small: setup
	$(BIN)/metaopt train --task digits --variant none --steps 40 --nes.population 16 --nes.tasks 2 --out runs/small/L3RS
	$(BIN)/metaopt evaluate runs/small/L3RS --suite small --workers 2 --out runs/small/evaluation

# A training run killed 100 times at random moments; takes some minutes.
soak: setup
	METAOPT_KILLS=100 $(BIN)/python -m pytest tests/training/test_kills.py -k same_bits

clean:
	rm -rf $(VENV) runs
