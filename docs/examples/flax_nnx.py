"""Flax NNX: a learned optimizer in `nnx.Optimizer`, then the same with Adam as its fallback.

    python docs/examples/flax_nnx.py

`nnx.Optimizer.update` passes extra arguments on, so a learned optimizer gets the loss as
`value=loss`. A guard in `nnx.Optimizer` needs the loss as a function of the params instead:
`nnx.merge` puts them into the model. flax_nnx_batchnorm_dropout.py shows a model that has more
state than its params.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import metaopt
from metaopt import guards
from metaopt.datasets import moons

STEPS = 300  # mini-batches


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
    """The same loop for a guard, which computes losses and gradients at its own points."""
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch):
        graph = nnx.graphdef(model)
        value_fn = lambda params: loss_fn(nnx.merge(graph, params), batch)
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch)  # unused: XLA leaves it out
        optimizer.update(model, grads, value_fn=value_fn)
        return loss

    for batch in batches:
        train_step(model, optimizer, batch)
    info = nnx.as_pure(optimizer.opt_state).info
    print(f"decisions for the learned optimizer, for Adam: {info.wins.tolist()}")
    return model


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

    runs = {
        "untrained": lambda: Net(nnx.Rngs(0)),
        "learned": lambda: train(learned, batches),
        "Adam": lambda: train(optax.with_extra_args_support(optax.adam(1e-2)), batches),
        "guarded": lambda: train_guarded(guards.race(learned, optax.adam(1e-2)), batches),
    }
    losses = {name: float(jnp.asarray(loss_fn(run(), data["test"]))) for name, run in runs.items()}
    for name, loss in losses.items():
        print(f"{name:9} test loss {loss:.3f}")
    return losses


if __name__ == "__main__":
    main()
