"""The public names: documented, annotated, spelled alike, with examples that are true."""

import doctest
import importlib
import inspect
import re
import typing

import jax
import numpy as np
import pytest

import metaopt

MODULES = ("guards", "meta", "optimizers", "tasks", "datasets", "tasks.networks")
# What one thing is called everywhere -> spellings of it that would be a second name.
SPELLINGS = {
    "num_steps": "steps|n_steps|nsteps|num_iterations|iterations|horizon|max_iter|T|K",
    "batch_size": "batchsize|bs|n_batch|num_examples|batch_dim",
    "key": "rng|rng_key|prng_key|prng|random_key|random_state",
    "seed": "random_seed|rng_seed",
    "loss_fn": "loss_function|objective_fn|lossfn|fun|fn_loss",
    "train_batches": "training_batches|batches_train|inner_batches",
    "eval_batches": "validation_batches|valid_batches|outer_batches|val_batches",
    "n_t": "num_train|n_train|nt|window_train",
    "n_c": "num_eval|n_eval|nc|n_valid|window_eval",
    "params": "parameters|weights|param",
    "state": "opt_state|optimizer_state|optstate",
    "theta": "meta_params|meta_parameters|phi|outer_params",
    "lr": "learning_rate|rate|step_size|eta",
    "num_classes": "n_classes|classes_number|nclass",
    "learned": "learned_optimizer|l2o|lopt_tx",
    "fallback": "safe|baseline_tx|fallback_tx",
}


def public(module) -> dict[str, typing.Any]:
    """Functions and classes that a module offers and metaopt made."""
    named = {n: getattr(module, n) for n in dir(module) if not n.startswith("_")}
    own = lambda v: callable(v) and getattr(v, "__module__", "").startswith("metaopt")
    return {n: v for n, v in named.items() if own(v) and not typing.get_origin(v)}


NAMES = {f"metaopt.{name}": value for name, value in public(metaopt).items()}
for _module in MODULES:
    _found = public(importlib.import_module(f"metaopt.{_module}"))
    NAMES |= {f"{_module}.{name}": value for name, value in _found.items()}
FUNCTIONS = {name: value for name, value in NAMES.items() if inspect.isfunction(value)}


def test_the_tables_below_are_not_empty():
    assert len(NAMES) > 60 and len(FUNCTIONS) > 40
    assert {"metaopt.load", "guards.race", "optimizers.lstm", "tasks.quadratic"} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_docstring_of_its_own(name):
    text = NAMES[name].__doc__ or ""
    generated = re.match(rf"{NAMES[name].__name__}\(|Alias for field", text)
    assert len(text) > 20 and not generated


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_and_the_result_are_annotated(name):
    signature = inspect.signature(FUNCTIONS[name])
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    assert not bare and signature.return_annotation is not signature.empty
    hints = typing.get_type_hints(FUNCTIONS[name])  # and they name types that exist
    shapeless = [name for name, hint in hints.items() if hint in (jax.Array, np.ndarray)]
    assert not shapeless, "say shape and kind, with jaxtyping"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_default_can_be_changed(name):
    defaults = [p.default for p in inspect.signature(FUNCTIONS[name]).parameters.values()]
    assert not any(isinstance(default, list | dict | set) for default in defaults)


@pytest.mark.parametrize("name", sorted(NAMES.keys() - {"metaopt.TrainState"}))  # Flax's fields
def test_arguments_have_the_names_that_they_have_everywhere(name):
    others = {s: usual for usual, those in SPELLINGS.items() for s in those.split("|")}
    if isinstance(NAMES[name], type) and issubclass(NAMES[name], Exception):
        return
    found = [p for p in inspect.signature(NAMES[name]).parameters if p in others]
    assert not found, f"call it {[others[p] for p in found]}"


def examples():
    finder = doctest.DocTestFinder(recurse=False)
    for name, value in FUNCTIONS.items():
        for test in finder.find(value, name, globs={**value.__globals__, "metaopt": metaopt}):
            if test.examples:
                yield pytest.param(test, id=name)


EXAMPLES = list(examples())


def test_the_main_functions_have_examples():
    shown = {case.id for case in EXAMPLES}
    expected = {"metaopt.load", "metaopt.windows", "guards.race", "guards.lgl2o"}
    assert expected | {"optimizers.lstm", "optimizers.power_decay", "tasks.quadratic"} <= shown


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_true(example):
    out: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=out.append)
    assert result.failed == 0, "".join(out)
