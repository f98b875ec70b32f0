"""Data, windows, steps, horizons and thetas of a wrong type, size or shape."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from good_parts import LSTM, NAN, PARAMS, SGD, THETA, WINDOW, loss_fn
from refusals import bad_inputs, refused

from metaopt import tasks
from metaopt.datasets import Dataset
from metaopt.guards import in_windows, lgl2o, race
from metaopt.optimizers import l3rs, lstm, velo
from metaopt.tasks.networks import MLP


def split(x, y, **fields) -> Dataset:
    examples = {"x": x, "y": y}
    return Dataset("mine", {"train": examples, "valid": examples, "test": examples}, 2, **fields)


X, Y = np.ones((4, 2), np.float32), np.array([0, 1, 0, 1])
SETS: dict[str, tuple[Any, str]] = {
    "x NaN": (split(X * NAN, Y), "'mine', split 'train': 4 of 4 inputs hold NaN or inf"),
    "x of words": (split(X.astype(str), Y), "inputs must be numbers"),
    "x a number": (split(np.float32(1.0), Y), "'mine', split 'train': "),
    "x empty": (split(X[:0], Y[:0]), "it is empty"),
    "y shorter": (split(X, Y[:3]), "4 inputs, but 3 labels"),
    "y of two axes": (split(X, np.stack([Y, Y], 1)), r"labels must be \[n\]"),
    "y negative": (split(X, -Y), r"labels must lie in 0..1"),
    "y beyond": (split(X, Y + 1), r"labels must lie in 0..1, got 1..2; check num_classes"),
    "y missing": (
        Dataset("mine", {key: {"x": X} for key in ("train", "valid", "test")}, 2),
        "'mine', split 'train': lacks 'y'",
    ),
    "no split": (Dataset("mine", {}, 2), "data set 'mine': .*train, valid, test"),
    "scale NaN": (split(X, Y, scale=NAN), "scale must be a finite number"),
}


@bad_inputs(SETS)
def test_a_bad_data_set_is_refused(bad, match):
    refused(lambda: tasks.classification(MLP((2,)), bad), match)


def window(**changes):
    """A call of a guard's update for windows of 2 and 2 mini-batches, some arguments changed."""

    def call(guard):
        given = {"updates": None, "params": PARAMS, "loss_fn": loss_fn}
        given |= {"train_batches": WINDOW, "eval_batches": WINDOW, **changes}
        state = given.pop("state", None) or guard.init(PARAMS)
        params = given.pop("params")
        return guard.update(given.pop("updates"), state, params, **given)

    return call


CALLS = {
    "params None": (window(params=None), "update needs `params`"),
    "gradients given": (window(updates=PARAMS), "pass updates=None"),
    "no loss_fn": (window(loss_fn=None), "update is missing loss_fn"),
    "loss_fn no function": (window(loss_fn=3.0), "loss_fn must be a function"),
    "no train_batches": (window(train_batches=None), "update is missing train_batches"),
    "no eval_batches": (window(eval_batches=None), "update is missing eval_batches"),
    "train_batches empty": (window(train_batches={}), "all arrays of train_batches"),
    "axes of two lengths": (
        window(train_batches={**WINDOW, "b": np.ones(3)}),
        "all arrays of train_batches must share a leading axis",
    ),
    "an array without axes": (
        window(eval_batches={**WINDOW, "b": np.float32(1)}),
        "all arrays of eval_batches must share a leading axis",
    ),
    "too few mini-batches": (
        window(train_batches=jax.tree.map(lambda a: a[:1], WINDOW)),
        "train_batches holds 1 mini-batches, but this guard's windows take",
    ),
    "no mini-batches": (
        window(train_batches=jax.tree.map(lambda a: a[:0], WINDOW)),
        "train_batches holds 0 mini-batches",
    ),
    "losses instead of one loss": (
        window(loss_fn=lambda p, b: p["w"] * b["w"]),
        r"loss_fn must return one real number, got float32\[3\]",
    ),
    "a complex loss": (
        window(loss_fn=lambda p, b: jnp.complex64(1)),
        r"loss_fn must return one real number, got complex64\[\]",
    ),
    "a loss with an auxiliary output": (
        window(loss_fn=lambda p, b: (loss_fn(p, b), {"a": 1})),
        "loss_fn must return one real number, got a tuple",
    ),
    "no loss at all": (
        window(loss_fn=lambda p, b: None),
        "loss_fn must return one real number, got a NoneType",
    ),
}
GUARDS = {
    "race": lambda: in_windows(race(SGD, SGD, n_t=2, n_c=2)),
    "lgl2o": lambda: in_windows(lgl2o(SGD, SGD, n_t=2, n_c=2)),
}


@bad_inputs(CALLS)
def test_a_bad_window_is_refused(bad, match):
    for make in GUARDS.values():
        refused(lambda make=make: bad(make()), match)


STEPS = {
    "lstm: gradients of another size": (
        lambda tx: tx.update({"w": jnp.ones(7)}, tx.init(PARAMS)),
        "lstm: got gradients of 7 parameters for the state of 4",
    ),
    "lstm: integer params": (
        lambda tx: tx.init({"w": jnp.ones(3, int)}),
        "lstm: leaf 'w' has dtype int32",
    ),
    "lstm: params of words": (lambda tx: tx.init({"w": "abc"}), "lstm: leaf 'w'"),
}


@bad_inputs(STEPS)
def test_a_bad_step_is_refused(bad, match):
    refused(lambda: bad(LSTM.apply(THETA)), match)


HORIZONS = {
    "l3rs: none": (l3rs, None, "l3rs: apply needs the number of updates"),
    "l3rs: 0": (l3rs, 0, "l3rs: num_steps must be"),
    "l3rs: 2.5": (l3rs, 2.5, "l3rs: num_steps must be an integer"),
    "velo: none": (velo, None, "velo: apply needs the number of updates"),
    "velo: 0": (velo, 0, "velo: num_steps must be at least 1"),
    "velo: 10.0": (velo, 10.0, "velo: num_steps must be an integer"),
}


@bad_inputs(HORIZONS)
def test_a_bad_horizon_is_refused(target, bad, match):
    refused(lambda: target().apply({}, num_steps=bad), match)


THETAS = {
    "lstm: empty": (LSTM, {}, "lstm: theta"),
    "lstm: None": (LSTM, None, "lstm: theta"),
    "lstm: of two layers": (lstm(2, layers=2), THETA, "lstm: theta has a memory of 1 layers"),
    "lstm: of 3 units": (lstm(3, layers=1), THETA, "lstm: theta, with hidden=3"),
    "l3rs: empty": (l3rs(), {}, "l3rs: theta"),
    "l3rs: None": (l3rs(), None, "l3rs: theta"),
    "l3rs: of an LSTM": (l3rs(), THETA, "l3rs: theta"),
    "velo: None": (velo(4, 2), None, "velo: theta must be a dict"),
    "velo: of an LSTM": (velo(4, 2), THETA, "velo: these are not VeLO's meta-parameters"),
}


@bad_inputs(THETAS)
def test_a_theta_of_another_optimizer_is_refused(target, bad, match):
    refused(lambda: target.apply(bad, num_steps=10), match)


def test_the_errors_above_are_not_those_of_good_input():
    for make in GUARDS.values():
        updates, _ = jax.eval_shape(lambda make=make: window()(make()))
        assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
