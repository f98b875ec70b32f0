"""Memory that a compiled window allocates, in copies of the params.

Results and temporary buffers are counted; the caller's params, state and mini-batches are not.
Every step needs its gradient, one copy. A guard adds candidates and states. Buffers are assigned
before LLVM compiles, so that they are the same with and without its optimizations.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

from metaopt import guards
from metaopt.core.cpu import option
from metaopt.core.types import LearnedOptimizer
from metaopt.tasks.networks import MLP

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


def copies(guard, **options) -> float:
    """Returns the memory of one window."""
    tx = guards.in_windows(guard)

    def window(params, state, train, validation):
        updates, state = tx.update(
            None, state, params, loss_fn=loss, train_batches=train, eval_batches=validation
        )
        return optax.apply_updates(params, updates), state

    n_t, n_c = (4, 0) if guard.process is None else guard.window
    train, validation = (jax.ShapeDtypeStruct((n, *INPUT.shape), jnp.float32) for n in (n_t, n_c))
    state = jax.eval_shape(tx.init, PARAMS)
    return in_copies(window, PARAMS, state, train, validation if n_c else None, **options)


def step_copies(guard, **options) -> float:
    """Returns the memory of one mini-batch, given its gradient."""

    def step(params, state, grads, batch):
        return guard.update(grads, state, params, value_fn=lambda p: loss(p, batch))

    state = jax.eval_shape(guard.init, PARAMS)
    return in_copies(step, PARAMS, state, PARAMS, INPUT, **options)


# Both runners step in one loop: a leaf of the second gradient, here half of the params, may be
# there before the first step is taken.
LEAF = 0.5


@pytest.mark.parametrize("pair", [("sgd", "sgd"), ("momentum", "adam")])
@pytest.mark.parametrize("n_c", [0, 3])
def test_two_candidates_both_inner_states_and_a_gradient(n_c, pair):
    (learned, y_state), (fallback, z_state) = (TXS[name] for name in pair)
    guard = guards.lgl2o(learned, fallback, n_t=4, n_c=n_c)
    states = y_state + z_state
    assert copies(guard) <= 1.02 * (2 + states + 1 + LEAF)
    # Mini-batch by mini-batch, the states of before the window are kept beside those of the
    # runners; a branch for each phase copies one side.
    branches = 1 + states if n_c else 0
    assert step_copies(guard) <= 1.02 * (2 + 2 * states + 1 + LEAF + branches)


@pytest.mark.parametrize(
    "names", [("sgd", "sgd"), ("momentum", "adam"), ("sgd", "momentum", "adam")]
)
@pytest.mark.parametrize("n_c", [0, 3])
def test_a_race_holds_its_runners_and_what_the_caller_holds(n_c, names):
    guard = guards.race(*[TXS[name][0] for name in names], n_t=4, n_c=n_c)
    runners = sum(1 + TXS[name][1] for name in names)
    branches = 1 if n_c else 0
    assert step_copies(guard) <= 1.02 * (runners + 1 + LEAF + branches)
    # In a loop, the runners of before a step, which may not be taken, are copies.
    assert copies(guard) <= 1.02 * 2 * runners


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
    assert copies(guard, **PLAIN) <= 1.02 * (bound + 1 + y_state + z_state)


FAMILY = LearnedOptimizer(  # momentum
    init=lambda key, params: jnp.array([0.9, -0.1]),
    apply=lambda theta, *, num_steps=None: optax.chain(
        optax.trace(theta[0]), optax.scale(theta[1])
    ),
)


@pytest.mark.parametrize("guard", [guards.smg, guards.amg])
def test_a_meta_guard_adds_a_record_for_every_step_it_goes_back_through(guard):
    """Every gradient is recorded once; the replay of a momentum step adds it and the memory."""
    theta = FAMILY.init(jax.random.key(0), PARAMS)
    used = {t: copies(guard(FAMILY, theta, n_t=t, n_c=3)) for t in (2, 6)}
    slope = (used[6] - used[2]) / 4
    assert slope <= 3.02
    # Besides the records there are four pairs (start, learned, fallback and its end), and a memory
    # and a gradient for each of the forward, backward and evaluating runs.
    assert used[2] - 2 * slope <= 4 + 2 * 3


OF_SIZE = {
    "race": lambda n: guards.race(optax.sgd(0.1), optax.adam(0.1), n_t=n, n_c=n),
    "smg": lambda n: guards.smg(FAMILY, jnp.array([0.9, -0.1]), n_t=n, n_c=n),
    "amg": lambda n: guards.amg(FAMILY, jnp.array([0.9, -0.1]), n_t=n, n_c=n),
}


@pytest.mark.parametrize("name", OF_SIZE)
def test_a_window_holds_the_activations_of_few_mini_batches(name):
    """SMG and AMG go back through recorded gradients, not through the loss of their T steps."""
    guard = OF_SIZE[name](6)
    tx, (n_t, n_c) = guards.in_windows(guard), guard.window
    params = [jnp.zeros((16, 16))] * 2
    x = jnp.zeros((2048, 16))
    loss = lambda p, batch: jnp.mean(jnp.square(jnp.tanh(jnp.tanh(batch @ p[0]) @ p[1])))

    def temporaries(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    def window(state, params, train, validation):
        return tx.update(
            None, state, params, loss_fn=loss, train_batches=train, eval_batches=validation
        )

    one_gradient = temporaries(jax.grad(loss), params, x)
    assert one_gradient >= x.nbytes  # activations, not params, take the memory
    batches = jnp.stack([x] * n_t), jnp.stack([x] * n_c)
    assert temporaries(window, tx.init(params), params, *batches) <= 4 * one_gradient
