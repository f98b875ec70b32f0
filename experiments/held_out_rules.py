"""Compares rules of the race with held-out data, where a small training set is repeated.

Claim: on the two trials of `experiments.race_rules` with repeated data, the worst tenth of `race`
is nearer to the better side if held-out losses overrule training losses at one standard error
(``overrule=1``) than if either decides alone. A validation split of a few hundred examples cannot
tell the sides apart at the end of a run: the standard error of their difference is above half of
the loss.

    python -m experiments.held_out_rules

Needs FashionMNIST and MNIST (docs/data.md). Takes five minutes on 2 cores; it resumes. Writes
docs/results/race/held-out.json; docs/guards/race.md quotes it.

Both sides run alone, from several keys with 10 runs each, and their losses along the way are kept.
Every rule is then replayed on these losses: no runner of a race moves when the leader changes. (No
challenger of these trials is retired.)
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.race_rules import MEASUREMENTS, SEEDS, TRIALS, Trial
from metaopt.core.rollouts import held_model_state, init_state, unroll
from metaopt.core.types import TaskFamily, loss_arguments
from metaopt.evaluation.curves import begin
from metaopt.evaluation.records import read_json, write_json

RESULT = Path("docs/results/race/held-out.json")
KEYS = {"resnet": (11,), "finetune": (11,)}
N_T, SMOOTHING, MARGIN = 10, 0.5, 2.0  # the defaults of the race
EVERY = 5  # steps between two points at which a side is judged and measured
# Standard errors at which held-out losses overrule training losses.
OVERRULE = {"held-out alone": 0.0, "0.5": 0.5, "1": 1.0, "1.5": 1.5, "2": 2.0, "training": np.inf}


def losses(trial: Trial, family: TaskFamily, seed: int) -> dict[str, np.ndarray]:
    """Losses of both sides alone, the challenger's first.

    Returns:
      With n = steps / EVERY, "train" ``[S, n, EVERY, 2]``, before each step on its mini-batch;
      "valid" ``[S, n, parts, 2]`` and "test" ``[S, n, 2]``, after every so many steps.
    """
    starts = begin(family, jax.random.split(jax.random.key(seed), SEEDS))

    def run(make: Any, family: TaskFamily, one: Any) -> dict[str, jax.Array]:
        task_params, params, model_state, key = one
        task, tx = family.task(task_params), make(trial.steps)
        cut = lambda leaf: leaf[: len(leaf) // N_T * N_T].reshape(-1, N_T, *leaf.shape[1:])
        parts = jax.tree.map(lambda leaf: cut(leaf).swapaxes(0, 1), task.whole("valid"))

        def body(carry, key):
            params, state = carry
            batches = task.sample(key, (EVERY,))
            params, state, train = unroll(tx, params, state, task.loss, batches)
            point = loss_arguments(params, held_model_state(state))
            valid = jax.vmap(lambda part: task.eval_loss(*point, part))(parts)
            test = task.eval_loss(*point, task.whole("test"))
            return (params, state), {"train": train, "valid": valid, "test": test}

        carry = params, init_state(tx, params, model_state)
        return jax.lax.scan(body, carry, jax.random.split(key, trial.steps // EVERY))[1]

    runs = [starts.task_params, starts.params, starts.model_state, starts.keys]
    sides = []
    for make in (trial.challenger, trial.fallback):
        program = jax.jit(lambda family, one, make=make: run(make, family, one))
        ones = [jax.tree.map(lambda leaf, i=i: leaf[i], runs) for i in range(SEEDS)]
        sides.append([jax.device_get(program(family, one)) for one in ones])
    stack = lambda name: np.stack(
        [np.stack([one[name] for one in side]) for side in sides], axis=-1
    ).astype(float)
    return {name: stack(name) for name in ("train", "valid", "test")}


def leaders(train: np.ndarray, valid: np.ndarray, overrule: float) -> np.ndarray:
    """The leader of a run after every `EVERY` steps ``[n]``, 0 for the challenger.

    Args:
      train: ``[n, EVERY, 2]``.
      valid: ``[n, parts, 2]``.
      overrule: see `metaopt.guards.race`.
    """
    size = N_T // EVERY
    found, leader, average, variance = np.ones(len(train), int), 1, None, 0.0
    for end in range(size, len(train) + 1, size):
        window = train[end - size : end].reshape(N_T, 2)
        mean, error = window.mean(axis=0), (window[:, 0] - window[:, 1]).var() / (N_T - 1)
        if average is None:
            average, variance = mean, error
        else:
            average = SMOOTHING * average + (1 - SMOOTHING) * mean
            variance = SMOOTHING**2 * variance + (1 - SMOOTHING) ** 2 * error
        needed = MARGIN * np.sqrt(variance) if leader else 0.0
        by_training = int(average[0] >= average[1] - needed)
        difference = valid[end - 1, :, 0] - valid[end - 1, :, 1]
        error = difference.std() / np.sqrt(len(difference) - 1)
        is_clear = np.isfinite(overrule) and abs(difference.mean()) > overrule * error
        leader = int(difference.mean() >= 0) if is_clear else by_training
        found[end - 1 : end - 1 + size] = leader
    return found


def tenths(test: np.ndarray) -> np.ndarray:
    """Mean loss at every tenth as in `race_rules`, of ``[S, n]``."""
    every = test.shape[1] // MEASUREMENTS
    measured = test.mean(axis=0)[every - 1 :: every]
    return np.append(measured[1:-1:2], measured[-3:].mean())


def compared(all_losses: dict[str, np.ndarray]) -> dict[str, Any]:
    """Excess over the better side by rule, and the error of the held-out difference."""
    train, valid, test = (all_losses[name] for name in ("train", "valid", "test"))
    best = np.minimum(tenths(test[..., 0]), tenths(test[..., 1]))
    rules = {}
    for name, overrule in OVERRULE.items():
        lead = np.stack([leaders(t, v, overrule) for t, v in zip(train, valid, strict=True)])
        excess = tenths(np.take_along_axis(test, lead[..., None], axis=2)[..., 0]) / best - 1
        rules[name] = {
            "worst": float(excess.max()),
            "end": float(excess[-1]),
            "mean": float(excess.mean()),
        }
    last = valid[:, -1]
    errors = (last[..., 0] - last[..., 1]).std(axis=1) / np.sqrt(last.shape[1] - 1)
    relative = errors.mean() / last.mean(axis=(0, 1)).min()
    return {"error_at_the_end": float(relative), "rules": rules}


def main() -> None:
    record: dict[str, Any] = {"runs": SEEDS, "trials": {}}
    if RESULT.exists():
        record = read_json(RESULT)
    for name, seeds in KEYS.items():
        family = TRIALS[name].task()
        entries = record["trials"].setdefault(name, {})
        for seed in seeds:
            if str(seed) not in entries:
                entries[str(seed)] = compared(losses(TRIALS[name], family, seed))
                write_json(RESULT, record)
                print(name, seed, entries[str(seed)], flush=True)
    for name in OVERRULE:
        found = [e["rules"][name] for trial in record["trials"].values() for e in trial.values()]
        means = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
        record.setdefault("means", {})[name] = means
        print(f"{name:16s}", {key: f"{value:.1%}" for key, value in means.items()})
    write_json(RESULT, record)


if __name__ == "__main__":
    main()
