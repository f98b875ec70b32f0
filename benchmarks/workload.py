"""The work that the benchmark of meta-training times: generations, windows, and bare SGD runs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from benchmarks.guards import images
from metaopt import meta, optimizers
from metaopt.core.rollouts import mean_loss
from metaopt.core.types import LearnedOptimizer, Task, single
from metaopt.meta import devices
from metaopt.tasks import classification
from metaopt.tasks.networks import MLP

LEARNED: dict[str, Callable[[], LearnedOptimizer]] = {
    "l3rs": lambda: optimizers.l3rs(("sgd", "adam")),
    "lstm": lambda: optimizers.lstm(20),
    "velo": lambda: optimizers.velo(512, 256),
}


class Workload(NamedTuple):
    """A generation.

    Attributes: hidden: units of the MLP's hidden layer; batch_size; population: candidates;
    tasks: inner runs of each; num_steps: of an inner run.
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


TRUNCATION = 20  # steps of a window of back-propagation


def mlp_task(workload: Workload) -> Task:
    """An MLP with one hidden layer on images of 28x28 pixels."""
    return classification(MLP((workload.hidden, 10)), images(), batch_size=workload.batch_size)


def generation(population: int, tasks: int, num_steps: int) -> meta.NESConfig:
    """Settings of a generation that is timed: runs of one length, judged on one mini-batch."""
    return meta.NESConfig(
        population=population,
        tasks=tasks,
        min_steps=num_steps,
        max_steps=num_steps,
        eval_batches=1,
    )


def nes_generation(
    lopt: LearnedOptimizer, task: Task, workload: Workload, spread=devices.EVERYTHING_HERE
):
    """NES: ``(step, trainer, key, state)``."""
    theta = lopt.init(jax.random.key(0), task.init(jax.random.key(1)))
    config = generation(workload.population, workload.tasks, workload.num_steps)
    return _placed(meta.nes(lopt, single(task), config, spread), theta)


def tbptt_window(lopt: LearnedOptimizer, task: Task, workload: Workload, mesh: Mesh | None):
    """Truncated back-propagation: ``(step, trainer, key, state, inner steps of a step)``."""
    runs = workload.population * workload.tasks
    theta = lopt.init(jax.random.key(0), task.init(jax.random.key(1)))
    config = meta.TBPTTConfig(rollout=TRUNCATION, truncation=TRUNCATION, tasks=runs)
    return *_placed(
        meta.tbptt(lopt, single(task), config, devices.Spread(mesh)), theta
    ), runs * TRUNCATION


def _placed(trainer: meta.MetaTrainer, theta: Any):
    """``(step, trainer, key, state)``; key and state are numpy arrays."""
    state = jax.tree.map(np.asarray, trainer.init(jax.random.key(2), theta))
    bits = np.asarray(jax.random.key_data(jax.random.key(3)))

    def step(trainer: meta.MetaTrainer, bits: Any, state: Any) -> Any:
        return trainer.step(jax.random.wrap_key_data(bits), state)

    return step, trainer, bits, state


def bare_sgd(task: Task, workload: Workload, mesh: Mesh | None = None):
    """``key -> losses [population, tasks]`` of SGD with one step size per candidate, by hand."""

    def one_run(rate, key):
        k_init, k_train, k_eval = jax.random.split(key, 3)

        def step(params, t):
            batch = task.sample(jax.random.fold_in(k_train, t), ())
            value, grads = jax.value_and_grad(task.loss)(params, batch)
            return jax.tree.map(lambda p, g: p - rate * g, params, grads), value

        params, _ = jax.lax.scan(step, task.init(k_init), jnp.arange(workload.num_steps))
        return mean_loss(task.loss, params, task.sample(k_eval, (1,), "valid"))

    runs = jax.vmap(jax.vmap(one_run, in_axes=(None, 0)), in_axes=(0, None))

    def losses(key):
        rates = jnp.linspace(0.05, 0.1, workload.population)
        return shared_out(rates, jax.random.split(key, workload.tasks))

    by_candidate, by_task = map(PartitionSpec, (devices.POPULATION, devices.TASK))
    both = PartitionSpec(devices.POPULATION, devices.TASK)
    shared_out = devices.over_runs(runs, mesh, (by_candidate, by_task), both)
    return losses
