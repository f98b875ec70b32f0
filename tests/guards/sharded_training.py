"""A guarded training loop on all devices, which resumes; test_sharded.py starts and kills it.

    python sharded_training.py FOLDER STEPS

Kernels and all that belongs to them are split over the devices, and so is each mini-batch. Orbax
saves params and state after every third step, which is mostly inside of a window of the guard. At
the end the params are in FOLDER/params.npz, and every bit of params and state is in the digest that
is printed.
"""

import hashlib
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from metaopt import datasets, guards, optimizers

FAMILY = optimizers.l3rs(hidden=(4,), variant="none", lambda_0=0.3)
SPLIT = 64  # a leaf whose first axis has this length or a multiple of it is split


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


def main(folder: Path, num_steps: int) -> None:
    """Trains from the last checkpoint, or from the start."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    sharding_of = lambda leaf: split if leaf.ndim == 2 and leaf.shape[0] % SPLIT == 0 else whole
    split_train = datasets.load("digits").splits["train"]
    images, labels = split_train["x"].reshape(-1, 64), split_train["y"]

    net = Net()
    params = net.init(jax.random.key(0), images[:1])
    params = jax.device_put(params, jax.tree.map(sharding_of, params))
    theta = FAMILY.init(jax.random.key(1), params)
    guard = guards.race(
        FAMILY.apply(theta, num_steps=num_steps), optax.adamw(1e-2), n_t=4, patience=2, trial=3
    )
    shardings = jax.tree.map(sharding_of, jax.eval_shape(guard.init, params))
    state = jax.jit(guard.init, out_shardings=shardings)(params)

    outputs = (jax.tree.map(sharding_of, params), shardings)

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=outputs)
    def step(params, state, x, y):
        def value_fn(params):
            logits = net.apply(params, x)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

        updates, state = guard.update(None, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options) as manager:
        first = 0
        if (latest := manager.latest_step()) is not None:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
            params, state = manager.restore(latest, args=ocp.args.StandardRestore(abstract))
            first = latest
            print("resumed", first, flush=True)
        for index in range(first, num_steps):
            rows = jax.random.choice(jax.random.key(index), len(images), (32,))
            batch = jax.device_put((images[rows], labels[rows]), split)
            before = jax.tree.leaves((params, state))
            params, state = step(params, state, *batch)
            assert all(leaf.is_deleted() for leaf in before if leaf.size > 1)  # donated
            if (index + 1) % 3 == 0:
                manager.save(index + 1, args=ocp.args.StandardSave((params, state)))
                print("saved", index + 1, flush=True)
    assert step._cache_size() == 1

    num_split = 0
    for leaf in jax.tree.leaves((params, state)):
        if sharding_of(leaf) is split:
            (part,) = {shard.data.shape[0] for shard in leaf.addressable_shards}
            assert part * jax.device_count() == leaf.shape[0], leaf.sharding
            num_split += 1
    np.savez(folder / "params.npz", *jax.tree.leaves(params))
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((params, state)):
        digest.update(np.asarray(leaf).tobytes())
    info = guards.info(state)
    print("split", num_split)
    print("windows", info.windows, "wins", *info.wins, "runs", optax.tree.get(state, "runs"))
    print("digest", digest.hexdigest())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
