"""Points of baselines against optax, and where they are judged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stateful

from metaopt import optimizers, tasks
from metaopt.datasets import moons
from metaopt.evaluation.baselines import BASELINES, SCHEDULES, chosen, groups_of
from metaopt.evaluation.contenders import adversary, guarded
from metaopt.evaluation.curves import evaluate
from metaopt.evaluation.tuning import tune
from metaopt.tasks import networks, quadratic

TASK = quadratic(dim=4)
KEYS = jax.random.split(jax.random.key(0), 3)


def test_a_point_becomes_its_transformation():
    point = {"schedule": "power", "lr": 3.0, "tau": 50.0}
    tx = chosen(BASELINES["sgd-lgl2o"], point)(100)
    state = tx.init(jnp.zeros(2))
    for count in range(3):
        updates, state = tx.update(jnp.ones(2), state)
        np.testing.assert_allclose(updates, -3.0 / (count / 50.0 + 1) ** 1.5, rtol=1e-6)


def test_schedules_keep_their_last_rate_beyond_the_horizon():
    tx = chosen(BASELINES["sgd"], {"schedule": "cosine", "lr": 1.0})(4)
    state = tx.init(jnp.zeros(2))
    rates = []
    for _ in range(6):
        updates, state = tx.update(jnp.ones(2), state)
        rates.append(-float(updates[0]))
    last = 0.5 * (1 + np.cos(np.pi * 3 / 4))
    np.testing.assert_allclose(rates[3:], last, rtol=1e-6)


def trajectory(tx, params, num_steps):
    """Params after each step on gradients that depend on them."""
    slope = jax.grad(
        lambda params: sum(jnp.sum(jnp.cos(x) + x**2) for x in jax.tree.leaves(params))
    )
    state, update, path = tx.init(params), jax.jit(tx.update), []
    for _ in range(num_steps):
        updates, state = update(slope(params), state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


PARAMS = {"a": {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)}, "b": jnp.array([0.5, -2.0])}


@pytest.mark.parametrize(
    "name, make",
    [
        ("adamw", optax.adamw),
        ("nadamw", optax.nadamw),
        ("lion", optax.lion),
        ("prodigy", optax.contrib.prodigy),
        ("schedule-free-adamw", optax.contrib.schedule_free_adamw),
    ],
)
def test_a_point_with_weight_decay_is_optax_s_own(name, make):
    point = {"schedule": "warmup_cosine", "lr": 0.1, "weight_decay": 0.3}
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 30)
    found = trajectory(chosen(BASELINES[name], point)(30), PARAMS, 30)
    expected = trajectory(make(schedule, weight_decay=0.3), PARAMS, 30)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), found, expected)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 95])
def test_warm_ups_are_those_of_optax(num_steps):
    counts = np.arange(num_steps)
    table = lambda name: [float(SCHEDULES[name](num_steps, lr=0.3)(count)) for count in counts]
    for name, make, share in (
        ("warmup_cosine", optax.warmup_cosine_decay_schedule, 0.1),
        ("warmup_constant", optax.warmup_constant_schedule, 0.05),
    ):
        steps = min(max(round(share * num_steps), 1), num_steps - 1)
        more = (num_steps,) if "cosine" in name else ()
        expected = [float(make(0.0, 0.3, steps, *more)(count)) for count in counts]
        np.testing.assert_allclose(table(name), expected, rtol=1e-6)
    assert num_steps < 10 or table("warmup_cosine")[0] == 0 == table("warmup_constant")[0]


SCHEDULE_FREE = chosen(
    BASELINES["schedule-free-adamw"],
    {"schedule": "warmup_constant", "lr": 0.1, "weight_decay": 0.01},
)


def schedule_free_by_hand(key):
    """Losses at the evaluation point and at the params after every fifth of 20 steps."""
    tx = optax.contrib.schedule_free_adamw(0.1, warmup_steps=1, weight_decay=0.01)
    _, k_init, k_windows = jax.random.split(key, 3)
    params = TASK.init(k_init)
    state, whole = tx.init(params), TASK.whole("test")
    judged = [TASK.loss(params, whole)]
    held = list(judged)
    update, gradient = jax.jit(tx.update), jax.jit(jax.grad(TASK.loss))
    for k_train, _ in jax.random.split(k_windows, (4, 2)):
        for batch in TASK.sample(k_train, (5,)):
            updates, state = update(gradient(params, batch), state, params)
            params = optax.apply_updates(params, updates)
        at = optax.contrib.schedule_free_eval_params(state, params)
        judged.append(TASK.loss(at, whole))
        held.append(TASK.loss(params, whole))
    return judged, held


RUN = {"num_steps": 20, "keys": KEYS, "window": 5}


def test_schedule_free_is_judged_at_its_evaluation_point():
    curves = evaluate(SCHEDULE_FREE, TASK, **RUN)
    judged, held = np.swapaxes([schedule_free_by_hand(key) for key in KEYS], 0, 1)
    np.testing.assert_allclose(curves.loss, judged, rtol=1e-4)
    assert np.all(np.abs(held[:, 1:] / judged[:, 1:] - 1) > 1e-3)
    record, grid = tune(BASELINES["schedule-free-adamw"], TASK, **RUN)
    index = record["grid"].index({"schedule": "warmup_constant", "lr": 0.1, "weight_decay": 0.01})
    ends = evaluate(SCHEDULE_FREE, TASK, split="valid", **RUN).loss
    np.testing.assert_allclose(grid.loss[index], ends, rtol=1e-4)


@pytest.mark.parametrize("guard", ["race", "lgl2o", "gl2o"])
def test_a_guard_that_keeps_schedule_free_is_judged_where_that_is(guard):
    contender = guarded(
        adversary("nan"), guard, "Schedule-free AdamW", SCHEDULE_FREE, 5, as_in_papers=True
    )
    found = evaluate(contender.make, TASK, eval_params=contender.eval_params, **RUN)
    np.testing.assert_allclose(found.loss, evaluate(SCHEDULE_FREE, TASK, **RUN).loss, rtol=1e-4)


def test_a_guard_whose_learned_optimizer_leads_is_judged_at_its_params():
    still = chosen(
        BASELINES["schedule-free-adamw"], {"schedule": "constant", "lr": 0.0, "weight_decay": 0.0}
    )
    learned = adversary("nan")._replace(optimizer=optimizers.sgd(0.3, tau=None))
    contender = guarded(learned, "race", "Schedule-free AdamW", still, 5)
    found = evaluate(
        contender.make, TASK, eval_params=contender.eval_params, diagnostics=("leader",), **RUN
    )
    ahead = found.state["leader"] == 0
    sgd = evaluate(lambda n: optax.sgd(0.3), TASK, **RUN)
    assert ahead[:, -1].all()
    np.testing.assert_allclose(found.loss[:, 1:][ahead], sgd.loss[:, 1:][ahead], rtol=1e-4)


def test_schedule_free_on_a_task_with_running_statistics():
    curves = evaluate(SCHEDULE_FREE, stateful.batchnorm_task(), **RUN)
    assert np.isfinite(curves.loss).all() and curves.loss[:, -1].mean() < curves.loss[:, 0].mean()


def test_every_leaf_takes_the_rate_of_its_group():
    point = {"schedule": "cosine", "lr": {"a": 0.3, "b": 0.01}, "weight_decay": 0.2}
    found = trajectory(chosen(BASELINES["adamw-groups"], point)(20), PARAMS, 20)
    for group, lr in point["lr"].items():
        tx = optax.adamw(optax.cosine_decay_schedule(lr, 20), weight_decay=0.2)
        expected = trajectory(tx, PARAMS[group], 20)
        for step, params in enumerate(expected):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                found[step][group],
                params,
            )


@pytest.mark.parametrize(
    "params, groups",
    [
        (PARAMS, {"a": {"w": "a"}, "b": "b"}),
        ({"params": PARAMS}, {"params": {"a": {"w": "params/a"}, "b": "params/b"}}),
        (
            {"head": {"kernel": 0, "bias": 0}},
            {"head": {"kernel": "head/kernel", "bias": "head/bias"}},
        ),
        (jnp.zeros(3), "vectors"),
        ((jnp.zeros((2, 2)),), ("matrices",)),
        (
            {f"layer_{i}": {"w": np.zeros((2, 2)), "b": 0} for i in range(9)},
            {f"layer_{i}": {"w": "matrices", "b": "vectors"} for i in range(9)},
        ),
        (
            {**{str(i): 0 for i in range(8)}, "token": {"embedding": np.zeros((3, 2))}},
            {**{str(i): "vectors" for i in range(8)}, "token": {"embedding": "embeddings"}},
        ),
    ],
    ids=["layers", "one key", "one layer", "an array", "a matrix", "many layers", "embeddings"],
)
def test_groups_of_leaves(params, groups):
    assert groups_of(params) == groups


def test_head_only_baselines_train_the_head_only():
    task = tasks.classification(networks.MLP((8, 2)), moons(), batch_size=32)
    params = jax.jit(task.init)(jax.random.key(0))
    baseline = BASELINES["adam-l3rs-head"]
    tx = chosen(baseline, {"schedule": "constant", "lr": 1e-2}, head="Dense_1")(10)
    slope = jax.jit(lambda params, key: jax.grad(task.loss)(params, task.sample(key, ())))
    updates, _ = tx.update(slope(params, jax.random.key(1)), tx.init(params), params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates["Dense_0"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(updates["Dense_1"]))


@pytest.mark.parametrize("name", [n for n in BASELINES if not BASELINES[n].head_only])
def test_built_in_baselines_can_be_tuned(name):
    record, grid = tune(BASELINES[name], TASK, num_steps=10, keys=KEYS[:1])
    baseline = BASELINES[name]
    assert len(baseline.grid) <= 30 and record["grid"][: len(baseline.grid)] == list(baseline.grid)
    assert len(record["loss"]) == len(grid.loss) == len(record["grid"])
    assert len(record["grid"]) >= len(baseline.grid) + baseline.draws


def test_muon_takes_the_kernel_of_a_convolution_as_a_matrix():
    make = BASELINES["muon"].make
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 4))
    grads = jax.random.normal(jax.random.key(1), kernel.shape)
    ours, plain = make(lambda count: 0.1), optax.contrib.muon(0.1)
    matrix = lambda x: x.reshape(18, 4)
    step, _ = jax.jit(ours.update)(grads, ours.init(kernel), kernel)
    expected, _ = jax.jit(plain.update)(matrix(grads), plain.init(matrix(kernel)), matrix(kernel))
    np.testing.assert_allclose(matrix(step), expected, atol=1e-5)
