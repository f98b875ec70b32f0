"""Flax Linen with a TrainState: two lines change for an optimizer that needs the loss.

    python docs/examples/flax_train_state.py [--checkpoint FOLDER]

Use `metaopt.TrainState` instead of Flax's own, and pass `value=loss` to `apply_gradients`. Without
`--checkpoint` the learned optimizer is an untrained L3RS: each layer takes a step of length 0.01
along the mean of SGD's and Adam's directions. `metaopt train` makes better ones
(specialise_own_job.py).
"""

import argparse

import flax.linen as nn
import jax
import optax

import metaopt
from metaopt.datasets import digits

STEPS = 200


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1) / 16.0
        return nn.Dense(10)(nn.relu(nn.Dense(32)(x)))


def learned_optimizer(checkpoint, key, params) -> optax.GradientTransformation:
    if checkpoint is not None:
        return metaopt.load(checkpoint).apply(num_steps=STEPS)
    l3rs = metaopt.optimizers.l3rs()
    return l3rs.apply(l3rs.init(key, params), num_steps=STEPS)


@jax.jit
def train_step(state: metaopt.TrainState, batch):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads, value=loss), loss  # Flax's own takes only grads


@jax.jit
def accuracy(state: metaopt.TrainState, examples):
    logits = state.apply_fn({"params": state.params}, examples["x"])
    return (logits.argmax(-1) == examples["y"]).mean()


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a folder written by `metaopt train`")
    args = parser.parse_args(argv)

    data = digits().splits
    k_net, k_theta, k_data = jax.random.split(jax.random.key(0), 3)
    model = MLP()
    params = model.init(k_net, data["train"]["x"][:1])["params"]
    tx = learned_optimizer(args.checkpoint, k_theta, params)
    state = metaopt.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    for step, key in enumerate(jax.random.split(k_data, STEPS), start=1):
        index = jax.random.randint(key, (64,), 0, len(data["train"]["y"]))
        batch = jax.tree.map(lambda leaf, index=index: leaf[index], data["train"])
        state, loss = train_step(state, batch)
        if step % 50 == 0:
            print(f"step {step}: training {loss:.3f}, accuracy {accuracy(state, data['test']):.1%}")
    return {"loss": float(loss), "accuracy": float(accuracy(state, data["test"]))}


if __name__ == "__main__":
    main()
