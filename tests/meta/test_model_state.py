"""Meta-training on tasks with a model state, against runs by hand."""

import functools

import children
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stateful import assert_close, batchnorm_task, eval_loss, loss_fn, plain_loop

import metaopt
from metaopt import meta
from metaopt.core.types import LearnedOptimizer, single
from metaopt.meta import devices, loop
from metaopt.meta.base import Start, starts

THETA = np.array([-1.0], np.float32)
RATE = 0.4  # of dropout


def momentum_sgd() -> LearnedOptimizer:
    """SGD with momentum; theta is the logarithm of its rate."""
    return LearnedOptimizer(
        lambda key, params: THETA,
        lambda theta, *, num_steps=None: optax.sgd(jnp.exp(theta[0]), momentum=0.5),
    )


def tx_of(theta):
    return optax.sgd(float(jnp.exp(theta[0])), momentum=0.5)


def first(run):
    return jax.tree.map(lambda leaf: leaf[0], run)


def by_hand(start: Start, keys, theta=THETA, rate=RATE):
    """The run from `start` on one mini-batch per key."""
    task = batchnorm_task(rate)
    batches = [task.sample(key, ()) for key in keys]
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    stats = start.model_state["batch_stats"]
    return plain_loop(tx_of(theta), start.params, stats, batches, rate)


@pytest.mark.parametrize("objective", ["final", "trajectory", "normalised"])
def test_the_fitness_of_nes_is_that_of_the_run_by_hand(objective):
    task, steps = batchnorm_task(RATE), 5
    config = meta.NESConfig(
        population=2,
        tasks=1,
        min_steps=steps,
        max_steps=steps,
        sigma=1e-6,
        eval_batches=3,
        objective=objective,
    )
    trainer = meta.nes(momentum_sgd(), single(task), config)
    key = jax.random.key(7)
    _, metrics = jax.jit(trainer.step)(key, trainer.init(jax.random.key(0), THETA))

    _, k_tasks, _, _ = jax.random.split(key, 4)
    start = first(starts(single(task), jax.random.split(k_tasks, (1, 1))[0]))
    k_train, k_eval = jax.random.split(start.key)
    params, stats, losses = by_hand(start, [jax.random.fold_in(k_train, t) for t in range(steps)])
    batches = task.sample(k_eval, (3,), "valid")

    def held_out(params, stats):
        each = [jax.tree.map(lambda leaf, i=i: leaf[i], batches) for i in range(3)]
        return np.mean([eval_loss(params, stats, batch, RATE) for batch in each])

    final = held_out(params, stats)
    expected = {
        "final": final,
        "trajectory": losses.mean(),
        "normalised": final / held_out(start.params, start.model_state["batch_stats"]),
    }[objective]
    np.testing.assert_allclose(metrics["meta_loss"], expected, rtol=1e-4)


def test_validation_is_in_evaluation_mode():
    task = batchnorm_task(RATE)
    validate = meta.validation(momentum_sgd(), single(task), 4, runs=1, eval_batches=2)
    key = jax.random.key(5)
    start = first(starts(single(task), jax.random.split(key, 1)))
    k_train, k_eval = jax.random.split(start.key)
    params, stats, _ = by_hand(start, [jax.random.fold_in(k_train, t) for t in range(4)])
    batches = task.sample(k_eval, (2,), "valid")
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], batches) for i in range(2)]
    expected = np.mean([eval_loss(params, stats, batch, RATE) for batch in each])
    np.testing.assert_allclose(jax.jit(validate)(THETA, key), expected, rtol=1e-4)


WINDOWS = {"rollout": 6, "truncation": 2, "tasks": 1}


@functools.cache
def pes_chain():
    """States and keys of four windows of PES, in which theta stays (almost) where it is."""
    config = meta.PESConfig(population=2, sigma=1e-7, lr=1e-12, optimizer="sgd", **WINDOWS)
    trainer = meta.pes(momentum_sgd(), single(batchnorm_task(RATE)), config)
    step = jax.jit(trainer.step)
    keys = jax.random.split(jax.random.key(11), 5)
    states, losses = [trainer.init(jax.random.key(0), jnp.asarray(THETA))], []
    for key in keys:
        state, metrics = step(key, states[-1])
        states.append(state)
        losses.append(float(metrics["meta_loss"]))
    assert step._cache_size() == 1
    return keys, states, losses


def window_starts(key):
    """The start, and with it the key of the mini-batches, of a generation of PES."""
    _, k_start, _, _ = jax.random.split(key, 4)
    keys = jax.random.split(k_start, (1, 1, 1))[0]
    return first(first(starts(single(batchnorm_task(RATE)), keys)))


def test_windows_of_pes_chained_are_one_long_run_and_a_new_run_begins_afresh():
    """The first run of the single pair is cut to one window; the next has three."""
    keys, states, losses = pes_chain()
    lengths = [int(state.phase.left[0]) for state in states]
    assert lengths == [0, 0, 2, 1, 0, 2]
    of_windows = [window_starts(key) for key in keys]
    batch_keys = lambda start: [jax.random.fold_in(start.key, t) for t in range(2)]
    for begin, windows in ((0, (0,)), (1, (1, 2, 3)), (4, (4,))):
        run_keys = [key for window in windows for key in batch_keys(of_windows[window])]
        params, stats, seen = by_hand(of_windows[begin], run_keys)
        run = states[windows[-1] + 1].runs[0]
        for particle in range(2):
            own = jax.tree.map(lambda leaf, i=particle: leaf[i, 0, 0], run)
            found = metaopt.model_state(own.state)["batch_stats"]
            assert_close((own.params, found), (params, stats), rtol=1e-3)
        means = np.asarray(seen).reshape(-1, 2).mean(axis=1)
        np.testing.assert_allclose([losses[w] for w in windows], means, rtol=1e-4)


def test_windows_of_tbptt_chained_are_one_long_run():
    """And its gradient is that of the unroll by hand, in both orders."""
    task = batchnorm_task(RATE)
    for second_order in (False, True):
        config = meta.TBPTTConfig(lr=0.0, second_order=second_order, **WINDOWS)
        trainer = meta.tbptt(momentum_sgd(), single(task), config)
        step, state = jax.jit(trainer.step), trainer.init(jax.random.key(0), THETA)
        keys, run = jax.random.split(jax.random.key(2), 4), None
        for window, key in enumerate(keys):
            start = first(starts(single(task), jax.random.split(key, (1, 1))[0]))
            if window in (0, 3):  # a run has three windows
                run = start.params, start.model_state["batch_stats"], None
            assert run is not None
            batches = task.sample(start.key, (3,))
            state, metrics = step(key, state)
            params, stats, *_ = run
            loss, grad, run = tbptt_by_hand(params, stats, run[2], batches, second_order)
            own = first(state.runs[0])
            found = metaopt.model_state(own.state)["batch_stats"]
            assert_close((own.params, found), run[:2], rtol=1e-3)
            np.testing.assert_allclose(metrics["meta_loss"], loss, rtol=1e-4)
            np.testing.assert_allclose(metrics["grad_norm"], abs(grad), rtol=2e-3)


def tbptt_by_hand(params, stats, trace, batches, second_order):
    """Loss, derivative and end of a window of two steps, with SGD and momentum written out."""
    zero = jax.tree.map(jnp.zeros_like, params)
    trace = zero if trace is None else trace

    def window(theta):
        x, s, v, losses = params, stats, trace, []
        for index in range(2):
            batch = jax.tree.map(lambda leaf, i=index: leaf[i], batches)
            (loss, s), grad = jax.value_and_grad(loss_fn, has_aux=True)(x, s, batch, RATE)
            grad = grad if second_order else jax.lax.stop_gradient(grad)
            v = jax.tree.map(lambda g, v: g + 0.5 * v, grad, v)
            x = jax.tree.map(lambda x, v: x - jnp.exp(theta) * v, x, v)
            losses.append(loss)
        last = jax.tree.map(lambda leaf: leaf[2], batches)
        losses.append(loss_fn(x, s, last, RATE)[0])
        return sum(losses) / 3, (x, s, v)

    (loss, end), grad = jax.jit(jax.value_and_grad(window, has_aux=True))(THETA[0])
    return loss, grad, end


@pytest.mark.parametrize("method", ["pes", "tbptt"])
def test_losses_are_normalised_by_that_of_the_first_step_in_training_mode(method):
    task = batchnorm_task()
    config = {"pes": meta.PESConfig, "tbptt": meta.TBPTTConfig}[method](normalised=True, **WINDOWS)
    trainer = config.trainer(momentum_sgd(), single(task))
    key = jax.random.key(0)
    state = trainer.init(key, THETA)
    unit = state.runs[0].unit.ravel()[0]
    k_start = jax.random.split(key)[0] if method == "pes" else key
    shape = (1, 16, 1) if method == "pes" else (1, 1)
    start = starts(single(task), jax.random.split(k_start, shape)[0])
    while start.key.ndim:
        start = first(start)
    batches = task.sample(jax.random.split(start.key)[1], (4,), "train")
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], batches) for i in range(4)]
    stats = start.model_state["batch_stats"]
    expected = np.mean([loss_fn(start.params, stats, batch)[0] for batch in each])
    np.testing.assert_allclose(unit, expected, rtol=1e-4)


def windows_trainer(method, spread=None):
    """The meta-trainer by "nes", "pes" or "tbptt", of four pairs or runs."""
    config = {
        "nes": meta.NESConfig(population=8, tasks=1, min_steps=3, max_steps=3),
        "pes": meta.PESConfig(population=8, lr=0.1, **WINDOWS),
        "tbptt": meta.TBPTTConfig(lr=0.1, **{**WINDOWS, "tasks": 4}),
    }[method]
    return config.trainer(momentum_sgd(), single(batchnorm_task(RATE)), spread or devices.Spread())


def steps_of(trainer, number=2):
    state, step = trainer.init(jax.random.key(0), THETA), jax.jit(trainer.step)
    for key in jax.random.split(jax.random.key(9), number):
        state, metrics = step(key, state)
    return jax.tree.leaves(jax.device_get((state, metrics)))


def on_devices(file):
    """The main function of a child with four devices: every method, over all of them."""
    children.prepare(None, 4)
    spread = devices.Spread(devices.mesh_for(4, 1))
    results = {}
    for method in ("nes", "pes", "tbptt"):
        for number, leaf in enumerate(steps_of(windows_trainer(method, spread))):
            results[f"{method} {number}"] = np.asarray(leaf)
    np.savez(file, **results)


def test_four_devices_give_what_one_gives(tmp_path):
    file = tmp_path / "results.npz"
    assert children.finish(children.start(on_devices, file)) == [0]
    found = np.load(file)
    for method in ("nes", "pes", "tbptt"):
        for number, leaf in enumerate(steps_of(windows_trainer(method))):
            np.testing.assert_allclose(found[f"{method} {number}"], leaf, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["pes", "tbptt"])
def test_a_resumed_run_goes_on_with_the_running_statistics(tmp_path, method):
    def run(out, steps):
        return loop.train(
            windows_trainer(method),
            THETA,
            steps=steps,
            seed=0,
            out=tmp_path / out,
            config={},
            validate=lambda theta, key: theta[0],
            checkpoint_every=1,
        )

    run("parts", 2)
    np.testing.assert_array_equal(run("parts", 4)[0], run("whole", 4)[0])
    ends = [children.final_checksum(tmp_path / out) for out in ("parts", "whole")]
    assert ends[0] == ends[1] and ends[0][0] == 4
