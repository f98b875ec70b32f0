"""Evaluation folders of real optimizers on quadratics, computed in plain numpy."""

from pathlib import Path

import numpy as np

from metaopt.evaluation import records

NUM_STEPS, WINDOW, SEEDS = 60, 5, 8
HOSTILE = "<script>alert(1)</script>"
LAYERS = ("Dense.bias", HOSTILE)
EIGENVALUES = np.array([0.1, 0.4, 1.0])


def starts(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(SEEDS, EIGENVALUES.size))


def descend(rate: float, seed: int = 0) -> np.ndarray:
    """Loss of gradient descent, ``[S, M]``, in closed form: x_t = (1 - rate h)^t x_0."""
    steps = np.arange(0, NUM_STEPS + 1, WINDOW)[None, :, None]
    x = (1.0 - rate * EIGENVALUES) ** steps * starts(seed)[:, None, :]
    return 0.5 * np.sum(EIGENVALUES * x**2, axis=-1)


def adam(rate: float, seed: int = 0) -> np.ndarray:
    """Loss of Adam, ``[S, M]``, step by step."""
    x, m, v, losses = starts(seed), 0.0, 0.0, []
    for t in range(NUM_STEPS + 1):
        if t % WINDOW == 0:
            losses.append(0.5 * np.sum(EIGENVALUES * x**2, axis=-1))
        gradient = EIGENVALUES * x
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        x = x - rate * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
    return np.stack(losses, axis=1)


def curves(loss: np.ndarray, *, cost: int = 1, **state: np.ndarray) -> records.Curves:
    steps = np.arange(0, NUM_STEPS + 1, WINDOW)
    return records.Curves(
        steps=steps,
        grad_evals=cost * steps,
        seconds=1e-4 * cost * steps,
        loss=loss.astype(np.float32),
        accuracy=np.clip(1.0 - loss, 0.1, 1.0),
        train_loss=np.full_like(loss, np.nan),
        windows=steps[1:],
        state=state,
    )


def write_task(
    folder: Path,
    title: str,
    contenders: dict[str, tuple[records.CurveRecord, records.Curves]],
    tuned: dict[str, tuple[list[float], np.ndarray]] | None = None,
    *,
    left_out: dict[str, str] | None = None,
    velodrome: dict | None = None,
) -> None:
    """Writes the folder of a task.

    Args:
      folder: the task's folder.
      title: title of the task.
      contenders: name -> entry of the record, and curves.
      tuned: baseline -> rates of its grid, and their losses ``[P, S, M]``.
      left_out: see `records.TaskRecord`.
      velodrome: see `records.TaskRecord`.
    """
    entries, searches = {}, {}
    for number, (name, (entry, arrays)) in enumerate(contenders.items()):
        entries[name] = entry._replace(file=f"{number}.npz")
        records.write_arrays(folder / f"{number}.npz", arrays)
    for name, (rates, losses) in (tuned or {}).items():
        steps = np.arange(0, NUM_STEPS + 1, WINDOW)
        records.write_arrays(
            folder / f"tuning-{name}.npz", records.Grid(steps, losses, np.array(1.5))
        )
        last = losses[:, :, -1].mean(axis=1)
        points = [{"lr": rate, "schedule": "constant"} for rate in rates]
        searches[name] = {
            "point": points[int(np.argmin(last))],
            "grid": points,
            "loss": last.tolist(),
            "seeds": losses.shape[1],
            "runs": losses.shape[0] * losses.shape[1],
            "grad_evals": losses.shape[0] * losses.shape[1] * NUM_STEPS,
            "seconds": 1.5,
            "file": f"tuning-{name}.npz",
        }
    record = records.TaskRecord(
        title=title,
        task="quadratic",
        num_steps=NUM_STEPS,
        window=WINDOW,
        tuned=searches,
        curves=entries,
        left_out=left_out or {},
        velodrome=velodrome or {},
    )
    records.write_record(folder, record)


def write_index(folder: Path, tasks: list[str], **more) -> None:
    records.write_json(
        folder / "evaluation.json",
        {
            "format": records.FORMAT,
            "job": {"suite": "quadratics", "seeds": SEEDS, "checkpoints": [HOSTILE]},
            "tasks": tasks,
            "environment": {"python": "3.11.9", "command": f"metaopt evaluate '{HOSTILE}'"},
            **more,
        },
    )


def contenders(seed: int) -> dict[str, tuple[records.CurveRecord, records.Curves]]:
    """Two baselines, an L3RS, a guard around it, and an optimizer that diverges."""
    entry = lambda kind, **parts: records.CurveRecord("", kind, **parts)
    ramp = np.linspace(1.0, 0.0, NUM_STEPS // WINDOW)
    norms = np.broadcast_to(0.1 * 0.5 ** (6 * ramp)[:, None], (SEEDS, ramp.size, 2))
    weights = np.broadcast_to(np.stack([ramp, 1 - ramp], -1)[:, None], (SEEDS, ramp.size, 2, 2))
    wild = descend(2.2, seed)
    wild[::2, -3:] = np.nan
    accepted = np.arange(SEEDS)[:, None] < np.arange(ramp.size)[None]  # min(window, S) of S seeds
    learned = entry(
        "learned", learned=HOSTILE, layers=("Dense.bias", HOSTILE), bases=("adam", "sgd")
    )
    guarded = entry("guarded", learned=HOSTILE, guard="RACE", fallback="SGD")
    return {
        "SGD": (entry("baseline"), curves(descend(0.3, seed))),
        "Adam": (entry("baseline"), curves(adam(0.05, seed))),
        HOSTILE: (learned, curves(descend(1.2, seed), lambda_=norms, alpha=weights)),
        f"RACE({HOSTILE}, SGD)": (guarded, curves(descend(1.2, seed), cost=2, accepted=accepted)),
        "Wild": (entry("learned", learned="Wild"), curves(wild)),
    }
