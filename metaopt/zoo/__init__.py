"""Trained learned optimizers that ship with the package: ``metaopt.load("lstm-mlp-mnist")``.

A folder each: an export (weights and spec, as `metaopt.save` writes it) and ``card.json``.
"""

from pathlib import Path
from typing import Any, NamedTuple

from metaopt.core.checks import check_known
from metaopt.core.files import parse_json, read_plain

FOLDER = Path(__file__).parent
CARD = "card.json"


class Home(NamedTuple):
    """The task an optimizer was meta-trained on, and what it reaches there.

    Attributes:
      task: a name of `metaopt.tasks.catalog.TASKS`.
      num_steps, seeds: of the short run that was measured, by `metaopt.evaluation.curves.evaluate`.
      loss: its mean final test loss.
      bound: a mean loss that any later version of the package must stay below in that run.
      baselines: label of a tuned baseline -> its mean final test loss from the same seeds.
    """

    task: str
    num_steps: int
    seeds: int
    loss: float
    bound: float
    baselines: dict[str, float]


class Card(NamedTuple):
    """A model card.

    Attributes:
      about: one line.
      trained: how it was meta-trained, in words: on what, by what, for how long.
      command: that repeats the meta-training.
      horizon: for which lengths of runs it is meant.
      wins, loses: where it is ahead of tuned baselines, and where it is not.
      licence: of the weights.
      home: see `Home`.
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
    """What `metaopt.load` knows by name, in alphabetical order."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{CARD}"))


def folder(name: str) -> Path:
    """The export of `name`.

    Raises: ValueError: there is no such entry; the message has the near matches.
    """
    check_known("zoo entry", name, names())
    return FOLDER / name


def card(name: str) -> Card:
    """The model card of `name`; raises as `folder` does."""
    plain: dict[str, Any] = parse_json(read_plain(folder(name) / CARD))
    return Card(home=Home(**plain.pop("home")), **plain)


def rows(card: Card) -> dict[str, str]:
    """The card as a table: what a row is about -> what it says."""
    home = card.home
    others = ", ".join(f"tuned {label} {loss:.3g}" for label, loss in home.baselines.items())
    return {
        "about": card.about,
        "trained": card.trained,
        "command": card.command,
        "horizon": card.horizon,
        f"at home ({home.task}, {home.num_steps} steps, {home.seeds} seeds)": (
            f"mean test loss {home.loss:.3g}; {others}"
        ),
        "wins": "; ".join(card.wins),
        "loses": "; ".join(card.loses),
        "licence": card.licence,
    }
