"""Searches against hand-written runs, their extensions, and their cache."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stateful

from metaopt import tasks
from metaopt.datasets import moons
from metaopt.evaluation import tuning
from metaopt.evaluation.baselines import BASELINES, Baseline, points
from metaopt.evaluation.records import npz
from metaopt.evaluation.tuning import tune, tune_cached
from metaopt.tasks import networks, quadratic

TASK = quadratic(dim=4)
KEYS = jax.random.split(jax.random.key(0), 3)


def by_hand(tx, task, num_steps, window=10):
    """Validation loss after the last step of a plain optax loop, mean over the seeds."""
    losses = []
    gradient = jax.jit(jax.grad(task.loss))
    for key in KEYS:
        _, k_init, k_windows = jax.random.split(key, 3)
        x = task.init(k_init)
        state, update = tx.init(x), jax.jit(tx.update)
        for k_train, _ in jax.random.split(k_windows, (num_steps // window, 2)):
            for batch in task.sample(k_train, (window,)):
                updates, state = update(gradient(x, batch), state)
                x = optax.apply_updates(x, updates)
        losses.append(float(task.loss(x, task.whole("valid"))))
    return np.mean(losses)


def test_the_whole_grid_equals_single_runs():
    grid = points(("constant", "cosine"), lr=(0.01, 0.3))
    baseline = Baseline("Adam", optax.adam, grid, extends=False)
    record, grid = tune(baseline, TASK, num_steps=40, keys=KEYS, measure_every=2)
    expected = [
        by_hand(optax.adam(0.01), TASK, 40),
        by_hand(optax.adam(0.3), TASK, 40),
        by_hand(optax.adam(optax.cosine_decay_schedule(0.01, 40)), TASK, 40),
        by_hand(optax.adam(optax.cosine_decay_schedule(0.3, 40)), TASK, 40),
    ]
    np.testing.assert_allclose(record["loss"], expected, rtol=1e-4)
    assert record["point"] == record["grid"][int(np.argmin(expected))]
    np.testing.assert_allclose(grid.loss[:, :, -1].mean(axis=1), expected, rtol=1e-4)
    np.testing.assert_array_equal(grid.steps, [0, 20, 40])
    assert grid.loss.shape == (4, 3, 3)
    assert (record["runs"], record["grad_evals"]) == (12, 480)


def test_grids_are_searched_in_evaluation_mode():
    task = stateful.batchnorm_task(0.3)
    baseline = Baseline("SGD", optax.sgd, points(("constant",), lr=(0.03, 0.3)), extends=False)
    record, _ = tune(baseline, task, num_steps=10, keys=KEYS[:2])
    expected = []
    for lr in (0.03, 0.3):
        losses = []
        for key in KEYS[:2]:
            _, k_init, k_windows = jax.random.split(key, 3)
            batches = task.sample(jax.random.split(k_windows, (1, 2))[0, 0], (10,))
            params, stats, _ = stateful.plain_loop(
                optax.sgd(lr), *stateful.first_variables(k_init, 0.3), batches, 0.3
            )
            losses.append(stateful.eval_loss(params, stats, task.whole("valid"), 0.3))
        expected.append(np.mean(losses))
    np.testing.assert_allclose(record["loss"], expected, rtol=1e-4)


def test_a_point_that_diverges_never_wins():
    baseline = Baseline("SGD", optax.sgd, points(("constant",), lr=(1e20, 1e-3)), extends=False)
    record, _ = tune(baseline, TASK, num_steps=40, keys=KEYS)
    assert record["loss"][0] == np.inf and record["point"]["lr"] == 1e-3


def quadratic_losses(rates, num_steps=20):
    return [by_hand(optax.sgd(lr), TASK, num_steps) for lr in rates]


def of_rates(*rates, make=optax.sgd, **more):
    return Baseline("SGD", make, points(("constant",), lr=rates), **more)


class TestExtension:
    @pytest.mark.parametrize(
        "rates, found, extended, edge",
        [
            ((1e-3, 1e-2, 1e-1), (1.0, 10.0), 2, ""),
            ((40.0, 16.0, 8.0, 3.2), (1.6, 0.64, 0.32), 3, ""),
            ((1e-6, 1e-5), (1e-4, 1e-3, 1e-2), 3, "highest"),
            ((0.1, 1.0, 10.0), (), 0, ""),
        ],
        ids=["above", "below", "not far enough", "not needed"],
    )
    def test_a_best_rate_outside_of_the_grid_is_found(self, rates, found, extended, edge):
        record, grid = tune(of_rates(*rates), TASK, num_steps=20, keys=KEYS)
        assert [point["lr"] for point in record["grid"]] == [*rates, *found]
        expected = quadratic_losses([*rates, *found])
        np.testing.assert_allclose(record["loss"], expected, rtol=1e-3)
        assert record["point"]["lr"] == [*rates, *found][int(np.argmin(expected))]
        assert (record["extended"], record["edge"]) == (extended, edge)
        number = len(rates) + len(found)
        assert grid.loss.shape == (number, 3, 3)
        assert (record["runs"], record["grad_evals"]) == (3 * number, 60 * number)

    def test_it_goes_on_with_all_that_was_combined_with_the_rate(self):
        grid = points(("constant", "cosine"), lr=(1e-3, 1e-2), weight_decay=(0.0, 0.1))
        baseline = Baseline("AdamW", optax.adamw, grid)
        record, _ = tune(baseline, TASK, num_steps=10, keys=KEYS[:1])
        more = points(("constant", "cosine"), lr=(0.1,), weight_decay=(0.0, 0.1))
        assert tuple(record["grid"][8:12]) == more

    def test_the_grid_of_a_paper_stays_as_it_is(self):
        record, _ = tune(of_rates(1e-6, 1e-5, extends=False), TASK, num_steps=10, keys=KEYS[:1])
        assert len(record["grid"]) == 2
        assert (record["extended"], record["edge"]) == (0, "highest")
        papers = {name for name, baseline in BASELINES.items() if not baseline.extends}
        assert {n for n in BASELINES if "lgl2o" in n or "meta-guard" in n or "l3rs" in n} == papers
        assert {n for n, b in BASELINES.items() if "grid" in b.label} <= papers

    def test_a_search_that_diverges_everywhere_is_not_extended(self):
        record, _ = tune(of_rates(1e20, 1e21), TASK, num_steps=40, keys=KEYS[:1])
        assert record["loss"] == [np.inf, np.inf]
        assert (record["extended"], record["edge"]) == (0, "")

    @pytest.mark.parametrize("rates", [(0.1,), (0.0, 1e-4)])
    def test_one_rate_or_a_rate_of_zero_is_not_extended(self, rates):
        record, _ = tune(of_rates(*rates), TASK, num_steps=10, keys=KEYS[:1])
        assert len(record["grid"]) == len(rates)

    def test_it_compiles_nothing_anew(self):
        traced = []

        def make(schedule):
            traced.append(isinstance(schedule(0), jax.core.Tracer))
            return optax.sgd(schedule)

        record, _ = tune(of_rates(1e-6, 1e-5, make=make), TASK, num_steps=10, keys=KEYS[:1])
        assert record["extended"] == 3
        rounds = [index for index, is_traced in enumerate(traced) if not is_traced]
        assert len(rounds) == 4 and not any(traced[rounds[1] :])


def rounds_run(monkeypatch):
    """The rounds that are not read from the cache, as lists of points."""
    rounds, run_round = [], tuning._run_round
    monkeypatch.setattr(
        tuning, "_run_round", lambda *given: rounds.append(given[-1]) or run_round(*given)
    )
    return rounds


GROUPED = Baseline(
    "AdamW (groups)", optax.adamw, points(("constant",), lr=(0.01, 0.1, 1.0)), draws=6
)
MLP = tasks.classification(networks.MLP((4, 2)), moons(), batch_size=8)


class TestGroups:
    def test_draws_follow_the_grid(self):
        record, grid = tune(GROUPED, MLP, num_steps=20, keys=KEYS)
        first, drawn = record["grid"][:-6], record["grid"][-6:]
        losses = record["loss"][: len(first)]
        around = first[int(np.argmin(losses))]["lr"]
        factors = np.array([[p["lr"]["Dense_0"], p["lr"]["Dense_1"]] for p in drawn]) / around
        np.testing.assert_array_equal((factors == 1).sum(axis=1), [0, 1, 0, 1, 0, 1])
        assert np.all(factors > 0.01) and np.all(factors < 100)
        assert record["runs"] == 3 * len(record["grid"]) == 3 * len(grid.loss)
        assert record["point"] == record["grid"][int(np.argmin(record["loss"]))]
        again, _ = tune(GROUPED, MLP, num_steps=20, keys=KEYS)
        assert again["grid"] == record["grid"]

    def test_draws_run_in_one_program(self):
        traces = []
        for draws in (1, 6):
            traced = []

            def make(schedule, traced=traced):
                traced.append(isinstance(schedule(0), jax.core.Tracer))
                return optax.adamw(schedule)

            tune(GROUPED._replace(make=make, draws=draws), MLP, num_steps=10, keys=KEYS)
            traces.append(sum(traced))
        assert traces[0] == traces[1]

    def test_the_first_part_is_the_search_of_the_baseline_itself(self, tmp_path, monkeypatch):
        tune_cached(tmp_path, "mlp", GROUPED._replace(label="AdamW", draws=0), MLP, **SETTINGS)
        rounds = rounds_run(monkeypatch)
        tune_cached(tmp_path, "mlp", GROUPED, MLP, **SETTINGS)
        assert [len(points) for points in rounds] == [6]

    @pytest.mark.parametrize("kind", ["new head", "whole network"])
    def test_fine_tuning(self, kind):
        net = networks.MLP((4, 2))
        variables = net.init(jax.random.key(0), jnp.zeros((1, 2)))
        if kind == "new head":
            task = tasks.finetune(net, variables, moons(), head="Dense_1", batch_size=8)
            names = ("Dense_1/bias", "Dense_1/kernel")
        else:
            task = tasks.few_class(
                net, moons(), variables["params"], head="Dense_1", classes=(0, 1), ways=2
            )
            names = ("Dense_0", "Dense_1")
        assert tuning.group_names(task) == names
        record, _ = tune(GROUPED, task, num_steps=10, keys=KEYS)
        assert tuple(record["grid"][-1]["lr"]) == names
        assert np.isfinite(record["loss"]).all()


class TestReachable:
    """Whether a point that a file names can be the end of a search."""

    EXTENDING = of_rates(0.01, 0.1, 1.0)

    @pytest.mark.parametrize("lr", [0.01, 1.0, 1e-3, 1e-5, 10.0, 1000.0])
    def test_a_point_of_the_grid_or_of_an_extension_is(self, lr):
        assert tuning.is_reachable(self.EXTENDING, {"schedule": "constant", "lr": lr}, TASK)

    @pytest.mark.parametrize(
        "point",
        [
            {"schedule": "constant", "lr": 1e-6},
            {"schedule": "constant", "lr": 1e4},
            {"schedule": "constant", "lr": 5.0},
            {"schedule": "cosine", "lr": 0.1},
            {"schedule": "constant", "lr": 0.1, "weight_decay": 0.1},
            {"schedule": "constant", "lr": {"params": 0.1}},
            {"schedule": "constant"},
            {"lr": [[0.1]]},
            {},
            None,
            "lr",
            [1],
            float("nan"),
        ],
    )
    def test_another_is_not(self, point):
        assert not tuning.is_reachable(self.EXTENDING, point, TASK)
        assert not tuning.is_reachable(self.EXTENDING._replace(draws=5), point, TASK)

    def test_of_a_paper_only_the_grid_is(self):
        baseline = self.EXTENDING._replace(extends=False)
        assert tuning.is_reachable(baseline, {"schedule": "constant", "lr": 1.0}, TASK)
        assert not tuning.is_reachable(baseline, {"schedule": "constant", "lr": 10.0}, TASK)

    def test_of_draws_only_those_are(self):
        record, _ = tune(GROUPED, MLP, num_steps=10, keys=KEYS)
        for point in record["grid"]:
            assert tuning.is_reachable(GROUPED, point, MLP)
            rates = point["lr"]
            if isinstance(rates, dict):
                forged = {**point, "lr": {**rates, "Dense_0": 2 * rates["Dense_0"]}}
                assert not tuning.is_reachable(GROUPED, forged, MLP)


SEARCHED = Baseline("SGD", optax.sgd, points(("constant",), lr=(0.1, 0.3)), extends=False)
SETTINGS = {"num_steps": 10, "keys": KEYS, "window": 5}


class TestCache:
    @pytest.mark.parametrize("task", [TASK, stateful.batchnorm_task()], ids=["plain", "stateful"])
    def test_a_search_runs_once(self, tmp_path, monkeypatch, task):
        first, grid = tune_cached(tmp_path, "q", SEARCHED, task, **SETTINGS)
        monkeypatch.setattr(tuning, "run", lambda *a, **k: pytest.fail("searched again"))
        second, again = tune_cached(tmp_path, "q", SEARCHED, task, **SETTINGS)
        assert first == second
        np.testing.assert_array_equal(grid.loss, again.loss)

    @pytest.mark.parametrize("changed", ["grid", "steps", "keys", "task", "lost"])
    def test_another_search_is_not_reused(self, tmp_path, monkeypatch, changed):
        tune_cached(tmp_path, "q", SEARCHED, TASK, **SETTINGS)
        baseline, task, settings = SEARCHED, TASK, dict(SETTINGS)
        if changed == "grid":
            baseline = baseline._replace(grid=points(("constant",), lr=(0.1, 0.2)))
        elif changed == "steps":
            settings["num_steps"] = 15
        elif changed == "keys":
            settings["keys"] = jax.random.split(jax.random.key(1), 3)
        elif changed == "task":  # of the same name
            task = quadratic(dim=4, condition=20.0)
        else:
            (file,) = tmp_path.iterdir()
            file.unlink()
        searched = rounds_run(monkeypatch)
        tune_cached(tmp_path, "q", baseline, task, **settings)
        assert searched

    def test_a_damaged_search_is_run_again(self, tmp_path, monkeypatch):
        """One cut in half, one with another learning rate's curves, one of another format."""
        record, grid = tune_cached(tmp_path, "q", SEARCHED, TASK, **SETTINGS)
        searched = []
        monkeypatch.setattr(tuning, "_run_round", lambda *arguments: searched.append(1) or grid)
        (file,) = tmp_path.iterdir()
        whole = file.read_bytes()
        swapped = npz(grid._replace(loss=grid.loss[::-1]))
        for damaged in (whole[: len(whole) // 2], whole[:65] + swapped, b"", b"{}", swapped):
            file.write_bytes(damaged)
            assert tune_cached(tmp_path, "q", SEARCHED, TASK, **SETTINGS)[0] == record
            assert file.read_bytes() == whole
        assert len(searched) == 5

    @pytest.mark.parametrize("done", range(4))
    def test_a_search_goes_on_after_a_kill_between_rounds(self, tmp_path, monkeypatch, done):
        baseline = of_rates(1e-6, 1e-5)
        whole, _ = tune(baseline, TASK, **SETTINGS)
        run_round, left = tuning._run_round, [done]

        def killed(*given):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return run_round(*given)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(tuning, "_run_round", killed)
            tune_cached(tmp_path, "q", baseline, TASK, **SETTINGS)
        rounds = rounds_run(monkeypatch)
        record, _ = tune_cached(tmp_path, "q", baseline, TASK, **SETTINGS)
        assert len(rounds) == 4 - done
        seconds = ("seconds",)
        same = lambda record: {k: v for k, v in record.items() if k not in seconds}
        assert same(record) == same(whole)

    def test_optimizers_do_not_share_a_search(self, tmp_path, monkeypatch):
        """Of the same grid: other functions, lambdas of other labels, other parts, other params."""
        rounds = rounds_run(monkeypatch)
        others = [
            SEARCHED,
            SEARCHED._replace(make=optax.adam),
            SEARCHED._replace(make=lambda schedule: optax.sgd(schedule)),
            SEARCHED._replace(make=lambda schedule: optax.lion(schedule), label="Lion"),
            SEARCHED._replace(eval_params=zeros),
        ]
        for baseline in others:
            tune_cached(tmp_path, "q", baseline, TASK, **SETTINGS)
        assert len(rounds) == len(list(tmp_path.iterdir())) == len(others)
        tune_cached(tmp_path, "q", SEARCHED._replace(label="the same"), TASK, **SETTINGS)
        assert len(rounds) == len(others)


def zeros(state, params):
    return jax.tree.map(jnp.zeros_like, params)
