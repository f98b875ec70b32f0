"""Flax NNX: a learned optimizer in `nnx.Optimizer`, then the same with Adam as its fallback.

    python docs/examples/flax_nnx.py

`nnx.Optimizer.update` passes extra arguments on, so a learned optimizer gets the loss as
`value=loss`. A guard needs the loss as a function of the params instead: split the model once, and
merge it inside this function.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import metaopt
from metaopt import guards
from metaopt.datasets import moons

STEPS = 300  # mini-batches; under the guard, half of them train and half decide


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(2, 32, rngs=rngs)
        self.out = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def loss_fn(model: Net, batch):
    logits = model(batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def train(tx: optax.GradientTransformation, batches):
    """The usual loop; only `value=loss` is new."""
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
        optimizer.update(model, grads, value=loss)
        return loss

    for batch in batches:
        train_step(model, optimizer, batch)
    return model


def train_guarded(tx: optax.GradientTransformation, batches):
    """A guard computes losses at its own points, so it takes `value_fn` instead of gradients."""
    graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
    state = tx.init(params)

    @jax.jit
    def train_step(params, state, batch):
        value_fn = lambda p: loss_fn(nnx.merge(graph, p), batch)
        updates, state = tx.update(None, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = train_step(params, state, batch)
    wins = optax.tree_utils.tree_get(state, "wins")
    print(f"windows won by the learned optimizer, by Adam: {wins.tolist()}")
    return nnx.merge(graph, params)


def main() -> dict[str, float]:
    data = moons().splits
    keys = jax.random.split(jax.random.key(0), STEPS)
    index = jax.vmap(lambda key: jax.random.randint(key, (64,), 0, len(data["train"]["y"])))(keys)
    batches = [jax.tree.map(lambda leaf, i=i: leaf[i], data["train"]) for i in index]

    params = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    # The variant "none" has no weights per layer, so its theta fits any network. It is untrained
    # here; metaopt.load(FOLDER) gives a trained one.
    l3rs = metaopt.optimizers.l3rs(variant="none")
    theta = l3rs.init(jax.random.key(1), params)
    learned = l3rs.apply(theta, num_steps=STEPS)
    half = l3rs.apply(theta, num_steps=STEPS // 2)  # the mini-batches that train under the guard

    runs = {
        "untrained": lambda: Net(nnx.Rngs(0)),
        "learned": lambda: train(learned, batches),
        "guarded": lambda: train_guarded(
            guards.streaming(guards.race(half, optax.adam(1e-2))), batches
        ),
    }
    losses = {name: float(jnp.asarray(loss_fn(run(), data["test"]))) for name, run in runs.items()}
    for name, loss in losses.items():
        print(f"{name:9} test loss {loss:.3f}")
    return losses


if __name__ == "__main__":
    main()
