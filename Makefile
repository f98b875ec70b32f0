VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# Worker processes of the test suite. Each takes files in a row, and so makes their fixtures and programs
# once; the one that is done first takes over half of what the other still has to do.
WORKERS ?= 2

# Compiled modules are kept where the environment says otherwise: the suite starts many processes, and
# each of them would compile JAX's modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup run lint pytest test test-oldest docs wheel small soak zoo reproduce-lgl2o \
	reproduce-meta-guard reproduce-l3rs clean

setup: $(VENV)/.installed

# pip leaves the compilation of modules to their first import, which halves the computing time of
# the installation. The stamp is written last, so that an interrupted installation is repeated.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --editable '.[all,test]'
	touch $@

run: setup
	$(BIN)/python -m experiments.digits

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint pytest

pytest: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# The documentation site in build/site. A broken link or reference is an error. Needs no network.
# Figures of docs/results are drawn first, if they are missing or older than their records.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f .config/mkdocs.yml

# The wheel in dist/.
wheel: setup
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

# The test suite with the oldest versions that pyproject.toml declares, in its own environment.
test-oldest:
	$(PYTHON) -m venv build/oldest
	$(PYTHON) tests/oldest.py > build/oldest/constraints.txt
	build/oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint build/oldest/constraints.txt --editable '.[all,test]'
	build/oldest/bin/python -m pytest -n $(WORKERS) --dist worksteal

# Meta-trains an optimizer that fits any network, and evaluates it on 12 small tasks.
small: setup
	$(BIN)/metaopt train --task digits --steps 40 --out runs/small/L3RS --learned.variant none --method.population 16 --method.tasks 2
	$(BIN)/metaopt evaluate runs/small/L3RS --suite small --workers 2 --out runs/small/evaluation

# A training run that is killed 100 times at random moments. Takes some minutes.
soak: setup
	METAOPT_KILLS=100 $(BIN)/python -m pytest tests/meta/loop/test_kills.py -k same_bits

# The papers' figures from the zoo's optimizers, on MNIST and FashionMNIST (docs/data.md). Each
# resumes where it was interrupted, and takes up to some hours on 2 cores. docs/results/README.md
# lists the results.
reproduce-lgl2o reproduce-meta-guard reproduce-l3rs: reproduce-%: setup
	$(BIN)/python -m experiments.$(subst -,_,$*)
	$(BIN)/metaopt report docs/results/$*
	$(BIN)/python -m experiments.verdicts

# Meta-trains every optimizer of the zoo again.
zoo: setup
	$(BIN)/python -m experiments.zoo

# Removes what make builds. Never removes runs/, which holds the user's results.
clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find metaopt experiments benchmarks tests docs .config -name __pycache__ -type d -prune -exec rm -rf {} +
