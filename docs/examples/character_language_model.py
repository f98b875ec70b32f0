"""A character language model: a small transformer learns Python's help texts and writes.

    python docs/examples/character_language_model.py [--checkpoint FOLDER] [--text FILE]

A learned optimizer races Adam, and the params follow the leader. Without `--checkpoint` the learned
optimizer is an untrained L3RS. `--text` trains on a text of your own.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import metaopt
from metaopt import datasets, guards, tasks
from metaopt.tasks.networks import Transformer

LENGTH = 32  # characters that the model sees
STEPS = 150  # mini-batches


def learned_optimizer(checkpoint, key, params, num_steps) -> optax.GradientTransformation:
    if checkpoint is not None:
        return metaopt.load(checkpoint).apply(num_steps=num_steps)
    l3rs = metaopt.optimizers.l3rs(variant="none", lambda_0=0.05)
    return l3rs.apply(l3rs.init(key, params), num_steps=num_steps)


def write(net, params, vocabulary: str, start: str, characters: int, key) -> str:
    """Draws one character after the other from the distribution of the model."""
    seen = jnp.array([[vocabulary.index(c) for c in start.rjust(LENGTH)]])

    def draw(seen, key):
        logits = net.apply({"params": params}, seen)[0, -1]
        new = jax.random.categorical(key, logits / 0.6)
        return jnp.roll(seen, -1).at[0, -1].set(new), new

    _, drawn = jax.jit(lambda keys: jax.lax.scan(draw, seen, keys))(
        jax.random.split(key, characters)
    )
    return start + "".join(vocabulary[i] for i in drawn.tolist())


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a folder written by `metaopt train`")
    parser.add_argument("--text", type=Path, help="a text file of at least 1000 characters")
    args = parser.parse_args(argv)

    text = datasets.text_from_file(args.text) if args.text else datasets.python_topics()
    net = Transformer(len(text.vocabulary), width=32, layers=1, max_length=LENGTH)
    task = tasks.language_model(net, text, batch_size=16, length=LENGTH)
    k_params, k_theta, k_data, k_write = jax.random.split(jax.random.key(0), 4)
    params = task.init(k_params)

    adam = optax.adam(3e-3)
    learned = learned_optimizer(args.checkpoint, k_theta, params, STEPS)
    tx = guards.race(learned, adam)
    state = tx.init(params)

    @jax.jit
    def train_step(params, state, key):
        batch = task.sample(key, ())
        value_fn = lambda params: task.loss(params, batch)
        updates, state = tx.update(None, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    held_out = jax.jit(lambda params: task.loss(params, task.whole("test")))
    losses = {"start": float(held_out(params)), "guessing": float(jnp.log(len(text.vocabulary)))}
    for k in jax.random.split(k_data, STEPS):
        params, state = train_step(params, state, k)
    losses["end"] = float(held_out(params))
    print(f"nats per character {losses['start']:.2f} -> {losses['end']:.2f}", end="; ")
    print(f"guessing: {losses['guessing']:.2f}")
    print(f"decisions for the learned optimizer, for Adam: {state.info.wins.tolist()}")
    print(write(net, params, text.vocabulary, "The ", 100, k_write))
    return losses


if __name__ == "__main__":
    main()
