"""Fine-tuning: a learned optimizer for the new head, AdamW with a small rate for the body.

    python docs/examples/finetune_partition.py

A network that knows the digits 0 to 4 learns the digits 5 to 9. `optax.partition` gives each part
of the params its own transformation, and passes `value=loss` on to the learned optimizer.
"""

import flax.linen as nn
import jax
import optax

import metaopt
from metaopt.datasets import digits

OLD, NEW = range(5), range(5, 10)
STEPS = 100


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1) / 16.0
        x = nn.relu(nn.Dense(64, name="body")(x))
        return nn.Dense(5, name="head")(x)


NET = Net()


def loss_fn(params, batch):
    logits = NET.apply({"params": params}, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def only(examples, classes):
    """The examples of the given classes, with labels that start at 0."""
    kept = (examples["y"] >= classes[0]) & (examples["y"] <= classes[-1])
    return {"x": examples["x"][kept], "y": examples["y"][kept] - classes[0]}


def train(tx, params, examples, key):
    @jax.jit
    def train_step(params, state, key):
        index = jax.random.randint(key, (32,), 0, len(examples["y"]))
        batch = jax.tree.map(lambda leaf: leaf[index], examples)
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for k in jax.random.split(key, STEPS):
        params, state = train_step(params, state, k)
    return params


def main() -> dict[str, float]:
    data = digits().splits
    k_net, k_theta, k_pretrain, k_tune, k_head = jax.random.split(jax.random.key(0), 5)
    params = NET.init(k_net, data["train"]["x"][:1])["params"]
    adam = optax.with_extra_args_support(optax.adam(1e-2))
    params = train(adam, params, only(data["train"], OLD), k_pretrain)
    params["head"] = NET.init(k_head, data["train"]["x"][:1])["params"]["head"]  # a new head

    # The variant "none" has no weights per layer, so its theta fits any part of any network.
    l3rs = metaopt.optimizers.l3rs(variant="none")
    theta = l3rs.init(k_theta, params["head"])  # or metaopt.load(FOLDER).theta
    tx = optax.partition(
        {"learned": l3rs.apply(theta, num_steps=STEPS), "slow": optax.adamw(1e-4)},
        {"body": "slow", "head": "learned"},
    )
    test = only(data["test"], NEW)
    losses = {"before": float(loss_fn(params, test))}
    tuned = train(tx, params, only(data["train"], NEW), k_tune)
    losses["after"] = float(loss_fn(tuned, test))
    change = jax.tree.map(lambda new, old: abs(new - old).mean(), tuned, params)
    print(f"test loss on the new digits {losses['before']:.3f} -> {losses['after']:.3f}")
    for part, leaves in change.items():
        print(f"mean change of a weight of the {part}: {leaves['kernel']:.4f}")
    return losses


if __name__ == "__main__":
    main()
