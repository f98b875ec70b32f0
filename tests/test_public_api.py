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

MODULES = ("guards", "meta", "optimizers", "tasks", "datasets", "evaluation", "tasks.networks")
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
    _values = public(importlib.import_module(f"metaopt.{_module}"))
    NAMES |= {f"{_module}.{name}": value for name, value in _values.items()}
FUNCTIONS = {name: value for name, value in NAMES.items() if inspect.isfunction(value)}


def test_the_tables_below_are_not_empty():
    assert len(NAMES) > 60 and len(FUNCTIONS) > 40
    assert {"metaopt.load", "guards.race", "optimizers.lstm", "tasks.quadratic"} <= set(FUNCTIONS)


def test_every_name_has_a_docstring_of_its_own():
    def documented(value):
        text = value.__doc__ or ""
        generated = re.match(rf"{value.__name__}\(|Alias for field", text)
        return len(text) > 20 and not generated

    assert not [name for name, value in NAMES.items() if not documented(value)]


def test_every_parameter_and_every_result_is_annotated():
    bare = []
    for name, function in FUNCTIONS.items():
        signature = inspect.signature(function)
        annotations = {p.name: p.annotation for p in signature.parameters.values()}
        annotations["return"] = signature.return_annotation
        bare += [f"{name}: {key}" for key, hint in annotations.items() if hint is signature.empty]
    assert not bare


def test_annotations_name_types_that_exist_and_say_the_shapes_of_arrays():
    shapeless = []
    for name, function in FUNCTIONS.items():
        hints = typing.get_type_hints(function)
        shapeless += [
            f"{name}: {k}" for k, hint in hints.items() if hint in (jax.Array, np.ndarray)
        ]
    assert not shapeless, "say kind and shape, with jaxtyping"


def test_no_default_can_be_changed():
    for name, function in FUNCTIONS.items():
        defaults = [p.default for p in inspect.signature(function).parameters.values()]
        assert not any(isinstance(value, list | dict | set) for value in defaults), name


def test_arguments_have_the_names_that_they_have_everywhere():
    usual_names = {s: usual for usual, others in SPELLINGS.items() for s in others.split("|")}
    misnamed = []
    for name, value in NAMES.items():
        if isinstance(value, type) and issubclass(value, Exception):
            continue
        if name == "metaopt.TrainState":
            continue  # Flax names its fields
        for parameter in inspect.signature(value).parameters:
            if parameter in usual_names:
                misnamed.append(f"{name}: call {parameter} {usual_names[parameter]}")
    assert not misnamed


def examples():
    finder = doctest.DocTestFinder(recurse=False)
    for name, value in FUNCTIONS.items():
        globs = {**inspect.unwrap(value).__globals__, "metaopt": metaopt}
        for test in finder.find(value, name, globs=globs):
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
