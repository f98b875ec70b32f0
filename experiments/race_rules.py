"""Compares the rules of the race: memory after a lost window, jumps, and a third runner.

Claim: where the fallback is noisy in the short run and good in the long run (SGD at rate 3), LGL2O
falls behind SGD's own run. The race starts as fast as the learned optimizer and ends where SGD
does. The rule for the learned optimizer's memory does not matter. Jumps help in the middle of a
run. A third runner (Adam) takes the race to its own, lower loss.

    python -m experiments.race_rules [--pool 1] [--seeds N] [--only NAME ...] [--draw]

Needs FashionMNIST (docs/data.md). Takes about an hour on 2 cores (an estimate: the record has no
times); it resumes. Meta-trains the LSTM, runs every rule in runs/race, and writes
docs/results/race/race.json and docs/images/race-rules.png; docs/guards/race.md shows them. The
optimizee is LGL2O's MLP with 20 sigmoid units. Images are averaged over 2x2 pixels, so that it fits
on two cores (``--pool 1``: 28x28). ``--draw`` only draws the committed record again.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from experiments.pictures import save
from metaopt import datasets, guards, meta, optimizers
from metaopt.core.types import Batch, Split, Task, Theta, single
from metaopt.evaluation.curves import evaluate
from metaopt.evaluation.statistics import final_mean
from metaopt.meta.loop import train
from metaopt.report.figures import style
from metaopt.report.looks import COLOURS
from metaopt.tasks import classification
from metaopt.tasks.networks import MLP

RESULT = Path("docs/results/race/race.json")
FIGURE = Path("docs/images/race-rules.png")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the whole experiment.

    Attributes:
      data: folder name of the data set.
      pool: pixels averaged along each side.
      batch: images of a mini-batch.
      hidden: units of each LSTM layer.
      meta_steps: truncated meta-updates.
      meta_lr: Adam's rate on theta.
      sgd: rate of the fallback SGD, which decays as in LGL2O.
      adam: rate of the fallback Adam.
      steps: steps of every run.
      window: n_t and n_c of every guard.
      seeds: runs of every contender.
      marks: steps at which losses are reported, as means over the `last` windows before them.
      last: windows of a mean, and windows per point of the recorded curves.
      judged: held-out images on which the loss is measured.
    """

    data: str = "fashion_mnist"
    pool: int = 2
    batch: int = 128
    hidden: int = 20
    meta_steps: int = 800
    meta_lr: float = 2e-3
    sgd: float = 3.0
    adam: float = 1e-2
    steps: int = 6000
    window: int = 10
    seeds: int = 5
    marks: tuple[int, ...] = (100, 300, 1000, 3000, 6000)
    last: int = 10
    judged: int = 1000


CONFIG = Config()

Memory = Literal["carry", "rollback", "reset"]
# Memory of a losing runner, as the record names it -> `on_reject` of `guards.race`.
ON_REJECT: dict[Memory, Any] = {"carry": "advance", "rollback": "rollback", "reset": "reset"}


class Rule(NamedTuple):
    """One form of the race.

    Attributes:
      name: name in the record.
      memory: a key of `ON_REJECT`.
      jumps: `jumps` of `guards.race`.
      adam: whether Adam is a third runner.
    """

    name: str
    memory: Memory
    jumps: bool = False
    adam: bool = False


RULES = (
    Rule("race carry", memory="carry"),
    Rule("race carry +Adam", memory="carry", adam=True),
    Rule("race carry jumps", memory="carry", jumps=True),
    Rule("race carry jumps +Adam", memory="carry", jumps=True, adam=True),
    Rule("race rollback", memory="rollback"),
    Rule("race rollback +Adam", memory="rollback", adam=True),
    Rule("race rollback jumps", memory="rollback", jumps=True),
    Rule("race rollback jumps +Adam", memory="rollback", jumps=True, adam=True),
    Rule("race reset", memory="reset"),
    Rule("race reset +Adam", memory="reset", adam=True),
    Rule("race reset jumps", memory="reset", jumps=True),
    Rule("race reset jumps +Adam", memory="reset", jumps=True, adam=True),
)


class Contender(NamedTuple):
    """What is run.

    Attributes:
      make: ``num_steps -> transformation``.
      is_guard: whether `make` gives a guard in window form.
    """

    make: Callable[[int], Any]
    is_guard: bool = False


def make_task(config: Config) -> Task:
    """MLP-20 on the training images; judged on some of those held out of them."""
    data = datasets.load(config.data)

    def pooled(split: Split, end: int | None = None) -> Batch:
        x, y = np.asarray(data.splits[split]["x"])[:end], data.splits[split]["y"][:end]
        side = x.shape[1] // config.pool
        blocks = x.reshape(len(x), side, config.pool, side, config.pool)
        means = blocks.mean(axis=(2, 4)).astype(np.uint8)
        return {"x": jnp.asarray(means[..., None]), "y": y}

    splits: dict[Split, Batch] = {
        "train": pooled("train"),
        "test": pooled("test"),
        "valid": pooled("valid", config.judged),
    }
    net = MLP((20, 10), nn.sigmoid)
    return classification(net, data._replace(splits=splits), batch_size=config.batch)


def meta_train(config: Config, task: Task, out: Path) -> Theta:
    """The LSTM's theta with the lowest loss at the end of held-out runs; resumes in `out`."""
    family, lopt = single(task), optimizers.lstm(config.hidden)
    settings = meta.TBPTTConfig(lr=config.meta_lr)
    theta = lopt.init(jax.random.key(0), task.init(jax.random.key(1)))

    names = ("data", "pool", "batch", "hidden", "meta_steps", "meta_lr")
    theta, _ = train(
        meta.tbptt(lopt, family, settings),
        theta,
        steps=config.meta_steps,
        seed=0,
        out=out,
        config={name: getattr(config, name) for name in names},
        validate=meta.validation(lopt, family, settings.rollout, runs=4, eval_batches=4),
        validate_every=50,
    )
    return theta


def contenders(config: Config, theta: Theta) -> dict[str, Contender]:
    """Name in the record -> contender: the runners alone, LGL2O, and every rule of the race."""
    sizes: Any = {"n_t": config.window, "n_c": config.window}

    def lstm():
        return optimizers.lstm(config.hidden).apply(theta)

    def sgd():
        return optimizers.sgd(config.sgd).apply({})

    def adam():
        return optax.adam(config.adam)

    def race(rule: Rule):
        fallbacks = (sgd(), adam()) if rule.adam else (sgd(),)
        return guards.race(
            lstm(), *fallbacks, on_reject=ON_REJECT[rule.memory], jumps=rule.jumps, **sizes
        )

    return {
        "SGD": Contender(lambda num_steps: sgd()),
        "Adam": Contender(lambda num_steps: adam()),
        "L2O": Contender(lambda num_steps: lstm()),
        "LGL2O": Contender(lambda num_steps: guards.lgl2o(lstm(), sgd(), **sizes), is_guard=True),
        **{
            rule.name: Contender(lambda num_steps, rule=rule: race(rule), is_guard=True)
            for rule in RULES
        },
    }


def curves_path(out: Path, name: str) -> Path:
    """The file with the curves of a contender."""
    return out / f"{name.replace(' ', '-')}.npz"


def run(config: Config, task: Task, theta: Theta, out: Path, only: tuple[str, ...] = ()) -> None:
    """Runs every contender that has no curves in `out` yet, all from the same seeds."""
    keys = jax.random.split(jax.random.key(2), config.seeds)
    for name, contender in contenders(config, theta).items():
        path = curves_path(out, name)
        if path.exists() or (only and name not in only):
            continue
        start = time.perf_counter()
        curves = evaluate(
            contender.make,
            task,
            num_steps=config.steps,
            keys=keys,
            window=config.window,
            split="valid",
            guard=contender.is_guard,
            diagnostics=("wins",) if contender.is_guard else (),
        )
        if contender.is_guard:
            wins = curves.state["wins"][:, -1]
        else:
            wins = np.zeros((config.seeds, 0))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, loss=curves.loss.astype(np.float32), wins=wins)
        part.rename(path)
        seconds = time.perf_counter() - start
        print(f"{name}: {final_mean(curves.loss).mean():.3f}, {seconds:.0f} s", flush=True)


def summarise(config: Config, out: Path) -> dict[str, Any]:
    """The record that the docs quote.

    Returns:
      ``{"config", "curve_every", "arms"}``; an arm has "loss" (per mark, one per seed),
      "windows_won" (the share of every candidate; None without a guard) and "curve" (mean, lowest
      and highest of the seeds, one point every "curve_every" steps).
    """
    arms = {}
    for name in contenders(config, None):
        path = curves_path(out, name)
        if not path.exists():
            continue
        with np.load(path) as file:
            loss, wins = file["loss"].astype(np.float64), file["wins"]
        after_window = loss[:, 1:]  # [S, W]
        at_marks = {}
        for mark in config.marks:
            end = mark // config.window
            last = after_window[:, max(end - config.last, 0) : end]
            at_marks[str(mark)] = last.mean(axis=1).tolist()
        windows_won = None
        if wins.size:
            shares = wins / wins.sum(axis=1, keepdims=True)
            windows_won = shares.mean(axis=0).round(3).tolist()
        points = after_window.reshape(config.seeds, -1, config.last).mean(axis=2)  # [S, W / last]
        arms[name] = {
            "loss": at_marks,
            "windows_won": windows_won,
            "curve": {
                "mean": np.round(points.mean(axis=0), 4).tolist(),
                "low": np.round(points.min(axis=0), 4).tolist(),
                "high": np.round(points.max(axis=0), 4).tolist(),
            },
        }
    return {
        "config": dataclasses.asdict(config),
        "curve_every": config.window * config.last,
        "arms": arms,
    }


def draw(record: dict[str, Any], out: Path) -> None:
    """Left: the runners, LGL2O and the race. Right: the final losses of all rules."""
    with plt.rc_context(style()):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.6, 3.6), layout="constrained", width_ratios=(3, 2)
        )
        draw_curves(left, record)
        draw_rules(right, record)
        save(figure, out)


def draw_curves(axis: Any, record: dict[str, Any]) -> None:
    """Mean losses over seeds, with their range."""
    lines = {
        "SGD": ("SGD", COLOURS[0], "-"),
        "L2O": ("L2O", COLOURS[2], "-"),
        "LGL2O": ("LGL2O(L2O, SGD)", COLOURS[3], "-"),
        "race carry": ("race(L2O, SGD)", COLOURS[4], "-"),
        "race carry jumps": ("race, jumps", COLOURS[4], "--"),
        "race carry +Adam": ("race(L2O, SGD, Adam)", COLOURS[5], "-"),
    }
    for name, (label, colour, dash) in lines.items():
        curve = {key: np.array(values) for key, values in record["arms"][name]["curve"].items()}
        steps = record["curve_every"] * np.arange(1, len(curve["mean"]) + 1)
        axis.plot(steps, curve["mean"], color=colour, ls=dash, lw=1.6, label=label)
        axis.fill_between(steps, curve["low"], curve["high"], color=colour, alpha=0.12, lw=0)
    axis.set(xscale="log", yscale="log", xlabel="optimizer steps", ylabel="held-out loss")
    ticks = (0.4, 0.5, 0.6, 0.8, 1.0)
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.legend(fontsize=7.5)


def draw_rules(axis: Any, record: dict[str, Any]) -> None:
    """One row per rule: the final loss of every seed (dots) and their mean (bar)."""
    last = str(record["config"]["marks"][-1])
    # From the top: the plain race, with jumps, with Adam, with both.
    rules = sorted(RULES, key=lambda rule: (rule.adam, rule.jumps))
    rules = [rule for rule in rules if rule.name in record["arms"]]
    rows = list(reversed(rules))
    for row, rule in enumerate(rows):
        losses = np.array(record["arms"][rule.name]["loss"][last])
        colour = COLOURS[5] if rule.adam else COLOURS[4]
        axis.plot(losses, np.full(len(losses), row), "o", ms=3, color=colour, alpha=0.5)
        axis.plot(losses.mean(), row, "|", ms=14, mew=2, color=colour)
    labels = [rule.name.removeprefix("race ") for rule in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=7.5)
    axis.set(xlabel=f"loss at step {last}: each seed, and their mean (bar)")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", type=int, default=CONFIG.pool, help="pixels averaged per side")
    parser.add_argument("--seeds", type=int, default=CONFIG.seeds, help="runs of every contender")
    parser.add_argument("--only", nargs="*", default=(), help="names of contenders")
    parser.add_argument("--out", type=Path, default=Path("runs/race"), help="folder of the runs")
    parser.add_argument("--draw", action="store_true", help="only draw the committed record again")
    args = parser.parse_args()
    if not args.draw:
        config = dataclasses.replace(CONFIG, pool=args.pool, seeds=args.seeds)
        task = make_task(config)
        theta = meta_train(config, task, args.out / "L2O")
        run(config, task, theta, args.out, tuple(args.only))
        record = summarise(config, args.out)
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    draw(json.loads(RESULT.read_text()), FIGURE)


if __name__ == "__main__":
    main()
