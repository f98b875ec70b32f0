"""The rules of the race: memory after a lost window, jumps, number of runners.

Claim: where the fallback is noisy in the short run and good in the long run (SGD at rate 3),
LGL2O falls behind SGD's own run, while the race starts as fast as the learned optimizer and ends
where SGD does. The rule for the learned optimizer's memory does not matter; jumps help in the
middle of a run; a third runner (Adam) takes the race to its own, lower loss.

    python -m experiments.race_rules   # FashionMNIST prepared (docs/data.md)

meta-trains the LSTM, runs every rule, and writes docs/results/race/race.json and the figure; it
goes on where it was interrupted. The optimizee is LGL2O's MLP with 20 sigmoid units; images are
averaged over 2x2 pixels, so that the whole of it fits on two cores (``--pool 1``: 28x28).
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import datasets, guards, meta, optimizers
from metaopt.core.types import Batch, Split, Task, Theta, single
from metaopt.evaluation.curves import Curves, evaluate
from metaopt.meta.loop import train
from metaopt.tasks import classification
from metaopt.tasks.networks import MLP

RESULT = Path("docs/results/race/race.json")
FIGURE = Path("docs/images/race-rules.png")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the whole experiment.

    Attributes:
      data: folder name of the data set; pool: pixels averaged along each side.
      hidden: units of each LSTM layer; meta_steps: truncated meta-updates; meta_lr: Adam's rate.
      sgd, adam: learning rates of the fallbacks (SGD decays as in LGL2O).
      steps, window, seeds: of every run; window is n_t = n_c.
      marks: steps at which losses are reported, as means over the `last` windows before them.
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
MEMORY = ("carry", "rollback", "reset")


def make_task(config: Config) -> Task:
    """MLP-20 on the training images; judged on some of those held out of them."""
    data = datasets.load(config.data)
    n = config.pool

    def pooled(split: Split, end: int | None = None):
        x, y = np.asarray(data.splits[split]["x"])[:end], data.splits[split]["y"][:end]
        side = x.shape[1] // n
        small = x.reshape(len(x), side, n, side, n).mean((2, 4)).astype(np.uint8)
        return {"x": jnp.asarray(small[..., None]), "y": y}

    splits: dict[Split, Batch] = {split: pooled(split) for split in ("train", "test")}
    splits["valid"] = pooled("valid", config.judged)
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


def contenders(config: Config, theta: Theta) -> dict[str, tuple[Callable[..., Any], bool]]:
    """Name -> (constructor, is it a guard): both parts alone, LGL2O, every rule of the race."""
    lstm = lambda: optimizers.lstm(config.hidden).apply(theta)
    sgd = lambda: optimizers.sgd(config.sgd).apply({})
    adam = lambda: optax.adam(config.adam)
    sizes: Any = {"n_t": config.window, "n_c": config.window}
    arms: dict[str, tuple[Callable[..., Any], bool]] = {
        "SGD": (lambda _: sgd(), False),
        "Adam": (lambda _: adam(), False),
        "L2O": (lambda _: lstm(), False),
        "LGL2O": (lambda _: guards.lgl2o(lstm(), sgd(), **sizes), True),
    }
    for rule, jumps, third in itertools.product(MEMORY, (False, True), (False, True)):
        fallbacks = (sgd, adam) if third else (sgd,)

        def race(_, rule: Any = rule, jumps=jumps, fallbacks=fallbacks):
            runners = [make() for make in fallbacks]
            return guards.race(lstm(), *runners, on_loss=rule, jumps=jumps, **sizes)

        arms[f"race {rule}{' jumps' * jumps}{' +Adam' * third}"] = (race, True)
    return arms


def run(config: Config, task: Task, theta: Theta, out: Path, only: tuple[str, ...] = ()) -> None:
    """Runs every contender that has no curves in `out` yet, all from the same seeds."""
    keys = jax.random.split(jax.random.key(2), config.seeds)
    for name, (make, guarded) in contenders(config, theta).items():
        path = out / f"{name.replace(' ', '-')}.npz"
        if path.exists() or (only and name not in only):
            continue
        started = time.perf_counter()
        curves: Curves = evaluate(
            make,
            task,
            num_steps=config.steps,
            keys=keys,
            window=config.window,
            split="valid",
            guard=guarded,
            diagnostics=("wins",) if guarded else (),
        )
        wins = curves.state["wins"][:, -1] if guarded else np.zeros((config.seeds, 0))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, loss=curves.loss.astype(np.float32), wins=wins)
        part.rename(path)
        print(f"{name}: {curves.loss[:, -1].mean():.3f}, {time.perf_counter() - started:.0f} s")


def summarise(config: Config, out: Path) -> dict[str, Any]:
    """The record that the docs quote: losses at the marks, shares of windows won, thin curves."""
    arms = {}
    for name in contenders(config, None):
        path = out / f"{name.replace(' ', '-')}.npz"
        if not path.exists():
            continue
        with np.load(path) as file:
            loss, wins = file["loss"].astype(np.float64), file["wins"]
        windows = loss[:, 1:]  # [S, W], after each window
        ends = [mark // config.window for mark in config.marks]
        at = {
            str(mark): [float(v) for v in windows[:, max(end - config.last, 0) : end].mean(axis=1)]
            for mark, end in zip(config.marks, ends, strict=True)
        }
        thin = windows.reshape(config.seeds, -1, config.last).mean(axis=2)  # [S, W / last]
        arms[name] = {
            "loss": at,
            "windows_won": (wins / (wins.sum(axis=1, keepdims=True))).mean(axis=0).round(3).tolist()
            if wins.size
            else None,
            "curve": {
                key: np.round(f(thin, axis=0), 4).tolist()
                for key, f in {"mean": np.mean, "low": np.min, "high": np.max}.items()
            },
        }
    every = config.window * config.last
    return {"config": dataclasses.asdict(config), "curve_every": every, "arms": arms}


def draw(record: dict[str, Any], out: Path) -> None:
    """Left: the parts, LGL2O and the race; right: what rules add, relative to the plain race."""
    import matplotlib.pyplot as plt

    from experiments.pictures import save
    from metaopt.report.plots import COLOURS, style

    arms, every = record["arms"], record["curve_every"]
    lines = {
        "SGD": ("SGD", COLOURS[0], "-"),
        "L2O": ("L2O", COLOURS[2], "-"),
        "LGL2O": ("LGL2O(L2O, SGD)", COLOURS[3], "-"),
        "race carry": ("race(L2O, SGD)", COLOURS[4], "-"),
        "race carry jumps": ("race, jumps", COLOURS[4], "--"),
        "race carry +Adam": ("race(L2O, SGD, Adam)", COLOURS[5], "-"),
    }
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            1, 2, figsize=(9.6, 3.6), layout="constrained", width_ratios=(3, 2)
        )
        for name, (label, colour, dash) in lines.items():
            curve = {key: np.array(values) for key, values in arms[name]["curve"].items()}
            x = every * np.arange(1, len(curve["mean"]) + 1)
            axes[0].plot(x, curve["mean"], color=colour, ls=dash, lw=1.6, label=label)
            axes[0].fill_between(x, curve["low"], curve["high"], color=colour, alpha=0.12, lw=0)
        axes[0].set(xscale="log", yscale="log", xlabel="optimizer steps", ylabel="held-out loss")
        ticks = (0.4, 0.5, 0.6, 0.8, 1.0)
        axes[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes[0].minorticks_off()
        axes[0].legend(fontsize=7.5)
        rules = [f"race {m}{s}" for s in ("", " jumps", " +Adam", " jumps +Adam") for m in MEMORY]
        last = str(record["config"]["marks"][-1])
        rules = [name for name in rules if name in arms]
        for row, name in enumerate(reversed(rules)):
            seeds = np.array(arms[name]["loss"][last])
            colour = COLOURS[4 if "Adam" not in name else 5]
            axes[1].plot(seeds, np.full(len(seeds), row), "o", ms=3, color=colour, alpha=0.5)
            axes[1].plot(seeds.mean(), row, "|", ms=14, mew=2, color=colour)
        axes[1].set_yticks(range(len(rules)), [name[5:] for name in reversed(rules)], fontsize=7.5)
        axes[1].set(xlabel=f"loss at step {last}: each seed, and their mean (bar)")
        save(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pool", type=int, default=CONFIG.pool)
    parser.add_argument("--seeds", type=int, default=CONFIG.seeds)
    parser.add_argument("--only", nargs="*", default=(), help="names of contenders")
    parser.add_argument("--out", type=Path, default=Path("runs/race"))
    parser.add_argument("--draw", action="store_true", help="only draw the committed record again")
    args = parser.parse_args()
    if not args.draw:
        config = dataclasses.replace(CONFIG, pool=args.pool, seeds=args.seeds)
        task = make_task(config)
        theta = meta_train(config, task, args.out / "L2O")
        run(config, task, theta, args.out, tuple(args.only))
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        record = summarise(config, args.out)
        RESULT.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    draw(json.loads(RESULT.read_text()), FIGURE)


if __name__ == "__main__":
    main()
