"""Fine-tuning in part: what is trained, what it computes, what it costs, what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stateful

from metaopt import datasets, guards, tasks
from metaopt.core.trees import leaf_names
from metaopt.core.types import SPLITS, Task, single
from metaopt.tasks import networks
from metaopt.tasks.checking import check_family, check_start

KEY = jax.random.key(0)


class Net(nn.Module):
    """Layers of all kinds: with a fast way for adapters, and without."""

    classes: int = 2

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(8, name="first")(x)).reshape(-1, 2, 2, 2)
        x = jnp.tanh(nn.Conv(4, (2, 2), name="conv")(x))
        x = x + networks.Conv(4, 2, padding="SAME", name="own")(x)
        x = x + nn.Conv(4, (2, 2), feature_group_count=4, name="depthwise")(x)
        x = nn.DenseGeneral((2, 3), axis=-1, name="general")(x)
        return nn.Dense(self.classes, name="head")(x.reshape(len(x), -1))


KERNELS = ("first", "conv", "own", "depthwise", "general")


@pytest.fixture(scope="module")
def data():
    return datasets.moons()


@pytest.fixture(scope="module")
def pretrained(data):
    """Variables with another read-out layer than that of the tasks."""
    return jax.jit(Net(5).init)(jax.random.key(3), data.splits["train"]["x"][:1])


def losses_and_grads(task: Task, params, batch):
    return jax.jit(lambda task, p, b: jax.value_and_grad(task.loss)(p, b))(task, params, batch)


def expected_loss(params, batch, data):
    logits = Net().apply({"params": params}, batch["x"] * data.scale)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def test_the_params_are_the_trained_leaves_alone(data, pretrained):
    task = tasks.finetune(
        Net(), pretrained, data, head="head", trainable=lambda name: name == "conv/bias"
    )
    check_family("mine", single(task), SPLITS)
    params = jax.jit(lambda task: task.init(KEY))(task)
    assert leaf_names(params) == ["conv/bias", "head/bias", "head/kernel"]
    np.testing.assert_array_equal(params["conv"]["bias"], pretrained["params"]["conv"]["bias"])
    other = task.init(jax.random.key(1))
    assert not np.array_equal(params["head"]["kernel"], other["head"]["kernel"])
    batch = task.sample(jax.random.key(1), ())
    loss, grads = losses_and_grads(task, params, batch)
    body = pretrained["params"]
    merge = lambda p: {**body, "conv": {**body["conv"], **p["conv"]}, "head": p["head"]}
    expected = jax.jit(jax.value_and_grad(lambda p: expected_loss(merge(p), batch, data)))(params)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    stateful.assert_close(grads, expected[1])
    # What is not trained is an array of the task, under its own name.
    assert "data/frozen/first/kernel" in leaf_names(task)


def test_adapters_change_kernels_by_a_product_of_low_rank(data, pretrained):
    """All kinds of layers, against the network whose kernels were changed by numpy."""
    lora = tasks.LoRA(lambda name: name.split("/") in [[k, "kernel"] for k in KERNELS], 2, 3.0)
    task = tasks.finetune(Net(), pretrained, data, head="head", lora=lora)
    params = jax.jit(lambda task: task.init(KEY))(task)
    assert set(params) == {*KERNELS, "head"}
    assert params["conv"]["kernel"]["lora_a"].shape == (2, 2, 2, 2)
    assert params["general"]["kernel"]["lora_b"].shape == (2, 3)
    batch = task.sample(jax.random.key(1), ())

    def merge(params):
        body = dict(pretrained["params"])
        for name in KERNELS:
            pair = params[name]["kernel"]
            change = 1.5 * jnp.tensordot(pair["lora_a"], pair["lora_b"], axes=1)
            body[name] = {**body[name], "kernel": body[name]["kernel"] + change}
        return {**body, "head": params["head"]}

    # At the start nothing is changed.
    start = {**pretrained["params"], "head": params["head"]}
    losses = losses_and_grads(task, params, batch)[0], expected_loss(start, batch, data)
    np.testing.assert_allclose(*losses, rtol=1e-6)
    keys = iter(jax.random.split(KEY, 50))
    moved = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), params
    )
    loss, grads = losses_and_grads(task, moved, batch)
    expected = jax.jit(jax.value_and_grad(lambda p: expected_loss(merge(p), batch, data)))(moved)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    stateful.assert_close(grads, expected[1])
    assert abs(loss - losses[0]) > 1e-3
    spread = jnp.std(tasks.finetune(
        networks.MLP((100, 100, 2)),
        networks.MLP((100, 100, 2)).init(KEY, jnp.zeros((1, 2))),
        data,
        lora=tasks.LoRA(lambda name: name == "Dense_1/kernel", rank=50),
    ).init(KEY)["Dense_1"]["kernel"]["lora_a"])  # fmt: skip
    np.testing.assert_allclose(spread, 0.1, rtol=0.05)  # 1 / sqrt(fan-in)


def test_statistics_move_on_or_stay(data):
    net = stateful.Net(0.3)
    params, stats = stateful.first_variables(jax.random.key(5))
    stats = jax.tree.map(lambda leaf: leaf + 0.5, stats)
    variables = {"params": params, "batch_stats": stats}
    moving = tasks.finetune(net, variables, data, trainable=lambda name: True)
    check_family("mine", single(moving), SPLITS)
    check_start("mine", single(moving))
    state = moving.init_model_state(KEY)
    stateful.assert_close(state, {"batch_stats": stats})
    batch = moving.sample(jax.random.key(1), ())
    loss, changed = moving.loss(params, state, batch)
    expected, new_stats = stateful.loss_fn(params, stats, batch, 0.3)
    stateful.assert_close((loss, changed), (expected, {"batch_stats": new_stats}))
    eval_loss = stateful.eval_loss(params, stats, batch, 0.3)
    np.testing.assert_allclose(moving.eval_loss(params, state, batch), eval_loss, rtol=1e-5)

    fixed = tasks.finetune(
        net, variables, data, trainable=lambda name: "Dense" in name, statistics="frozen"
    )
    check_family("mine", single(fixed), SPLITS)
    assert fixed.init_model_state(KEY) is None and "key" not in fixed.sample(KEY, ())
    trained = {name: tree for name, tree in params.items() if "Dense" in name}
    np.testing.assert_allclose(fixed.loss(trained, batch), eval_loss, rtol=1e-5)
    np.testing.assert_allclose(fixed.eval_loss(trained, batch), eval_loss, rtol=1e-5)
    np.testing.assert_allclose(
        fixed.accuracy(trained, batch), moving.accuracy(params, state, batch), rtol=1e-6
    )


def test_the_head_on_cached_features_is_the_head_of_the_frozen_network(data):
    """The trunk runs once; losses and gradients are those of the network."""

    class Trunk(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(4, name="first")(x)
            x = nn.tanh(nn.BatchNorm(use_running_average=not train, name="norm")(x))
            return nn.Dense(2, name="head")(x) if self.classes else x

        classes: int = 2

    x = data.splits["train"]["x"]
    variables = Trunk().init(jax.random.key(3), x[:1], train=False)
    task = tasks.finetune(Trunk(), variables, data, head="head", statistics="frozen")
    features = tasks.cached(Trunk(0), variables, data, batch_size=300)
    assert {s: v["x"].shape for s, v in features.splits.items()} == {
        s: (len(v["y"]), 4) for s, v in data.splits.items()
    }
    small = tasks.classification(nn.Dense(2), features, batch_size=64)
    params = jax.jit(lambda task: task.init(KEY))(task)
    head = params["head"]
    assert jax.tree.map(jnp.shape, small.init(KEY)) == jax.tree.map(jnp.shape, head)
    batch, cached = task.sample(KEY, ()), small.sample(KEY, ())
    np.testing.assert_array_equal(batch["y"], cached["y"])
    loss, grads = jax.value_and_grad(task.loss)(params, batch)
    small_loss, small_grads = jax.value_and_grad(small.loss)(head, cached)
    np.testing.assert_allclose(loss, small_loss, rtol=1e-5)
    stateful.assert_close(grads["head"], small_grads)


def test_a_task_of_few_shots_trains_on_those_alone():
    data = datasets.digits()
    net, four = networks.MLP((3,)), (2, 5, 7, 9)
    family = tasks.few_class(net, data, None, classes=four, ways=3, shots=4)
    check_family("mine", family, SPLITS)
    drawn = jax.vmap(family.sample)(jax.random.split(KEY, 40))
    labels = np.asarray(data.splits["train"]["y"])
    rows, classes = np.asarray(drawn["rows"]), np.asarray(drawn["classes"])
    assert rows.shape == (40, 3, 4) and set(np.unique(classes)) == {2, 5, 7, 9}
    np.testing.assert_array_equal(labels[rows], classes[:, :, None].repeat(4, axis=2))
    assert all(len(set(row.ravel())) == 12 for row in rows)
    # Every training example of a class is as likely as any other: all are drawn at some time.
    fives = np.flatnonzero(labels == 5)
    many = jax.vmap(family.sample)(jax.random.split(KEY, 1500))
    drawn_fives = np.asarray(many["rows"])[np.asarray(many["classes"]) == 5].ravel()
    counts = np.bincount(drawn_fives, minlength=len(labels))[fives]
    expected = len(drawn_fives) / len(fives)
    assert counts.min() > 0.3 * expected and counts.max() < 2 * expected

    task_params = jax.tree.map(lambda leaf: leaf[0], drawn)
    task = family.task(task_params)
    shots = {x.tobytes() for x in np.asarray(data.splits["train"]["x"])[rows[0].ravel()]}
    batch = task.sample(KEY, (5,))
    assert {x.tobytes() for x in np.asarray(batch["x"]).reshape(-1, 8, 8, 1)} == shots
    whole = task.whole("train")
    np.testing.assert_array_equal(whole["y"], np.repeat(np.arange(3), 4))
    np.testing.assert_array_equal(whole["x"], data.splits["train"]["x"][rows[0].ravel()])
    for split in ("valid", "test"):  # judged on all examples
        held_out = task.sample(KEY, (50,), split)
        assert len(np.unique(np.asarray(held_out["x"]).reshape(-1, 64), axis=0)) > 40
    with pytest.raises(ValueError, match=r"few_class: shots must be at most \d+, .*got 10000"):
        tasks.few_class(net, data, None, classes=four, ways=3, shots=10000)
    with pytest.raises(ValueError, match="few_class: head is missing"):
        tasks.few_class(net, data, {"Dense_0": {}}, classes=four, ways=3)


no = lambda name: False
REFUSED = {
    "nothing": ({}, "nothing would be trained; give trainable, head or lora"),
    "no leaf": ({"trainable": no, "head": "head"}, "trainable accepts no leaf, so .*conv/bias"),
    "a label": (
        {"trainable": lambda name: "train"},
        "trainable must return True or False .* 'train' for 'c",
    ),
    "no function": ({"trainable": "head"}, "trainable must be a function, got 'head'"),
    "unknown head": ({"head": "haed"}, "head 'haed' is not in the params of net: conv, de"),
    "no kernel": ({"lora": tasks.LoRA(no)}, "lora.kernels accepts no leaf; the kernels .*own/ker"),
    "a vector": (
        {"lora": tasks.LoRA(lambda name: name.startswith("conv"))},
        "lora.kernels accepts 'conv/bias', which is no matrix",
    ),
    "both": (
        {"lora": tasks.LoRA(lambda n: n == "own/kernel"), "trainable": lambda n: "own" in n},
        "leaf 'own/kernel' is accepted by trainable and by lora",
    ),
    "rank": ({"lora": tasks.LoRA(lambda n: "kernel" in n, 0)}, "lora.rank must be at least 1, g"),
    "statistics": ({"head": "head", "statistics": "none"}, "statistics must be one of train, fro"),
    "batch": ({"head": "head", "batch_size": 0}, "batch_size must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, data, pretrained):
    settings, message = REFUSED[case]
    head = {"kernel": jnp.zeros((24, 2)), "bias": jnp.zeros(2)}
    fitting = {"params": {**pretrained["params"], "head": head}}
    with pytest.raises(ValueError, match=f"^finetune: {message}"):
        tasks.finetune(Net(), fitting, data, **settings)


def test_a_checkpoint_that_does_not_fit_names_the_leaf_and_the_shapes(data, pretrained):
    message = (
        r"pretrained: does not fit the network: leaf 'params/head/bias' is of shape \(5,\) in the "
        r"checkpoint, and of shape \(2,\) in the network"
    )
    with pytest.raises(ValueError, match=message):
        tasks.finetune(Net(), pretrained, data, trainable=lambda name: True)
    with pytest.raises(ValueError, match=r"must be the collections of net, .* got conv, depthwi"):
        tasks.finetune(Net(), pretrained["params"], data, head="head")


WIDTH, LAYERS, RANK = 1000, 20, 2


class Deep(nn.Module):
    """20 million weights in kernels of one shape."""

    @nn.compact
    def __call__(self, x):
        for layer in range(LAYERS):
            x = nn.tanh(nn.Dense(WIDTH, use_bias=False, name=f"layer{layer}")(x))
        return nn.Dense(2, name="head")(x)


def test_a_race_of_adapters_costs_memory_of_the_order_of_the_adapters():
    """XLA's account of one step of the guard; nothing of 20 million numbers is computed."""
    examples = {"x": np.zeros((2, WIDTH), np.float32), "y": np.array([0, 1])}
    data = datasets.Dataset("mine", dict.fromkeys(SPLITS, examples), 2)
    shapes = jax.eval_shape(Deep().init, KEY, jnp.zeros((1, WIDTH)))
    # Broadcast from one number, so that nothing is stored: only shapes matter here.
    zeros = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)
    make = lambda variables: tasks.finetune(
        Deep(),
        variables,
        data,
        head="head",
        lora=tasks.LoRA(lambda name: name.startswith("layer"), RANK),
        batch_size=2,
    )
    task = jax.eval_shape(make, zeros)
    params = jax.eval_shape(lambda task: task.init(KEY), task)
    adapters = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    trunk = 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert trunk > 80e6 and adapters < 0.005 * trunk
    guard = guards.race(optax.sgd(0.1, momentum=0.9), optax.adam(1e-3))
    state = jax.eval_shape(guard.init, params)
    # Two runners with one and two memories, beside bookkeeping of a few numbers.
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert state_bytes < 6 * adapters

    def step(task, params, state, batch):
        return guard.update(None, state, params, value_fn=lambda p: task.loss(p, batch))

    batch = jax.eval_shape(lambda task: task.sample(KEY, ()), task)
    used = jax.jit(step).lower(task, params, state, batch).compile().memory_analysis()
    assert used.argument_size_in_bytes > trunk  # the trunk is an argument, and no constant
    assert used.temp_size_in_bytes + used.output_size_in_bytes < 20 * adapters < 0.1 * trunk
