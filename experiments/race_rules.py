"""Finds the defaults of the race: one setting is varied at a time, on tasks of several kinds.

Claim: where data are enough, `race` at its defaults is at every tenth of a run within 2% of the
better of its two sides, without knowing which that is. A useless challenger costs less than a tenth
of the fallback's gradients. Where a small training set is repeated,
training losses do not tell which side generalises: fine-tuning and the ResNet show what is lost,
and what held-out losses save ("held-out"; `experiments.held_out_rules` looks closer).

    python -m experiments.race_rules [--only TRIAL ...] [--rules RULE ...] [--draw]

Needs FashionMNIST and MNIST (docs/data.md). Takes some three hours on 2 cores (an estimate from the
record's times); it resumes. Writes docs/results/race/race.json and docs/images/race-rules.png;
docs/guards/race.md shows them.

Every contender of a trial takes the same mini-batches from the same initial params, 10 seeds. The
record holds, for each trial and contender, the mean test loss over the seeds at every tenth of the
run (the last one: the mean of the last three measurements), gradients per step, and where held-out
losses are computed their number per step, in losses on a mini-batch. What has run with the same
settings is kept.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import LogLocator

import metaopt
from experiments.pictures import save
from metaopt import datasets, guards, tasks
from metaopt.core.types import TaskFamily, single
from metaopt.evaluation.contenders import PAPER_RACE
from metaopt.evaluation.curves import evaluate
from metaopt.evaluation.records import write_json
from metaopt.optimizers import ADVERSARIES
from metaopt.report.figures import style
from metaopt.tasks import catalog
from metaopt.tasks.networks import MLP

RESULT = Path("docs/results/race/race.json")
FIGURE = Path("docs/images/race-rules.png")
SEEDS = 10
MEASUREMENTS = 20
CHALLENGER, FALLBACK = "challenger alone", "fallback alone"

# Contender -> colour, dash and label of its curve.
LOOKS = {
    CHALLENGER: ("tab:orange", "--", "challenger alone"),
    FALLBACK: ("tab:blue", "--", "fallback alone"),
    "old form": ("tab:gray", ":", "race, old form"),
    "default": ("black", "-", "race"),
    "held-out": ("tab:green", "-.", "race, held-out"),
}

Make = Callable[[int], Any]  # num_steps -> transformation

# One setting is varied at a time. The first rule is the default of `guards.race`. `held_out` is an
# argument of `evaluate`.
RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "smoothing 0": {"smoothing": 0.0},
    "smoothing 0.8": {"smoothing": 0.8},
    "margin 0": {"margin": 0.0},
    "margin 1": {"margin": 1.0},
    "margin 4": {"margin": 4.0},
    "patience 6": {"patience": 6},
    "patience 20": {"patience": 20},
    "trial 8": {"trial": 8},
    "trial 40": {"trial": 40},
    "budget 0": {"budget": 0.0},
    "budget 0.2": {"budget": 0.2},
    "budget 1": {"budget": 1.0},
    "reset": {"memory": "reset"},
    "n_t 5": {"n_t": 5},
    "n_t 20": {"n_t": 20},
    "decide at each step": {"n_t": 1, "smoothing": 0.93, "patience": 120, "trial": 200},
    "2 of 10 held out": {"n_t": 8, "n_c": 2},
    "old form": {"n_t": 10, "n_c": 10, **PAPER_RACE},
    "held-out": {"held_out": True, "n_t": 10, "eval_every": 10, "overrule": 1.0},
    "held-out alone": {
        "held_out": True,
        "n_t": 10,
        "eval_every": 10,
        "smoothing": 0.0,
        "margin": 0.0,
    },
}


class Trial(NamedTuple):
    """A pair of optimizers on a task.

    Attributes:
      title: of the panel.
      task: makes the task.
      challenger: the challenger.
      fallback: the fallback.
      steps: mini-batches of a run.
    """

    title: str
    task: Callable[[], TaskFamily]
    challenger: Make
    fallback: Make
    steps: int


def cosine(optimizer: Callable[..., Any], rate: float) -> Make:
    """`optimizer` with a learning rate that decays to 0 at the end of the run."""
    return lambda num_steps: optimizer(optax.cosine_decay_schedule(rate, num_steps))


def from_zoo(name: str) -> Make:
    """An optimizer of the zoo."""

    def make(num_steps: int) -> Any:
        export = metaopt.load(name)
        return export.optimizer.apply(export.theta, num_steps=num_steps)

    return make


def adversary(name: str) -> Make:
    """One of `metaopt.optimizers.ADVERSARIES`."""
    return lambda num_steps: ADVERSARIES[name].apply({})


def _mlp() -> TaskFamily:
    data = datasets.resized(datasets.load("fashion_mnist"), 14)
    return single(tasks.classification(MLP((20, 10), jax.nn.sigmoid), data, batch_size=128))


def _named(name: str) -> Callable[[], TaskFamily]:
    return lambda: catalog.family(name)


def _sgd(rate: float, momentum: float | None = None) -> Make:
    return cosine(lambda schedule: optax.sgd(schedule, momentum), rate)


TRIALS = {
    "mlp": Trial(
        "MLP, FashionMNIST: LSTM, Adam",
        _mlp,
        from_zoo("lstm-mlp-mnist-300"),
        cosine(optax.adam, 1e-2),
        2000,
    ),
    "late": Trial(
        "MLP, FashionMNIST: fast Adam, slow Adam",
        _mlp,
        lambda num_steps: optax.adam(5e-2),
        cosine(optax.adam, 1e-2),
        2000,
    ),
    "useless": Trial(
        "MLP, FashionMNIST: 30 good steps then ascent, SGD",
        _mlp,
        adversary("late"),
        _sgd(0.3, 0.9),
        2000,
    ),
    "cnn": Trial(
        "CNN, digits: VeLO, SGD",
        _named("digits-cnn"),
        from_zoo("velo-small"),
        _sgd(0.1, 0.9),
        1000,
    ),
    "resnet": Trial(
        "ResNet with batch norm, digits: Muon, AdamW",
        _named("digits-resnet-batchnorm"),
        cosine(optax.contrib.muon, 1e-2),
        cosine(optax.adamw, 3e-3),
        400,
    ),
    "text": Trial(
        "Transformer, text: Muon, AdamW",
        _named("python-text"),
        cosine(optax.contrib.muon, 2e-2),
        cosine(optax.adamw, 3e-3),
        1000,
    ),
    "text-reversed": Trial(
        "Transformer, text: AdamW, Muon",
        _named("python-text"),
        cosine(optax.adamw, 3e-3),
        cosine(optax.contrib.muon, 2e-2),
        1000,
    ),
    "finetune": Trial(
        "CNN, fine-tuning: L3RS, Adam",
        _named("finetune-A"),
        from_zoo("l3rs-finetune-cnn"),
        cosine(optax.adam, 3e-3),
        300,
    ),
    "quadratic": Trial(
        "Quadratic: momentum, SGD",
        lambda: single(tasks.quadratic(dim=32, condition=100.0, noise=0.3)),
        _sgd(0.3, 0.9),
        _sgd(0.5),
        2000,
    ),
}


def run_contender(trial: Trial, family: TaskFamily, contender: str) -> dict[str, Any]:
    """The entry in the record of a side alone, or of the race by a rule."""
    alone = {CHALLENGER: trial.challenger, FALLBACK: trial.fallback}
    settings = dict(RULES.get(contender, {}))
    held_out = settings.pop("held_out", False)

    def race(num_steps: int) -> Any:
        return guards.race(trial.challenger(num_steps), trial.fallback(num_steps), **settings)

    started = time.perf_counter()
    curves = evaluate(
        alone.get(contender, race),
        family,
        num_steps=trial.steps,
        keys=jax.random.split(jax.random.key(11), SEEDS),
        window=trial.steps // MEASUREMENTS,
        held_out=held_out,
        diagnostics=("loss_evals",) if held_out else (),
    )
    loss = np.asarray(curves.loss.mean(axis=0), float)
    tenths = [float(value) for value in loss[2::2]]
    tenths[-1] = float(loss[-3:].mean())
    entry = {
        "loss": tenths,
        "gradients_per_step": float(curves.grad_evals[-1]) / trial.steps,
        "seconds": time.perf_counter() - started,
    }
    if held_out:
        calls = float(curves.state["loss_evals"][:, -1].max()) / trial.steps
        entry["held_out_losses_per_step"] = calls * held_out_size(family, settings["n_t"])
    return entry


def held_out_size(family: TaskFamily, n_t: int) -> float:
    """Examples of a held-out loss of `evaluate`, in mini-batches."""
    key = jax.random.key(0)
    task = family.task(family.sample(key))
    whole, one = (optax.tree.size(b) for b in (task.whole("valid"), task.sample(key, (), "valid")))
    return min(whole / one, n_t)


def recorded() -> dict[str, Any]:
    """The record, without what was run with other settings."""
    record: dict[str, Any] = {"seeds": SEEDS, "rules": RULES, "trials": {}}
    if not RESULT.exists():
        return record
    old = json.loads(RESULT.read_text())
    if old["seeds"] != SEEDS:
        return record
    rules = [name for name, settings in RULES.items() if old["rules"].get(name) == settings]
    for name, trial in old["trials"].items():
        if name in TRIALS and trial["steps"] == TRIALS[name].steps:
            entries = trial["contenders"]
            kept = {c: entries[c] for c in (CHALLENGER, FALLBACK, *rules) if c in entries}
            record["trials"][name] = {**trial, "contenders": kept}
    return record


def run(names: list[str], rules: list[str]) -> dict[str, Any]:
    """Runs what the record lacks, and returns the record."""
    record = recorded()
    for name in names:
        trial = TRIALS[name]
        family = trial.task()
        entries = record["trials"].setdefault(
            name, {"title": trial.title, "steps": trial.steps, "contenders": {}}
        )["contenders"]
        for contender in (CHALLENGER, FALLBACK, *rules):
            if contender not in entries:
                entries[contender] = run_contender(trial, family, contender)
                write_json(RESULT, record)
                print(name, contender, entries[contender], flush=True)
    return record


def above_the_better(trial: dict[str, Any]) -> dict[str, list[float]]:
    """Loss of each race over that of the better side, at every tenth, by rule that has run."""
    entries = trial["contenders"]
    best = np.minimum(entries[CHALLENGER]["loss"], entries[FALLBACK]["loss"])
    return {
        rule: (np.asarray(entries[rule]["loss"]) / best).tolist()
        for rule in RULES
        if rule in entries
    }


def table(record: dict[str, Any]) -> str:
    """Markdown: by trial and rule, worst and last ratio to the better side, and gradients."""
    names = list(record["trials"])
    lines = ["| rule | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for rule in RULES:
        cells = []
        for trial in record["trials"].values():
            if rule not in trial["contenders"]:
                cells.append("")
                continue
            ratios = above_the_better(trial)[rule]
            gradients = trial["contenders"][rule]["gradients_per_step"]
            cells.append(f"{max(ratios):.2f}, {ratios[-1]:.2f}; {gradients:.2f}")
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(record: dict[str, Any]) -> None:
    """One panel per trial: both sides alone, and the race by training and held-out losses."""
    with plt.rc_context(style()):
        columns = 3
        rows = -(-len(record["trials"]) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(9, 2.4 * rows), squeeze=False)
        for axis, trial in zip(axes.flat, record["trials"].values(), strict=False):
            steps = trial["steps"] * np.arange(1, 11) / 10
            shown = [name for name in LOOKS if name in trial["contenders"]]
            for name in shown:
                colour, dash, label = LOOKS[name]
                loss = np.asarray(trial["contenders"][name]["loss"])
                axis.plot(steps, loss, color=colour, linestyle=dash, label=label)
            fallback = trial["contenders"][FALLBACK]["loss"]
            low = min(min(trial["contenders"][name]["loss"]) for name in shown)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:.1g}")
            high = 1.5 * max(fallback)  # a challenger may diverge
            axis.set_ylim(0.9 * low, high)
            digits = (2, 5) if high > 4 * low else range(2, 10)  # labels must not overlap
            axis.yaxis.set_minor_locator(LogLocator(subs=digits))
            axis.set_title(trial["title"].replace(": ", "\n"), fontsize=9)
        for axis in axes.flat[len(record["trials"]) :]:
            axis.set_axis_off()
        for axis in axes[:, 0]:
            axis.set_ylabel("test loss")
        for axis in axes[-1]:
            axis.set_xlabel("mini-batches")
        figure.tight_layout()
        lines, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="lower right", bbox_to_anchor=(0.97, 0.1))
        save(figure, FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=list(RULES))
    parser.add_argument("--draw", action="store_true", help="only draw the committed record")
    args = parser.parse_args()
    record = json.loads(RESULT.read_text()) if args.draw else run(args.only, args.rules)
    print(table(record))
    draw(record)


if __name__ == "__main__":
    main()
