VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# Runs of the suite are split over worker processes; on 2 cores this pays.
WORKERS ?= 2

.PHONY: setup run test test-oldest docs small soak zoo reproduce-lgl2o reproduce-meta-guard reproduce-l3rs clean

setup: $(VENV)/.installed

# Modules are compiled when they are first imported: that takes half of the computing out of an
# installation. The stamp is written last: an interrupted one is not taken for a whole one.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --editable '.[test]'
	touch $@

run: setup
	$(BIN)/python -m experiments.digits

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n $(WORKERS)

# The documentation site in build/site; a broken link or reference is an error. No network needed.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet -f .config/mkdocs.yml

# The suite on the oldest versions that pyproject.toml declares, in an environment of its own.
test-oldest:
	$(PYTHON) -m venv build/oldest
	$(PYTHON) tests/oldest.py > build/oldest/constraints.txt
	build/oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint build/oldest/constraints.txt --editable '.[test]'
	build/oldest/bin/python -m pytest -n $(WORKERS)

# A learned optimizer that fits any network, on 12 diverse tasks.
small: setup
	$(BIN)/metaopt train --task digits --steps 40 --out runs/small/L3RS --learned.variant none --method.population 16 --method.tasks 2
	$(BIN)/metaopt evaluate runs/small/L3RS --suite small --workers 2 --out runs/small/evaluation

# A training run killed 100 times at random moments; takes some minutes.
soak: setup
	METAOPT_KILLS=100 $(BIN)/python -m pytest tests/training/test_kills.py -k same_bits

# The papers' figures, from the zoo's optimizers, on MNIST and FashionMNIST (docs/data.md); each
# goes on where it was interrupted, and takes up to some hours on 2 cores. docs/results/README.md
# has what came out.
reproduce-lgl2o reproduce-meta-guard reproduce-l3rs: reproduce-%: setup
	$(BIN)/python -m experiments.$(subst -,_,$*)
	$(BIN)/metaopt report docs/results/$*
	$(BIN)/python -m experiments.verdicts

# Meta-trains every optimizer of the zoo again.
zoo: setup
	$(BIN)/python -m experiments.zoo

clean:
	rm -rf $(VENV) runs
