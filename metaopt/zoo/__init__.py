"""Trained learned optimizers that ship with the package: ``metaopt.load("lstm-mlp-mnist")``.

Each has a folder with an export (weights and spec, as `metaopt.save` writes it) and ``card.json``.
Weights that others have published have their licence beside them.
"""

from pathlib import Path
from typing import Any, NamedTuple

from metaopt.core.checks import check_known
from metaopt.core.files import parse_json, read_plain

FOLDER = Path(__file__).parent
CARD = "card.json"


class Home(NamedTuple):
    """A measurement on the task that an optimizer was meta-trained on.

    Losses are means over the last measurements, see `metaopt.evaluation.statistics.final_mean`.

    Attributes:
      task: a name of `metaopt.tasks.catalog.TASKS`.
      num_steps: steps of each run, by `metaopt.evaluation.curves.evaluate`.
      seeds: number of runs.
      loss: mean test loss of the runs at their end.
      bound: every later version of the package must stay below this mean loss in the same runs.
      baselines: label of a tuned baseline -> its mean test loss at the end, from the same seeds.
      steps: steps at which `curves` were measured, from 0 to `num_steps`.
      curves: the optimizer's name, and the baselines' labels -> mean test losses at these steps.
    """

    task: str
    num_steps: int
    seeds: int
    loss: float
    bound: float
    baselines: dict[str, float]
    steps: list[int]
    curves: dict[str, list[float]]


class Card(NamedTuple):
    """A model card.

    Attributes:
      about: one line.
      trained: the task, the method and the duration of its meta-training, in words.
      command: the commands that repeat the meta-training; empty if others have published theta.
      horizon: the lengths of runs that it is made for.
      wins: where it is ahead of tuned baselines.
      loses: where it is not.
      licence: of the weights; the whole notice where their licence demands it.
      home: its measurement on the task of its meta-training.
    """

    about: str
    trained: str
    command: str
    horizon: str
    wins: list[str]
    loses: list[str]
    licence: str
    home: Home


def names() -> list[str]:
    """The names that `metaopt.load` knows, in alphabetical order."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{CARD}"))


def folder(name: str) -> Path:
    """The folder of an optimizer.

    Args:
      name: one of `names()`.

    Returns:
      The folder with its export and its card.

    Raises:
      ValueError: when the name is unknown; the message lists similar names.
    """
    check_known("zoo entry", name, names())
    return FOLDER / name


def card(name: str) -> Card:
    """The model card of an optimizer.

    Args:
      name: one of `names()`.

    Returns:
      The card.

    Raises:
      ValueError: when the name is unknown; the message lists similar names.
    """
    plain: dict[str, Any] = parse_json(read_plain(folder(name) / CARD))
    return Card(home=Home(**plain.pop("home")), **plain)


def rows(card: Card) -> dict[str, str]:
    """The card as a table: title of a row -> its text."""
    home = card.home
    others = ", ".join(f"tuned {label} {loss:.3g}" for label, loss in home.baselines.items())
    command = {"command": card.command} if card.command else {}
    return {
        "about": card.about,
        "trained": card.trained,
        **command,
        "horizon": card.horizon,
        f"at home ({home.task}, {home.num_steps} steps, {home.seeds} seeds)": (
            f"mean test loss {home.loss:.3g}; {others}"
        ),
        "wins": "; ".join(card.wins),
        "loses": "; ".join(card.loses),
        "licence": card.licence,
    }
