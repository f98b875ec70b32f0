"""Tasks: definitions, splits, known constants, and messages on bad settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from metaopt import datasets, tasks
from metaopt.core.types import SPLITS, Task, single
from metaopt.datasets import Dataset
from metaopt.tasks import networks
from metaopt.tasks.scores import CHUNK, negative_log_likelihood


def test_classification_loss_and_accuracy_follow_their_definitions(digits):
    params = digits.init(jax.random.key(0))
    batch = digits.sample(jax.random.key(1), ())
    assert batch["x"].shape == (64, 8, 8, 1)
    x = np.asarray(batch["x"], np.float64).reshape(64, 64) / 16.0
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    hidden = np.maximum(x @ w["Dense_0"]["kernel"] + w["Dense_0"]["bias"], 0.0)
    logits = hidden @ w["Dense_1"]["kernel"] + w["Dense_1"]["bias"]
    y = np.asarray(batch["y"])
    log_likelihood = logits[np.arange(64), y] - np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(digits.loss(params, batch), -log_likelihood.mean(), rtol=1e-5)
    np.testing.assert_allclose(digits.accuracy(params, batch), (logits.argmax(1) == y).mean())


def test_batches_come_from_their_split_and_have_the_leading_shape(digits):
    batches = digits.sample(jax.random.key(0), (3, 2), "valid")
    assert batches["x"].shape == (3, 2, 64, 8, 8, 1)
    valid = {x.tobytes() for x in np.asarray(digits.whole("valid")["x"])}
    drawn = np.asarray(batches["x"]).reshape(-1, 8, 8, 1)
    assert {x.tobytes() for x in drawn} <= valid


def test_quadratic_has_the_curvature_that_it_states():
    task = tasks.quadratic(dim=6, condition=50.0, largest=4.0)
    x = task.init(jax.random.key(0))
    values = np.linalg.eigvalsh(jax.hessian(task.loss)(x, jnp.zeros(6)))
    np.testing.assert_allclose([values[0], values[-1]], [4.0 / 50.0, 4.0], rtol=1e-5)
    assert task.loss(jnp.zeros(6), task.whole()) == 0.0


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        tasks.classification(networks.MLP((2,)), datasets.moons(), batch_size=0)
    with pytest.raises(ValueError, match="condition"):
        tasks.quadratic(condition=0.5)
    with pytest.raises(ValueError, match="dim"):
        tasks.quadratic(dim=0)


def test_the_loss_of_a_network_that_has_blown_up_is_not_zero():
    labels = jnp.array([0, 3])
    np.testing.assert_allclose(
        negative_log_likelihood(jnp.full((2, 4), 1e30), labels), np.log(4.0), rtol=1e-6
    )


def test_large_batches_are_averaged_in_parts():
    x, y = np.random.default_rng(0).normal(size=(2 * CHUNK, 2)), np.arange(2 * CHUNK) % 2
    split = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y)}
    task = tasks.classification(
        networks.MLP((2,)), Dataset("mine", dict.fromkeys(SPLITS, split), 2)
    )
    params = task.init(jax.random.key(0))
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), params["Dense_0"])
    logits = x @ w["kernel"] + w["bias"]
    nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]
    np.testing.assert_allclose(task.loss(params, task.whole()), nll.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        task.accuracy(params, task.whole()), (logits.argmax(1) == y).mean(), rtol=1e-6
    )


class TestFewClass:
    @pytest.fixture(scope="class")
    def family(self):
        data = datasets.digits()
        net = networks.MLP((8, 3))
        before = networks.MLP((8, 4)).init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
        family = tasks.few_class(
            net, data, before, head="Dense_1", classes=(2, 5, 7, 9), ways=3, batch_size=200
        )
        return data, before, family

    def test_tasks_are_distinct_classes_of_the_pool(self, family):
        chosen = jax.vmap(family[2].sample)(jax.random.split(jax.random.key(0), 50))
        assert set(np.unique(chosen)) == {2, 5, 7, 9}
        assert all(len(set(row.tolist())) == 3 for row in np.asarray(chosen))

    def test_params_are_the_pretrained_ones_with_a_fresh_head(self, family):
        _, before, family = family
        params = family.task(jnp.array([2, 5, 7])).init(jax.random.key(1))
        np.testing.assert_array_equal(params["Dense_0"]["kernel"], before["Dense_0"]["kernel"])
        assert params["Dense_1"]["kernel"].shape == (8, 3)

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_examples_are_those_of_the_chosen_classes(self, family, split):
        data, _, family = family
        task = family.task(jnp.array([9, 2, 5]))
        examples = data.splits[split]
        label_of = {
            x.tobytes(): int(y)
            for x, y in zip(np.asarray(examples["x"]), np.asarray(examples["y"]), strict=True)
        }
        for batch in (task.sample(jax.random.key(0), (), split), task.whole(split)):
            seen = [label_of[x.tobytes()] for x in np.asarray(batch["x"])]
            np.testing.assert_array_equal(np.array([9, 2, 5])[batch["y"]], seen)
            assert set(seen) == {9, 2, 5}
        np.testing.assert_array_equal(np.bincount(task.whole(split)["y"]), [20, 20, 20])

    def test_without_pretraining_every_run_starts_elsewhere(self):
        family = tasks.few_class(
            networks.MLP((2,)), datasets.moons(), None, head="Dense_0", classes=(0, 1), ways=2
        )
        task = family.task(jnp.array([0, 1]))
        one, other = (task.init(jax.random.key(k))["Dense_0"]["kernel"] for k in (0, 1))
        assert not np.array_equal(one, other)

    @pytest.mark.parametrize(
        "changed, match",
        [
            ({"ways": 3}, "ways must be at most 2 classes, got 3"),
            ({"classes": (0, 0)}, "classes must be distinct"),
            ({"classes": (0, 2)}, r"classes must lie in 0..1, got \[0, 2\]"),
            ({"pretrained": {"body": {}}}, "head 'Dense_0' is not in the params: body"),
        ],
    )
    def test_what_is_refused(self, changed, match):
        settings = {"pretrained": None, "head": "Dense_0", "classes": (0, 1), "ways": 2}
        with pytest.raises(ValueError, match=match):
            tasks.few_class(networks.MLP((2,)), datasets.moons(), **{**settings, **changed})


class TestLanguageModel:
    TEXT = datasets.text_from_string("mine", "to be or not to be " * 60)

    def task(self, **settings):
        net = networks.Transformer(len(self.TEXT.vocabulary), width=8, layers=1, max_length=12)
        return tasks.language_model(net, self.TEXT, batch_size=5, length=12, **settings)

    def test_targets_are_the_next_characters_of_the_text(self):
        batch = self.task().sample(jax.random.key(0), (3,))
        assert batch["x"].shape == batch["y"].shape == (3, 5, 12)
        spell = lambda tokens: "".join(self.TEXT.vocabulary[t] for t in tokens)
        text = spell(np.asarray(self.TEXT.splits["train"]))
        rows = (np.asarray(batch[name]).reshape(-1, 12) for name in ("x", "y"))
        for x, y in zip(*rows, strict=True):
            assert spell(x) + spell(y[-1:]) in text and spell(x[1:]) == spell(y[:-1])

    def test_a_whole_split_is_read_once_from_its_start(self):
        whole = self.task(held_out=4).whole("test")
        np.testing.assert_array_equal(whole["x"].reshape(-1), self.TEXT.splits["test"][:48])

    def test_a_network_that_knows_nothing_pays_log_of_the_vocabulary(self):
        task = self.task()
        shapes = jax.eval_shape(task.init, jax.random.key(0))
        params = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
        loss = jax.jit(task.loss)(params, task.whole())
        np.testing.assert_allclose(loss, np.log(len(self.TEXT.vocabulary)), rtol=1e-6)

    def test_text_must_be_longer_than_its_windows(self):
        with pytest.raises(ValueError, match="length must be below 114"):
            tasks.language_model(networks.Transformer(8), self.TEXT, length=114)


class TestFamily:
    @pytest.fixture(scope="class")
    def family(self):
        sets = [datasets.moons(), datasets.circles(n=1000)]
        return tasks.mlp_family(sets, widths=(2, 16), batch_sizes=(4, 32))

    def test_settings_fill_their_ranges_evenly_in_the_logarithm(self, family):
        drawn = jax.vmap(family.sample)(jax.random.split(jax.random.key(0), 4000))
        assert (drawn["width"].min(), drawn["width"].max()) == (2, 16)
        assert (drawn["batch_size"].min(), drawn["batch_size"].max()) == (4, 32)
        # P(width <= 5) of a log-uniform on [2, 17)
        share = np.log(6 / 2) / np.log(17 / 2)
        np.testing.assert_allclose(np.mean(drawn["width"] <= 5), share, atol=0.03)
        np.testing.assert_allclose(np.mean(drawn["set"]), 0.5, atol=0.03)

    def test_loss_is_that_of_the_narrow_network_on_the_small_batch(self, family):
        chosen = {"set": jnp.array(1), "width": jnp.array(3), "batch_size": jnp.array(7)}
        task = family.task(chosen)
        params, batch = task.init(jax.random.key(0)), task.sample(jax.random.key(1), ())
        x, y = np.asarray(batch["x"], np.float64)[:7], np.asarray(batch["y"])[:7]
        w = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        hidden = np.maximum(x @ w["Dense_0"]["kernel"] + w["Dense_0"]["bias"], 0)[:, :3]
        logits = hidden @ w["Dense_1"]["kernel"][:3] + w["Dense_1"]["bias"]
        nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(7), y]
        np.testing.assert_allclose(task.loss(params, batch), nll.mean(), rtol=1e-5)
        bound = 3**-0.5  # PyTorch's range for three inputs
        assert 0.5 * bound < np.abs(w["Dense_1"]["kernel"][:3]).max() <= bound

    def test_what_is_switched_off_has_no_gradient(self, family):
        task = family.task({k: jnp.array(v) for k, v in dict(set=0, width=5, batch_size=4).items()})
        params = task.init(jax.random.key(0))
        grad = jax.grad(task.loss)(params, task.sample(jax.random.key(1), ()))
        assert not grad["Dense_0"]["kernel"][:, 5:].any()
        assert not grad["Dense_1"]["kernel"][5:].any()
        assert grad["Dense_1"]["kernel"][:5].any()

    def test_the_shorter_data_set_is_used_whole_and_without_its_padding(self, family):
        data = datasets.circles(n=1000)
        task = family.task({k: jnp.array(v) for k, v in dict(set=1, width=5, batch_size=4).items()})
        whole = task.whole("test")
        assert whole["weight"].sum() == len(data.splits["test"]["y"]) < len(whole["y"])
        drawn = task.sample(jax.random.key(0), (100,))["x"].reshape(-1, 2)
        rows = {x.tobytes() for x in np.asarray(data.splits["train"]["x"])}
        assert {x.tobytes() for x in np.asarray(drawn)} <= rows

    def test_sets_must_agree(self):
        with pytest.raises(ValueError, match="sets must agree in shape"):
            tasks.mlp_family([datasets.moons(), datasets.digits()])
        with pytest.raises(ValueError, match=r"widths must be 1 <= low <= high, got \(4, 2\)"):
            tasks.mlp_family([datasets.moons()], widths=(4, 2))


class TestAutoencoder:
    def test_loss_is_the_mean_squared_error_of_scaled_inputs(self):
        data = datasets.digits()
        task = tasks.autoencoder(networks.MLP((5, 64)), data, batch_size=7)
        params = task.init(jax.random.key(0))
        batch = task.sample(jax.random.key(1), (3,))
        assert batch["x"].shape == (3, 7, 8, 8, 1)
        batch = jax.tree.map(lambda a: a[0], batch)
        x = np.asarray(batch["x"]).reshape(7, 64) / 16.0
        first, second = params["Dense_0"], params["Dense_1"]
        hidden = np.maximum(x @ first["kernel"] + first["bias"], 0.0)
        output = hidden @ second["kernel"] + second["bias"]
        np.testing.assert_allclose(task.loss(params, batch), np.mean((output - x) ** 2), rtol=1e-5)
        assert task.whole("test")["x"].shape == data.splits["test"]["x"].shape
        assert task.accuracy is None

    def test_a_network_of_another_output_size_is_refused(self):
        task = tasks.autoencoder(networks.MLP((5,)), datasets.digits())
        params = task.init(jax.random.key(0))
        with pytest.raises(ValueError, match="returns 5 numbers per example; make it return 64"):
            task.loss(params, task.whole())


class TestReparametrised:
    @pytest.mark.parametrize("level", ["global", "tensor", "parameter"])
    def test_function_is_the_same_and_gradients_are_s_times_as_large(self, digits, level):
        family = tasks.reparametrised(digits, low=1e-2, high=1e2, level=level)
        chosen = family.sample(jax.random.key(3))
        task, key = family.task(chosen), jax.random.key(0)
        params, own = task.init(key), digits.init(key)
        batch = digits.sample(jax.random.key(1), ())
        np.testing.assert_array_equal(task.sample(jax.random.key(1), ())["x"], batch["x"])
        loss, grads = jax.value_and_grad(task.loss)(params, batch)
        own_loss, own_grads = jax.value_and_grad(digits.loss)(own, batch)
        np.testing.assert_allclose(loss, own_loss, rtol=1e-5)
        scales = jax.tree.map(lambda s, w: np.broadcast_to(s, w.shape), chosen["scales"], own)
        for s, w, own_w, g, own_g in zip(
            *map(jax.tree.leaves, (scales, params, own, grads, own_grads)), strict=True
        ):
            np.testing.assert_allclose(w * s, own_w, rtol=1e-5)
            np.testing.assert_allclose(g, s * own_g, rtol=1e-4, atol=1e-6 * s.max())
            assert s.min() >= 1e-2 and s.max() <= 1e2
        distinct = len({float(s) for leaf in jax.tree.leaves(scales) for s in leaf.ravel()})
        sizes = [leaf.size for leaf in jax.tree.leaves(own)]
        assert distinct == {"global": 1, "tensor": len(sizes)}.get(level, distinct)
        assert level != "parameter" or distinct > 0.99 * sum(sizes)

    def test_scales_are_log_uniform(self, digits):
        family = tasks.reparametrised(digits)
        keys = jax.random.split(jax.random.key(0), 2000)
        scales = jax.vmap(family.sample)(keys)["scales"]["Dense_0"]["kernel"]
        logs = np.log10(np.asarray(scales))
        assert kstest(logs, "uniform", args=(-3, 6)).pvalue > 0.01

    def test_a_model_state_and_a_family_are_kept(self):
        counting = Task(
            init=lambda key: jnp.array([3.0]),
            loss=lambda params, count, batch: (jnp.sum(params * batch), count + 1),
            sample=lambda key, shape, split="train": jnp.ones(shape),
            whole=lambda split="test": jnp.ones(()),
            init_model_state=lambda key: jnp.array(0),
            eval_loss=lambda params, count, batch: 10.0 * jnp.sum(params * batch),
        )
        family = tasks.reparametrised(single(counting), low=2.0, high=2.0)
        task, key = family.task(family.sample(jax.random.key(0))), jax.random.key(1)
        params, state = task.init(key), task.init_model_state(key)
        np.testing.assert_allclose(params, [1.5], rtol=1e-6)
        loss, state = task.loss(params, state, task.whole())
        np.testing.assert_allclose([loss, state], [3.0, 1], rtol=1e-6)
        np.testing.assert_allclose(task.eval_loss(params, state, task.whole()), 30.0, rtol=1e-6)

    def test_what_is_refused(self, digits):
        with pytest.raises(ValueError, match="low must be positive, got 0"):
            tasks.reparametrised(digits, low=0.0)
        with pytest.raises(ValueError, match="high must be at least 10"):
            tasks.reparametrised(digits, low=10.0, high=1.0)
        with pytest.raises(ValueError, match="level must be"):
            tasks.reparametrised(digits, level="layer")
