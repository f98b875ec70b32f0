"""Memory that a compiled window allocates, in copies of the params.

Results and temporary buffers are counted; the caller's params, state and mini-batches are not.
Every step needs its gradient, one copy. A guard adds candidates and states.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

from metaopt import guards
from metaopt.core.cpu import option
from metaopt.core.rollouts import windowed
from metaopt.core.types import LearnedOptimizer
from metaopt.tasks.networks import MLP

pytestmark = pytest.mark.optimized

NET = MLP((400, 400, 10))
INPUT = jax.ShapeDtypeStruct((2, 400), jnp.float32)
PARAMS = jax.eval_shape(lambda: NET.init(jax.random.key(0), jnp.zeros(INPUT.shape))["params"])
P = optax.tree.size(PARAMS)  # 325,000; two examples through two layers are below 1% of it
TXS = {
    "sgd": (optax.sgd(0.1), 0),
    "momentum": (optax.sgd(0.1, momentum=0.9), 1),
    "adam": (optax.adam(0.1), 2),
}


def loss(params, batch):
    return jnp.mean(jnp.square(NET.apply({"params": params}, batch)))


def in_copies(function, *arguments, **options) -> float:
    """Returns the memory of results and temporaries of the compiled function."""
    used = jax.jit(function).lower(*arguments).compile(options).memory_analysis()
    return (used.output_size_in_bytes + used.temp_size_in_bytes) / (4 * P)


def copies(guard, n_train: int, n_eval: int, **options) -> float:
    """Returns the memory of one window."""

    def window(params, state, train, validation):
        updates, state = guard.update(
            None,
            state,
            params,
            loss_fn=loss,
            train_batches=train,
            eval_batches=validation if n_eval else None,
        )
        return optax.apply_updates(params, updates), state

    batches = [jax.ShapeDtypeStruct((n, *INPUT.shape), jnp.float32) for n in (n_train, n_eval)]
    state = jax.eval_shape(guard.init, PARAMS)
    return in_copies(window, PARAMS, state, *batches, **options)


def step_copies(guard, **options) -> float:
    """Returns the memory of one step, given its gradient."""

    def step(params, state, grads, batch):
        return guard.update(grads, state, params, value_fn=lambda p: loss(p, batch))

    state = jax.eval_shape(guard.init, PARAMS)
    return in_copies(step, PARAMS, state, PARAMS, INPUT, **options)


@pytest.mark.parametrize("guard", [guards.lgl2o, guards.race])
@pytest.mark.parametrize("pair", [("sgd", "sgd"), ("momentum", "adam")])
def test_two_candidates_both_inner_states_and_a_gradient(guard, pair):
    (learned, y_state), (fallback, z_state) = (TXS[name] for name in pair)
    bound = 2 + y_state + z_state + 1
    assert copies(guard(learned, fallback, n_t=4, n_c=3), 4, 3) <= 1.02 * bound


def test_every_further_runner_of_a_race_adds_itself():
    three = guards.race(TXS["sgd"][0], TXS["momentum"][0], TXS["adam"][0], n_t=4, n_c=3)
    assert copies(three, 4, 3) <= 1.02 * (3 + 1 + 2 + 1)


# On CPU, XLA's newer library of fused reductions stores every operand of a reduction, even
# constants. The norm of a step of Adam then takes two more copies if the step is no result.
PLAIN = option("xla_cpu_experimental_ynn_fusion_type", "")


@pytest.mark.parametrize(
    "pair", [("sgd", "sgd"), ("adam", "sgd"), ("sgd", "adam"), ("momentum", "adam")]
)
def test_a_residual_guard_holds_two_candidates_both_states_and_the_second_gradient(pair):
    (learned, y_state), (fallback, z_state) = (TXS[name] for name in pair)
    guard = guards.gl2o(learned, fallback)
    # A norm stores the squares of one leaf at a time, here half of the params.
    bound = 2 + y_state + z_state + 1 + 0.5
    assert step_copies(guard, **PLAIN) <= 1.02 * bound
    # A window goes on from a copy of the caller's params and state.
    assert copies(windowed(guard), 4, 1, **PLAIN) <= 1.02 * (bound + 1 + y_state + z_state)


@pytest.mark.parametrize("guard", [guards.smg, guards.amg])
def test_a_meta_guard_adds_a_record_for_every_step_it_goes_back_through(guard):
    """The record of a momentum step is the gradient and the memory: two copies."""
    family = LearnedOptimizer(
        init=lambda key, params: jnp.array([0.9, -0.1]),
        apply=lambda theta, *, num_steps=None: optax.chain(
            optax.trace(theta[0]), optax.scale(theta[1])
        ),
    )
    theta = family.init(jax.random.key(0), PARAMS)
    used = {t: copies(guard(family, theta, n_t=t, n_c=3), 2 * t + 1, 3) for t in (2, 6)}
    slope = (used[6] - used[2]) / 4
    assert slope <= 2.02
    # Besides the records there are four pairs (start, learned, fallback and its end), and a memory
    # and a gradient for each of the forward, backward and evaluating runs.
    assert used[2] - 2 * slope <= 4 + 2 * 3
