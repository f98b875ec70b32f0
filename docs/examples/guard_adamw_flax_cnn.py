"""Three changed lines add a guarded learned optimizer to a loop in which AdamW trains a Flax CNN.

    python docs/examples/guard_adamw_flax_cnn.py [--checkpoint FOLDER] [--unguarded] [--steps N]

The guard is a race. AdamW and the learned optimizer each step on every mini-batch, each on its own
run. After every tenth mini-batch the guard compares their smoothed training losses, and your params
follow the leader. AdamW's run is the run that AdamW alone would make.

Without `--checkpoint` the learned optimizer is an untrained LSTM. It is of no use: it soon rests,
and the held-out loss is that of AdamW's run. `--checkpoint` takes a folder that `metaopt train`
wrote.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

import metaopt
from metaopt import guards
from metaopt.datasets import digits
from metaopt.tasks.networks import CNN


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a folder written by `metaopt train`")
    parser.add_argument("--unguarded", action="store_true", help="the learned optimizer alone")
    parser.add_argument("--steps", type=int, default=400, help="mini-batches")
    args = parser.parse_args(argv)

    net = CNN(10, channels=(8, 16), kernels=(3, 3), strides=(1, 2))  # 8x8 images are small
    data = digits()

    def loss_fn(params, batch):
        logits = net.apply({"params": params}, batch["x"] * data.scale)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    k_net, k_theta, k_data = jax.random.split(jax.random.key(0), 3)
    params = net.init(k_net, data.splits["train"]["x"][:1] * data.scale)["params"]
    learned = learned_optimizer(args.checkpoint, k_theta, params, args.steps)

    tx = optax.adamw(1e-3)
    tx = guards.race(learned, tx)  # changed line 1: the guard around AdamW
    if args.unguarded:
        tx = optax.with_extra_args_support(learned)
    state = tx.init(params)

    @jax.jit
    def train_step(params, state, batch):
        value_fn = lambda p: loss_fn(p, batch)  # changed line 2: the loss on this mini-batch
        loss, grads = jax.value_and_grad(value_fn)(params)  # XLA leaves out unused gradients
        updates, state = tx.update(grads, state, params, value_fn=value_fn)  # changed line 3
        return optax.apply_updates(params, updates), state, loss

    losses = {"start": float(loss_fn(params, data.splits["test"]))}
    for step, batch in enumerate(batches(k_data, data.splits["train"], args.steps), start=1):
        params, state, loss = train_step(params, state, batch)
        if step % 100 == 0:
            held_out = loss_fn(params, data.splits["test"])
            print(f"step {step}: training {loss:.3f}, held out {held_out:.3f}{report(state)}")
    return losses | {"end": float(loss_fn(params, data.splits["test"]))}


def learned_optimizer(checkpoint, key, params, num_steps) -> optax.GradientTransformation:
    if checkpoint is None:
        family = metaopt.optimizers.lstm()
        return family.apply(family.init(key, params))
    return metaopt.load(checkpoint).apply(num_steps=num_steps)


def batches(key, examples, num_steps: int, batch_size: int = 64):
    for k in jax.random.split(key, num_steps):
        index = jax.random.randint(k, (batch_size,), 0, len(examples["y"]))
        yield jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf)[index], examples)


def report(state) -> str:
    """How many decisions each optimizer won, from the state of the guard."""
    wins = optax.tree.get(state, "wins")
    return "" if wins is None else f"; decisions for learned, AdamW: {wins.tolist()}"


if __name__ == "__main__":
    main()
