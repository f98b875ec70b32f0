"""A network with BatchNorm and dropout, its task, and the loop that a Flax user writes for it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import datasets, tasks

moons = functools.cache(datasets.moons)  # when it is needed: children configure JAX first


class Net(nn.Module):
    """One hidden layer; dropout only if `rate` is above 0."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8)(
            nn.Dense(6, use_bias=False)(x)
        )
        x = nn.relu(x)
        if self.rate:
            x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(2)(x)


def batchnorm_task(rate: float = 0.0, batch_size: int = 16):
    """Classification of moons by `Net`."""
    return tasks.classification(Net(rate), moons(), batch_size=batch_size)


def first_variables(key, rate: float = 0.0):
    """Params and running statistics before the first step."""
    variables = Net(rate).init(key, moons().scale * jnp.zeros((1, 2)), train=False)
    return variables["params"], variables["batch_stats"]


def loss_fn(params, stats, batch, rate: float = 0.0):
    """In training mode, as Flax's guide writes it."""
    logits, changed = Net(rate).apply(
        {"params": params, "batch_stats": stats},
        moons().scale * batch["x"],
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": batch["key"]} if rate else None,
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean(), changed["batch_stats"]


def eval_loss(params, stats, batch, rate: float = 0.0):
    """With the running statistics."""
    variables = {"params": params, "batch_stats": stats}
    logits = Net(rate).apply(variables, moons().scale * batch["x"], train=False)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def plain_loop(tx, params, stats, batches, rate: float = 0.0):
    """(params, stats, losses before each step) of the loop without metaopt."""
    state, losses = tx.init(params), []
    value_and_grad = jax.jit(
        jax.value_and_grad(lambda *arguments: loss_fn(*arguments, rate=rate), has_aux=True)
    )
    for index in range(len(batches["y"])):
        batch = jax.tree.map(lambda leaf, index=index: leaf[index], batches)
        (loss, stats), grads = value_and_grad(params, stats, batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    return params, stats, jnp.stack(losses)


def assert_close(given, expected, rtol=1e-4, atol=1e-5):
    """Compares two trees of one structure."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), given, expected
    )
