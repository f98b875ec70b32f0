"""Functions of the user's that raise: their own error comes out, and nothing is left half-done."""

import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from refusals import fingerprint, within

import metaopt
from metaopt import optimizers
from metaopt.guards import in_windows, lgl2o, race, windows
from metaopt.meta import MetaTrainer
from metaopt.meta.loop import train

SGD = optax.sgd(0.1)
PARAMS = jnp.ones(3)
BATCHES = np.ones((2, 3), np.float32)
WINDOW = {"train_batches": BATCHES, "eval_batches": BATCHES}
loss_fn = lambda params, batch: jnp.sum(params * batch)


class OwnError(Exception):
    """What no library raises."""


def fails(*arguments, **extra):
    raise OwnError("the user's own error")


def guarded(guard, loss=loss_fn):
    guard = in_windows(guard)
    return guard.update(None, guard.init(PARAMS), PARAMS, loss_fn=loss, **WINDOW)


def failing_iterator():
    yield BATCHES
    fails()


BROKEN = optax.GradientTransformation(fails, fails)
STEP_BROKEN = optax.GradientTransformation(SGD.init, fails)
RAISING = {
    "loss_fn of race": lambda: guarded(race(SGD, SGD, n_t=2, n_c=2), fails),
    "loss_fn of lgl2o": lambda: guarded(lgl2o(SGD, SGD, n_t=2, n_c=2), fails),
    "average of lgl2o": lambda: guarded(lgl2o(SGD, SGD, n_t=2, n_c=2, average=fails)),
    "init of an inner optimizer": lambda: race(BROKEN, SGD).init(PARAMS),
    "update of an inner optimizer": lambda: guarded(race(STEP_BROKEN, SGD, n_t=2, n_c=2)),
    "value_fn of race": lambda: (guard := race(SGD, SGD)).update(
        None, guard.init(PARAMS), PARAMS, value_fn=fails
    ),
    "eval_fn of race": lambda: (guard := race(SGD, SGD, n_t=1, n_c=1)).update(
        None, guard.init(PARAMS), PARAMS, value_fn=jnp.sum, eval_fn=fails
    ),
    "loss_fn of unroll": lambda: metaopt.unroll(SGD, PARAMS, SGD.init(PARAMS), fails, BATCHES),
    "make of handcrafted": lambda: optimizers.handcrafted(fails).apply({}),
    "is_head of head_only": lambda: optimizers.head_only(SGD, fails).init(PARAMS),
    "layer_names of l3rs": lambda: optimizers.l3rs(layer_names=fails).init(
        jax.random.key(0), PARAMS
    ),
    "base of l3rs": lambda: (
        optimizers.l3rs([BROKEN])
        .apply(
            optimizers.l3rs([BROKEN], variant="embedding").init(jax.random.key(0), PARAMS),
            num_steps=1,
        )
        .init(PARAMS)
    ),
    "iterator of windows": lambda: list(windows(failing_iterator(), 1, 1)),
    "n_t of windows": lambda: next(windows([BATCHES], fails, 1)),
}


@pytest.mark.parametrize("case", RAISING)
def test_the_users_own_error_comes_out(case):
    with within(60), pytest.raises(OwnError, match="the user's own error") as caught:
        RAISING[case]()
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert last.name == "fails"  # not wrapped, and not hidden behind another


@pytest.mark.parametrize("part", ["init", "step", "validate"])
def test_a_run_whose_callback_raises_goes_on_afterwards(tmp_path, part):
    """The lock is released, and the next run with the same command finds no half-written state."""
    theta = {"w": jnp.zeros(2)}

    def trainer(broken):
        good = lambda key, theta: theta
        step = lambda key, state: (state, {"meta_loss": jnp.ones([]), "inner_steps": jnp.ones([])})
        return MetaTrainer(
            fails if broken == "init" else good, fails if broken == "step" else step, lambda s: s
        )

    def run(broken):
        return train(
            trainer(broken),
            theta,
            steps=1,
            seed=0,
            out=tmp_path / "run",
            config={},
            validate=fails if broken == "validate" else lambda theta, key: jnp.ones([]),
        )

    with within(60), pytest.raises(OwnError):
        run(part)
    assert "export" not in fingerprint(tmp_path / "run")
    assert run("")[1] == 1.0
