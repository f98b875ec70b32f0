"""What the benchmarks time: images, learned optimizers, meta-updates, and bare SGD."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from metaopt import meta, optimizers
from metaopt.core.rollouts import mean_loss
from metaopt.core.types import Key, LearnedOptimizer, Task, Theta, single
from metaopt.datasets import Dataset, digits
from metaopt.meta import devices
from metaopt.tasks import classification
from metaopt.tasks.networks import MLP

LEARNED: dict[str, Callable[[], LearnedOptimizer]] = {
    "l3rs": lambda: optimizers.l3rs(("sgd", "adam")),
    "lstm": lambda: optimizers.lstm(20),
    "velo": lambda: optimizers.velo(512, 256),
}
TRUNCATION = 20  # steps of a window of truncated back-propagation


class Workload(NamedTuple):
    """One generation of NES.

    Attributes:
      hidden: units of the MLP's hidden layer.
      batch_size: images per mini-batch.
      population: candidates.
      tasks: inner runs of each candidate.
      num_steps: steps of an inner run.
    """

    hidden: int = 32
    batch_size: int = 128
    population: int = 2
    tasks: int = 8
    num_steps: int = 50

    @property
    def inner_steps(self) -> int:
        """Optimizee steps of a generation."""
        return self.population * self.tasks * self.num_steps


class MetaUpdate(NamedTuple):
    """A meta-update, ready to be compiled.

    Attributes:
      step: ``(trainer, key_data, state) -> (state, metrics)``.
      trainer: the meta-trainer; its arrays are those of the task.
      key_data: bits of a PRNG key, a numpy array.
      state: the meta-trainer's state, numpy arrays.
      inner_steps: optimizee steps that a call of `step` takes.
    """

    step: Callable[[meta.MetaTrainer, Any, Any], Any]
    trainer: meta.MetaTrainer
    key_data: np.ndarray
    state: Any
    inner_steps: int


def images() -> Dataset:
    """The 8x8 digits enlarged to 28x28: real images without a download."""
    data = digits()

    def enlarge(x):
        x = jnp.repeat(jnp.repeat(x, 3, axis=1), 3, axis=2)  # [n, 24, 24, 1]
        return jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))

    splits: Any = {
        split: {"x": enlarge(examples["x"]), "y": examples["y"]}
        for split, examples in data.splits.items()
    }
    return data._replace(name="digits at 28x28", splits=splits)


def mlp_task(workload: Workload) -> Task:
    """An MLP with one hidden layer on images of 28x28 pixels."""
    return classification(MLP((workload.hidden, 10)), images(), batch_size=workload.batch_size)


def nes_config(population: int, tasks: int, num_steps: int) -> meta.NESConfig:
    """Settings of a generation whose runs have one length and are judged on one mini-batch."""
    return meta.NESConfig(
        population=population,
        tasks=tasks,
        min_steps=num_steps,
        max_steps=num_steps,
        eval_batches=1,
    )


def nes_generation(
    lopt: LearnedOptimizer,
    task: Task,
    workload: Workload,
    spread: devices.Spread = devices.EVERYTHING_HERE,
) -> MetaUpdate:
    """One generation of NES."""
    theta = _initial_theta(lopt, task)
    config = nes_config(workload.population, workload.tasks, workload.num_steps)
    trainer = meta.nes(lopt, single(task), config, spread)
    return _meta_update(trainer, theta, workload.inner_steps)


def tbptt_window(
    lopt: LearnedOptimizer, task: Task, workload: Workload, mesh: Mesh | None
) -> MetaUpdate:
    """One window of truncated back-propagation through as many runs as a generation has."""
    runs = workload.population * workload.tasks
    theta = _initial_theta(lopt, task)
    config = meta.TBPTTConfig(rollout=TRUNCATION, truncation=TRUNCATION, tasks=runs)
    trainer = meta.tbptt(lopt, single(task), config, devices.Spread(mesh))
    return _meta_update(trainer, theta, runs * TRUNCATION)


def bare_sgd(
    task: Task, workload: Workload, mesh: Mesh | None = None
) -> Callable[[Key], jax.Array]:
    """The inner runs of a generation, with SGD written by hand in place of a learned optimizer.

    Args:
      task: the task.
      workload: how many runs there are, and how long they are.
      mesh: devices that share the runs; None: one device.

    Returns:
      ``key -> losses [population, tasks]``; each candidate is a step size.
    """

    def one_run(rate, key):
        k_init, k_train, k_eval = jax.random.split(key, 3)

        def step(params, t):
            batch = task.sample(jax.random.fold_in(k_train, t), ())
            value, grads = jax.value_and_grad(task.loss)(params, batch)
            return jax.tree.map(lambda p, g: p - rate * g, params, grads), value

        params, _ = jax.lax.scan(step, task.init(k_init), jnp.arange(workload.num_steps))
        return mean_loss(task.loss, params, task.sample(k_eval, (1,), "valid"))

    all_runs = devices.over_runs(
        jax.vmap(jax.vmap(one_run, in_axes=(None, 0)), in_axes=(0, None)),
        mesh,
        in_specs=(PartitionSpec(devices.POPULATION), PartitionSpec(devices.TASK)),
        out_specs=PartitionSpec(devices.POPULATION, devices.TASK),
    )

    def losses(key):
        rates = jnp.linspace(0.05, 0.1, workload.population)
        return all_runs(rates, jax.random.split(key, workload.tasks))

    return losses


def _initial_theta(lopt: LearnedOptimizer, task: Task) -> Theta:
    return lopt.init(jax.random.key(0), task.init(jax.random.key(1)))


def _meta_update(trainer: meta.MetaTrainer, theta: Theta, inner_steps: int) -> MetaUpdate:
    def step(trainer, key_data, state):
        return trainer.step(jax.random.wrap_key_data(key_data), state)

    return MetaUpdate(
        step=step,
        trainer=trainer,
        key_data=np.asarray(jax.random.key_data(jax.random.key(3))),
        state=jax.tree.map(np.asarray, trainer.init(jax.random.key(2), theta)),
        inner_steps=inner_steps,
    )
