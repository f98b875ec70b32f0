"""A Flax Linen CNN with BatchNorm and Dropout, trained by AdamW and by a race around AdamW.

    python docs/examples/flax_batchnorm_dropout.py [--steps N]

Each runner of a guard has its own running statistics. They travel as the model state: `init` takes
it, `value_fn` takes and returns it, and `guards.model_state` reads the one that belongs to the
params in your hand. The key of the mini-batch fixes the dropout, so that all runners drop the same
units. The learned optimizer is the zoo's LSTM for small CNNs.
"""

import argparse

import flax.linen as nn
import jax
import optax

import metaopt
from metaopt import guards
from metaopt.datasets import digits


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = x / 16.0
        for channels in (8, 16):
            x = metaopt.tasks.networks.Conv(channels, 3, 2)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(x)


NET = Net()


def loss_fn(params, batch_stats, batch):
    """Returns the loss and the new running statistics."""
    logits, changed = NET.apply(
        {"params": params, "batch_stats": batch_stats},
        batch["x"],
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": batch["key"]},
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return loss, changed["batch_stats"]


def train_adamw(variables, batches):
    """The loop without a guard."""
    params, batch_stats = variables["params"], variables["batch_stats"]
    tx = optax.adamw(1e-2)
    state = tx.init(params)

    @jax.jit
    def train_step(params, batch_stats, state, batch):
        value_fn = lambda p, s: loss_fn(p, s, batch)
        grads, batch_stats = jax.grad(value_fn, has_aux=True)(params, batch_stats)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), batch_stats, state

    for batch in batches:
        params, batch_stats, state = train_step(params, batch_stats, state, batch)
    return {"params": params, "batch_stats": batch_stats}


def train_guarded(variables, batches, learned):
    """The same loop with a guard: the numbered lines differ."""
    params, batch_stats = variables["params"], variables["batch_stats"]
    tx = guards.race(learned, optax.adamw(1e-2))  # 1: the guard around AdamW
    state = tx.init(params, batch_stats)  # 2: the guard holds the running statistics

    @jax.jit
    def train_step(params, state, batch):
        value_fn = lambda p, s: loss_fn(p, s, batch)
        updates, state = tx.update(None, state, params, value_fn=value_fn)  # 3: a function
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = train_step(params, state, batch)
    info = state.info
    print(f"decisions for the LSTM, for AdamW: {info.wins.tolist()}", end="; ")
    print(f"gradients per mini-batch: {info.gradient_evals / len(batches):.2f}")
    return {"params": params, "batch_stats": guards.model_state(state)}  # 4: the leader's


@jax.jit
def evaluate(variables, examples):
    """Loss and accuracy with the running statistics."""
    logits = NET.apply(variables, examples["x"], train=False)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, examples["y"]).mean()
    return loss, (logits.argmax(-1) == examples["y"]).mean()


def main(argv=None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="mini-batches")
    steps = parser.parse_args(argv).steps

    data = digits().splits
    k_net, k_data = jax.random.split(jax.random.key(0))
    variables = NET.init(k_net, data["train"]["x"][:1], train=False)
    batches = []
    for key in jax.random.split(k_data, steps):
        k_index, k_dropout = jax.random.split(key)
        index = jax.random.randint(k_index, (64,), 0, len(data["train"]["y"]))
        examples = jax.tree.map(lambda leaf, index=index: leaf[index], data["train"])
        batches.append({**examples, "key": k_dropout})

    learned = metaopt.load("lstm-cnn-fmnist-300").apply(num_steps=steps)
    runs = {
        "AdamW": train_adamw(variables, batches),
        "race(LSTM, AdamW)": train_guarded(variables, batches, learned),
    }
    results = {}
    for name, trained in runs.items():
        loss, accuracy = (float(x) for x in evaluate(trained, data["test"]))
        print(f"{name:18} test loss {loss:.3f}, accuracy {accuracy:.1%}")
        results[name] = {"loss": loss, "accuracy": accuracy}
    return results


if __name__ == "__main__":
    main()
