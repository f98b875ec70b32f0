"""Curves against a loop written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stateful

from metaopt import datasets, guards, tasks
from metaopt.core import cpu, memory
from metaopt.core.types import Task
from metaopt.evaluation import curves as curves_module
from metaopt.evaluation.curves import begin, evaluate
from metaopt.tasks import quadratic

TASK = quadratic(dim=4)
KEYS = jax.random.split(jax.random.key(0), 3)


def by_hand(lr, key, num_steps, window):
    """The same run step by step, with numpy's arithmetic."""
    _, k_init, k_windows = jax.random.split(key, 3)
    h = np.geomspace(0.1, 1.0, 4)
    x = np.asarray(TASK.init(k_init), np.float64)
    losses = [0.5 * np.sum(h * x**2)]
    for k_train, _ in jax.random.split(k_windows, (num_steps // window, 2)):
        for batch in np.asarray(TASK.sample(k_train, (window,)), np.float64):
            x = x - lr * (h * x + batch)
        losses.append(0.5 * np.sum(h * x**2))
    return losses


@pytest.mark.parametrize("long", [0, curves_module.LONG], ids=["seeds in a loop", "side by side"])
def test_curves_are_those_of_the_loop_that_users_write(monkeypatch, long):
    monkeypatch.setattr(curves_module, "LONG", long)
    curves = evaluate(lambda n: optax.sgd(0.2), TASK, num_steps=20, keys=KEYS, window=5)
    np.testing.assert_array_equal(curves.steps, [0, 5, 10, 15, 20])
    np.testing.assert_array_equal(curves.grad_evals, curves.steps)
    expected = [by_hand(0.2, key, 20, 5) for key in KEYS]
    np.testing.assert_allclose(curves.loss, expected, rtol=1e-4)
    assert np.isnan(curves.accuracy).all() and np.isnan(curves.train_loss).all()
    assert curves.seconds[0] == 0 and (np.diff(curves.seconds) > 0).all()


@pytest.mark.parametrize("part", ["a measurement on the test split", "a window"])
def test_what_needs_more_memory_than_there_is_is_told_before_it_runs(monkeypatch, part):
    starts = begin(TASK, KEYS)
    measurement = cpu.memory_of(
        *(curves_module._measure, starts.family, starts.task_params, (starts.params,), None),
        split="test",
    )
    there = measurement - 1 if "split" in part else measurement
    monkeypatch.setattr(memory, "available", lambda device: there)
    ticks = []
    with pytest.raises(MemoryError, match=f"^{part} of all seeds needs about .*give fewer seeds"):
        evaluate(lambda n: optax.adam(0.2), TASK, num_steps=20, keys=KEYS, progress=ticks.append)
    assert ticks == []


def test_measuring_less_often_changes_nothing_else():
    often, seldom = (
        evaluate(
            lambda n: optax.sgd(0.2, momentum=0.5),
            TASK,
            num_steps=20,
            keys=KEYS,
            window=5,
            measure_every=every,
            diagnostics=("trace",),
        )
        for every in (1, 2)
    )
    np.testing.assert_array_equal(seldom.steps, [0, 10, 20])
    np.testing.assert_array_equal(seldom.grad_evals, [0, 10, 20])
    np.testing.assert_array_equal(seldom.loss, often.loss[:, ::2])
    np.testing.assert_array_equal(seldom.windows, [5, 10, 15, 20])
    np.testing.assert_array_equal(seldom.state["trace"], often.state["trace"])
    assert len(seldom.seconds) == 3


def test_a_guard_in_window_form_is_given_additional_mini_batches_as_in_papers():
    plain = evaluate(lambda n: optax.sgd(0.2), TASK, num_steps=20, keys=KEYS)
    guarded = evaluate(
        lambda n: guards.in_windows(guards.lgl2o(optax.sgd(jnp.nan), optax.sgd(0.2))),
        TASK,
        num_steps=20,
        keys=KEYS,
        diagnostics=("accepted",),
    )
    np.testing.assert_allclose(guarded.loss, plain.loss, rtol=1e-5)
    assert guarded.state["accepted"].shape == (3, 2) and not guarded.state["accepted"].any()
    np.testing.assert_array_equal(guarded.grad_evals, [0, 20, 40])  # both candidates


@pytest.mark.parametrize("long", [0, curves_module.LONG], ids=["seeds in a loop", "side by side"])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: guards.lgl2o(optax.sgd(0.3), optax.sgd(0.1), n_t=2, n_c=1),
        lambda n: guards.race(optax.sgd(0.3), optax.adam(0.1), n_t=4),
        lambda n: guards.gl2o(optax.sgd(0.3), optax.sgd(0.1)),
    ],
    ids=["lgl2o", "race", "gl2o"],
)
def test_a_guard_takes_the_stream_as_in_a_users_loop(monkeypatch, make, long):
    """Windows of the guard end within those of the evaluation."""
    monkeypatch.setattr(curves_module, "LONG", long)
    curves = evaluate(make, TASK, num_steps=20, keys=KEYS, window=5, diagnostics=("winner",))
    tx = make(20)

    @jax.jit
    def window(params, state, batches):
        for batch in batches:
            value_fn = lambda p, batch=batch: TASK.loss(p, batch)
            updates, state = tx.update(None, state, params, value_fn=value_fn)
            params = optax.apply_updates(params, updates)
        return params, state, TASK.loss(params, TASK.whole("test"))

    for seed, key in enumerate(KEYS):
        _, k_init, k_windows = jax.random.split(key, 3)
        params = TASK.init(k_init)
        state, losses = tx.init(params), [TASK.loss(params, TASK.whole("test"))]
        for k_train, _ in jax.random.split(k_windows, (4, 2)):
            params, state, loss = window(params, state, TASK.sample(k_train, (5,)))
            losses.append(loss)
        np.testing.assert_allclose(curves.loss[seed], losses, rtol=1e-4)
        assert curves.state["winner"][seed, -1] == guards.info(state).winner
        assert curves.grad_evals[-1] >= guards.info(state).gradient_evals


def held_out_batches(task, key, number):
    """The validation split in `number` parts, or as many mini-batches if the split is larger."""
    if task is TASK:
        return task.sample(key, (number,), "valid")
    whole, batch_size = task.whole("valid"), len(task.sample(key, (), "valid")["y"])
    if len(whole["y"]) > number * batch_size:
        return task.sample(key, (number,), "valid")
    last = len(whole["y"]) // number * number
    parts = [jax.tree.map(lambda a, i=i: a[i:last:number], whole) for i in range(number)]
    return jax.tree.map(lambda *a: jnp.stack(a), *parts)


@pytest.mark.parametrize(
    "case, seeds",
    [
        ("quadratic", "in a loop"),
        ("quadratic", "side by side"),
        ("whole split", "in a loop"),
        ("whole split", "side by side"),
        ("mini-batches of a large split", "in a loop"),
        ("once per step", "side by side"),
    ],
)
def test_a_guard_decides_on_the_validation_split_as_in_a_users_loop(monkeypatch, case, seeds):
    """With a model state, on tasks with a large and a small split; on a noisy problem without."""
    monkeypatch.setattr(curves_module, "LONG", 0 if seeds == "in a loop" else curves_module.LONG)
    small = case in ("whole split", "once per step")
    task = TASK if case == "quadratic" else stateful.batchnorm_task(batch_size=64 if small else 4)
    every = 1 if case == "once per step" else 4
    tx = guards.race(optax.sgd(0.5), optax.adam(0.1), n_t=4, eval_every=every, overrule=0.5)
    settings = dict(num_steps=16, keys=KEYS, window=8, diagnostics=("winner", "loss_evals"))
    curves = evaluate(lambda n: tx, task, held_out=True, **settings)

    @jax.jit
    def window(params, state, batches, held_out):
        point = lambda p, *stats: (p, *stats)
        eval_fn = lambda *p: jnp.stack(
            [task.eval_loss(*p, jax.tree.map(lambda a, i=i: a[i], held_out)) for i in range(4)]
        )
        for index in range(8):
            batch = jax.tree.map(lambda a, index=index: a[index], batches)
            value_fn = lambda *p, batch=batch: task.loss(*point(*p), batch)
            updates, state = tx.update(None, state, params, value_fn=value_fn, eval_fn=eval_fn)
            params = optax.apply_updates(params, updates)
        return params, state

    for seed, key in enumerate(KEYS):
        _, k_init, k_windows = jax.random.split(key, 3)
        params = task.init(k_init)
        state, losses = tx.init(params, task.init_model_state(k_init)), [curves.loss[seed, 0]]
        for k_train, k_eval in jax.random.split(k_windows, (2, 2)):
            held_out = held_out_batches(task, k_eval, 4)
            params, state = window(params, state, task.sample(k_train, (8,)), held_out)
            arguments = (params,) if state.model_state is None else (params, state.model_state)
            losses.append(task.eval_loss(*arguments, task.whole("test")))
            assert curves.state["winner"][seed, len(losses) - 2] == state.info.winner
        np.testing.assert_allclose(curves.loss[seed], losses, rtol=1e-3)
        assert curves.state["loss_evals"][seed, -1] == state.info.loss_evals == 2 * 16 / every


def overfitting_task():
    """The training loss falls towards 1, the validation loss towards -1; the test split is NaN."""
    targets = {"train": 1.0, "valid": -1.0, "test": jnp.nan}
    return Task(
        init=lambda key: jnp.zeros(2),
        loss=lambda params, batch: jnp.mean((params - batch["y"]) ** 2),
        sample=lambda key, shape, split="train": {"y": jnp.full((*shape, 8, 1), targets[split])},
        whole=lambda split="test": {"y": jnp.full((40, 1), targets[split])},
    )


@pytest.mark.parametrize("overrule", [0.0, 1.0])
def test_held_out_decisions_leave_a_challenger_that_overfits(overrule):
    """And never see the test split, whose losses are NaN."""
    task, still = overfitting_task(), optax.sgd(0.001)
    make = lambda n: guards.race(optax.sgd(0.1), still, eval_every=10, overrule=overrule)
    run = lambda make, **given: evaluate(
        make, task, num_steps=200, keys=KEYS, split="valid", **given
    )
    fields = ("winner", "kept_start")
    followed = run(make, diagnostics=fields)
    assert (followed.state["winner"] == 0).all() and (followed.loss[:, -1] > 3.9).all()
    kept = run(make, diagnostics=fields, held_out=True)
    assert (kept.state["winner"] == 1).all()
    np.testing.assert_allclose(kept.loss, run(lambda n: still).loss, rtol=1e-6)
    for curves in (followed, kept):
        assert not curves.state["kept_start"].any()


def test_held_out_decisions_need_a_guard_as_users_run_it():
    in_windows = lambda n: guards.in_windows(guards.race(optax.sgd(0.1), optax.sgd(0.1)))
    with pytest.raises(ValueError, match="held_out takes a guard, not its window form"):
        evaluate(in_windows, TASK, num_steps=10, keys=KEYS, held_out=True)


def test_a_guard_that_validates_loses_mini_batches_to_training():
    """LGL2O around NaN is its fallback on every other ten mini-batches."""
    plain = evaluate(lambda n: optax.sgd(0.2), TASK, num_steps=40, keys=KEYS)
    guarded = evaluate(
        lambda n: guards.lgl2o(optax.sgd(jnp.nan), optax.sgd(0.2)), TASK, num_steps=40, keys=KEYS
    )
    np.testing.assert_array_equal(guarded.steps, plain.steps)
    np.testing.assert_allclose(guarded.loss[:, 1], guarded.loss[:, 0])  # no decision yet
    np.testing.assert_allclose(guarded.loss[:, 2], plain.loss[:, 1], rtol=1e-5)


def test_each_seed_of_a_family_is_a_task_of_its_own():
    family = tasks.mlp_family([datasets.moons(), datasets.circles()], widths=(2, 8))
    runs = begin(family, KEYS)
    for name in ("set", "width", "batch_size"):
        drawn = [int(family.sample(jax.random.split(key, 3)[0])[name]) for key in KEYS]
        np.testing.assert_array_equal(runs.task_params[name], drawn)
    curves = evaluate(lambda n: optax.sgd(0.0), family, num_steps=10, keys=KEYS)
    for seed in range(3):
        task = family.task(jax.tree.map(lambda x, seed=seed: x[seed], runs.task_params))
        params = jax.tree.map(lambda x, seed=seed: x[seed], runs.params)
        np.testing.assert_allclose(curves.loss[seed], task.loss(params, task.whole()), rtol=1e-5)


def test_training_loss_is_measured_on_the_training_split():
    n = 40
    split = lambda label: {"x": jnp.ones((n, 1)), "y": jnp.full(n, label)}
    data = datasets.Dataset("mine", {"train": split(0), "valid": split(1), "test": split(1)}, 2)
    from metaopt.tasks.networks import MLP

    task = tasks.classification(MLP((2,)), data, batch_size=4)
    curves = evaluate(lambda n: optax.sgd(0.5), task, num_steps=50, keys=KEYS, measure_train=True)
    assert (curves.train_loss[:, -1] < 0.1).all() and (curves.loss[:, -1] > 2.0).all()


RACES = {
    "sgd": lambda n: optax.sgd(0.3),
    "race": lambda n: guards.race(optax.sgd(jnp.nan), optax.sgd(0.3), n_t=5),
    "gl2o": lambda n: guards.gl2o(optax.sgd(jnp.nan), optax.sgd(0.3)),
    "lgl2o in windows": lambda n: guards.in_windows(
        guards.lgl2o(optax.sgd(jnp.nan), optax.sgd(0.3), n_t=5, n_c=5)
    ),
}


@pytest.mark.parametrize("name", RACES)
def test_a_task_with_running_statistics_is_judged_with_those_of_its_params(name):
    """Plain, and under guards that keep the fallback: the loop that a Flax user writes."""
    task = stateful.batchnorm_task()
    curves = evaluate(RACES[name], task, num_steps=15, keys=KEYS, window=5, measure_train=True)
    whole = task.whole("test")
    for seed, key in enumerate(KEYS):
        _, k_init, k_windows = jax.random.split(key, 3)
        params, stats = stateful.first_variables(k_init)
        losses, accuracies = [stateful.eval_loss(params, stats, whole)], [curves.accuracy[seed, 0]]
        for k_train, _ in jax.random.split(k_windows, (3, 2)):
            batches = task.sample(k_train, (5,))
            params, stats, _ = stateful.plain_loop(optax.sgd(0.3), params, stats, batches)
            losses.append(stateful.eval_loss(params, stats, whole))
            logits = stateful.Net().apply(
                {"params": params, "batch_stats": stats},
                stateful.moons().scale * whole["x"],
                train=False,
            )
            accuracies.append(np.mean(logits.argmax(-1) == whole["y"]))
        np.testing.assert_allclose(curves.loss[seed], losses, rtol=1e-4)
        np.testing.assert_allclose(curves.accuracy[seed], accuracies, rtol=1e-6)
        sample = task.sample(k_windows, (curves_module.TRAIN_SAMPLE,))
        each = [jax.tree.map(lambda x, i=i: x[i], sample) for i in range(len(sample["y"]))]
        mean = np.mean([stateful.eval_loss(params, stats, batch) for batch in each])
        np.testing.assert_allclose(curves.train_loss[seed, -1], mean, rtol=1e-4)


def test_the_horizon_reaches_the_optimizer():
    seen = []
    evaluate(lambda n: (seen.append(n), optax.sgd(0.1))[1], TASK, num_steps=30, keys=KEYS)
    assert set(seen) == {30}


@pytest.mark.parametrize("num_steps, every", [(0, 1), (7, 1), (15, 2)])
def test_num_steps_must_fill_windows(num_steps, every):
    with pytest.raises(ValueError, match=f"window=5 x measure_every={every}, got {num_steps}"):
        evaluate(
            lambda n: optax.sgd(0.1),
            TASK,
            num_steps=num_steps,
            keys=KEYS,
            window=5,
            measure_every=every,
        )
