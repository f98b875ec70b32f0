"""NES: exact properties of ranks, estimator and schedules, on losses known in closed form."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evosax.algorithms.distribution_based import distribution_based_algorithms
from structures import falling, geometric

from metaopt.core.types import LearnedOptimizer, Task, single
from metaopt.meta import NESConfig, nes
from metaopt.meta.nes import draw_steps
from metaopt.meta.strategies import GRADIENT, STRATEGIES, UNFIT
from metaopt.meta.updates import centered_ranks, decayed
from metaopt.optimizers import l3rs, sgd
from metaopt.tasks import quadratic


def probe(loss_of_theta):
    """An optimizer and a task of one step, after which the loss is ``loss_of_theta(theta)``."""

    def init_theta(key, params):
        return {"x": jnp.arange(4.0), "y": jnp.float32(2.0)}

    def apply(theta, *, num_steps=None):
        tx = sgd(0.0, tau=None).apply({})
        jump = lambda g, s, p=None, **extra: (loss_of_theta(theta) - p, s)
        return tx._replace(update=jump)

    lopt = LearnedOptimizer(init_theta, apply)
    task = Task(
        init=lambda key: jnp.float32(0.0),
        loss=lambda params, batch: params,
        sample=lambda key, shape, split="train": jnp.zeros((*shape, 1)),
        whole=lambda split="test": jnp.zeros(1),
    )
    return lopt, single(task), init_theta(None, None)


def flat(theta):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(theta)])


def train(loss_of_theta, steps=1, **settings):
    lopt, family, theta = probe(loss_of_theta)
    config = NESConfig(**{"min_steps": 1, "max_steps": 1, "tasks": 2, "population": 16, **settings})
    trainer = nes(lopt, family, config)
    state, step = trainer.init(jax.random.key(0), theta), jax.jit(trainer.step)
    metrics = {}
    for i in range(steps):
        state, metrics = step(jax.random.fold_in(jax.random.key(1), i), state)
    return theta, trainer.theta(state), metrics, step


def test_constant_fitness_moves_nothing():
    theta, after, metrics, _ = train(lambda theta: jnp.float32(3.0), steps=3)
    np.testing.assert_array_equal(flat(after), flat(theta))
    assert metrics["grad_norm"] == 0


def test_antithetic_pairs_of_equal_fitness_cancel():
    _, _, even, _ = train(lambda theta: theta["x"][0] ** 2)  # theta["x"][0] starts at 0
    _, _, slope, _ = train(lambda theta: theta["x"][0])
    assert even["grad_norm"] < 1e-5 * slope["grad_norm"]  # to the rounding of theta + noise


def test_centered_ranks_average_ties_and_sum_to_zero():
    losses = jnp.array([3.0, 1.0, jnp.inf, 1.0, jnp.inf, 2.0])
    ranks = np.array([3.0, 0.5, 4.5, 0.5, 4.5, 2.0])
    np.testing.assert_allclose(centered_ranks(losses), ranks / 5 - 0.5, rtol=1e-6)
    np.testing.assert_array_equal(centered_ranks(jnp.ones(16)), np.zeros(16))
    spread = centered_ranks(jax.random.normal(jax.random.key(0), (32,)))
    assert (spread.min(), spread.max()) == (-0.5, 0.5)
    np.testing.assert_allclose(jnp.sum(spread), 0.0, atol=1e-6)


@pytest.mark.parametrize("monotone", [lambda x: x, lambda x: 5.0 * x - 100.0, jnp.arcsinh])
def test_only_ranks_of_the_fitness_count(monotone):
    loss = lambda theta: jnp.sum(theta["x"] * jnp.array([1.0, -2.0, 0.5, 0.0])) + theta["y"]
    _, plain, _, _ = train(loss)
    _, mapped, _, _ = train(lambda theta: monotone(loss(theta)))
    np.testing.assert_array_equal(flat(plain), flat(mapped))


def test_linear_loss_falls_at_the_rate_of_adam():
    theta, after, _, _ = train(lambda theta: theta["y"], steps=5, lr=0.1, population=256)
    moved = after["y"] - theta["y"]
    np.testing.assert_allclose(moved, -0.5, rtol=0.02)  # Adam's step is lr where the sign is sure


def test_sgd_steps_along_the_estimate_and_weight_decay_shrinks_theta():
    slope = lambda theta: theta["y"]
    for decay in (0.0, 2.0):
        settings = {"optimizer": "sgd", "lr": 0.01, "half_life": 0, "weight_decay": decay}
        theta, after, metrics, _ = train(slope, **settings)
        moved = (flat(after) - (1 - 0.01 * decay) * flat(theta)) / -0.01
        np.testing.assert_allclose(np.linalg.norm(moved), metrics["grad_norm"], rtol=1e-3)
        # Of ranks of one coordinate: E[rank * noise] / sigma = 1 / (2 sqrt(pi)) / sigma, n large.
        np.testing.assert_allclose(moved[-1], 0.5 / np.pi**0.5 / 0.05, rtol=0.5)


def test_the_strategies_are_those_of_evosax_but_for_the_unfit_with_their_reasons():
    there = set(distribution_based_algorithms)
    assert set(UNFIT) <= there
    assert sorted(STRATEGIES) == sorted(there - set(UNFIT))
    assert set(GRADIENT) <= set(STRATEGIES)
    for name, reason in UNFIT.items():
        with pytest.raises(ValueError, match=re.escape(f"{name}: {reason}")):
            NESConfig(strategy=name)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.filterwarnings("error")
def test_every_strategy_moves_theta_beside_a_cliff(name):
    """Some of the candidates are NaN; the others say where to go."""

    def loss(theta):
        far = jnp.sum((theta["x"] - jnp.arange(4.0)) ** 2)
        return jnp.where(theta["y"] > 2.02, jnp.nan, theta["y"] + far)

    theta, after, metrics, _ = train(loss, strategy=name, population=16, sigma=0.05, tasks=1)
    assert np.isfinite(flat(after)).all()
    assert (flat(after) != flat(theta)).any()
    assert np.abs(flat(after) - flat(theta)).max() < 0.5
    assert 0 < metrics["non_finite"] < 16
    assert np.isfinite(metrics["meta_loss"])
    assert ("grad_norm" in metrics) == ("lr" in metrics) == (name in GRADIENT)
    if name != "GradientlessDescent":  # it draws from radii of its own
        np.testing.assert_allclose(metrics["sigma"], 0.05, rtol=1e-5)
        np.testing.assert_array_less(metrics["meta_loss_std"], 0.2)


def test_unknown_and_unfit_strategies_are_named():
    with pytest.raises(ValueError, match="Open_ES"):
        NESConfig(strategy="OpenES")
    with pytest.raises(ValueError, match=r"PersistentES.*meta\.pes"):
        NESConfig(strategy="PersistentES")
    with pytest.raises(ValueError, match="at least 4"):
        NESConfig(strategy="ESMC", population=2)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("objective", ["final", "trajectory", "normalised", "anytime"])
def test_non_finite_candidates_rank_worst_and_are_counted(bad, objective):
    cliff = lambda theta: jnp.where(theta["y"] > 2.0, bad, 1.0)
    steps = 8 if objective == "anytime" else 2
    settings = {"population": 64, "objective": objective, "min_steps": steps, "max_steps": steps}
    theta, after, metrics, _ = train(cliff, **settings)
    assert after["y"] < theta["y"]
    assert np.isfinite(flat(after)).all()
    assert metrics["non_finite"] == 32  # of each antithetic pair just one falls off the cliff
    # The loss is 0 at the start and 1 after any step; a start of 0 counts as 1e-8.
    expected = {"final": 1.0, "trajectory": 0.5, "normalised": 1e8, "anytime": 0.0}[objective]
    np.testing.assert_allclose(metrics["meta_loss"], expected, rtol=1e-6)


@pytest.mark.parametrize("objective", ["final", "trajectory", "normalised"])
def test_a_generation_without_a_finite_candidate_leaves_theta(objective):
    void = lambda theta: jnp.nan * theta["y"]
    settings = {"objective": objective, "min_steps": 2, "max_steps": 2}
    theta, after, metrics, _ = train(void, steps=2, **settings)
    np.testing.assert_array_equal(flat(after), flat(theta))
    assert metrics["non_finite"] == 16
    np.testing.assert_allclose(metrics["sigma"], 0.05)  # such generations do not age the schedule


def test_a_mixture_of_structures_is_the_mean_over_its_groups():
    (lopt, theta), families = geometric(), [falling(4.0, 3), falling(32.0, 5)]
    measured = {}
    for objective in ("final", "normalised"):
        config = NESConfig(
            population=2, tasks=2, min_steps=2, max_steps=2, sigma=1e-6, objective=objective
        )
        trainer = nes(lopt, families, config)
        state = trainer.init(jax.random.key(0), theta)
        _, metrics = jax.jit(trainer.step)(jax.random.key(0), state)
        measured[objective] = metrics["meta_loss"]
        assert metrics["inner_steps"] == 2 * 2 * 2 * 2
    np.testing.assert_allclose(measured["final"], (4.0 + 32.0) / 2 * 0.25, rtol=1e-4)
    np.testing.assert_allclose(measured["normalised"], 0.25, rtol=1e-4)


def test_a_task_is_the_family_that_always_gives_it():
    lopt, family, theta = probe(lambda theta: jnp.sum(jnp.square(theta["x"])))
    config = NESConfig(population=4, tasks=1, min_steps=1, max_steps=1)

    def after_a_step(families):
        trainer = nes(lopt, families, config)
        state = trainer.init(jax.random.key(0), theta)
        return flat(trainer.theta(jax.jit(trainer.step)(jax.random.key(1), state)[0]))

    expected = after_a_step(family)
    assert np.any(expected != flat(theta))
    for families in (family.data, [family.data]):
        np.testing.assert_array_equal(after_a_step(families), expected)


def test_a_theta_that_cannot_serve_all_structures_is_named():
    lopt, first = l3rs(("sgd",)), quadratic(dim=3)
    other = first.replace(
        init=lambda key: {"w": jnp.ones(3)},
        loss=lambda params, batch: first.loss(params["w"], batch),
    )
    theta = lopt.init(jax.random.key(0), jnp.zeros(3))
    with pytest.raises(ValueError, match=r'task group 2 of 2.*variant="none"'):
        trainer = nes(lopt, [single(first), single(other)], NESConfig())
        trainer.init(jax.random.key(0), theta)
    with pytest.raises(ValueError, match="families is empty"):
        nes(lopt, [], NESConfig())


def test_sigma_and_rate_are_halved_smoothly():
    value = decayed(0.2, 500)
    np.testing.assert_allclose([value(0), value(250), value(500)], [0.2, 0.2 / 2**0.5, 0.1])
    np.testing.assert_allclose(decayed(0.2, 0)(1000), 0.2)


def test_population_has_the_sigma_of_its_own_generation():
    """evosax reads its schedule one generation late; the metrics name what is used."""
    spread = lambda theta: theta["y"]
    _, _, first, _ = train(spread, steps=1, population=4096, half_life=1, sigma=0.2, lr=1e-6)
    _, _, second, _ = train(spread, steps=2, population=4096, half_life=1, sigma=0.2, lr=1e-6)
    np.testing.assert_allclose(first["meta_loss_std"], 0.2, rtol=0.05)
    np.testing.assert_allclose(second["meta_loss_std"], 0.1, rtol=0.05)
    np.testing.assert_allclose([first["sigma"], second["sigma"]], [0.2, 0.1])


def test_later_generations_do_not_compile_again_whatever_the_number_of_steps():
    _, _, _, step = train(lambda theta: theta["y"], steps=4, min_steps=1, max_steps=7)
    assert step._cache_size() == 1


def test_objective_trajectory_is_the_mean_training_loss():
    lopt, family, theta = probe(lambda theta: theta["y"])
    config = NESConfig(
        population=2, tasks=1, min_steps=4, max_steps=4, sigma=1e-6, objective="trajectory"
    )
    trainer = nes(lopt, family, config)
    _, metrics = trainer.step(jax.random.key(0), trainer.init(jax.random.key(0), theta))
    np.testing.assert_allclose(metrics["meta_loss"], 2.0 * 3 / 4, rtol=1e-4)  # 0, 2, 2, 2


@pytest.mark.parametrize("num_steps", [2, 7, 8])
def test_objective_anytime_is_the_mean_log_loss_after_each_quarter(num_steps):
    lopt, theta = geometric()  # each step halves the loss
    config = NESConfig(
        population=2,
        tasks=1,
        min_steps=num_steps,
        max_steps=num_steps,
        sigma=1e-6,
        objective="anytime",
    )
    trainer = nes(lopt, falling(4.0, 3), config)
    _, metrics = jax.jit(trainer.step)(jax.random.key(0), trainer.init(jax.random.key(0), theta))
    expected = np.mean([np.log(4.0 * 0.5 ** (num_steps * part // 4)) for part in (1, 2, 3, 4)])
    np.testing.assert_allclose(metrics["meta_loss"], expected, rtol=1e-4)


def test_lengths_are_drawn_as_the_settings_say():
    keys = jax.random.split(jax.random.key(0), 20_000)

    def drawn(lengths):
        config = NESConfig(min_steps=10, max_steps=1000, lengths=lengths)
        return np.asarray(jax.vmap(lambda key: draw_steps(config, key))(keys))

    for steps in (drawn("uniform"), drawn("log_uniform")):
        assert (steps.min(), steps.max()) == (10, 1000)
    np.testing.assert_allclose(drawn("uniform").mean(), 505, rtol=0.02)
    np.testing.assert_allclose((drawn("log_uniform") < 100).mean(), 0.5, atol=0.02)


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"population": 3}, "population must be even"),
        ({"population": 0}, "population"),
        ({"tasks": 0}, "tasks"),
        ({"sigma": 0.0}, "sigma"),
        ({"lr": float("nan")}, "lr"),
        ({"min_steps": 0}, "min_steps"),
        ({"min_steps": 5, "max_steps": 4}, "max_steps"),
        ({"half_life": -1}, "half_life"),
    ],
)
def test_bad_settings_are_named(settings, name):
    with pytest.raises(ValueError, match=name):
        NESConfig(**settings)


def test_nothing_to_train_is_an_error():
    lopt, family, _ = probe(lambda theta: jnp.float32(0))
    with pytest.raises(ValueError, match="empty"):
        nes(lopt, family, NESConfig()).init(jax.random.key(0), {})
