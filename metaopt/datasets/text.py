"""Text as characters, in three splits."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.core.checks import short
from metaopt.core.types import Split

LEAST = 1000  # characters


class Text(NamedTuple):
    """A text as numbers.

    Attributes:
      name: how messages call it.
      splits: split -> characters ``[n]`` int32, numbers into `vocabulary`. The splits are
        consecutive parts of the text: 80 / 10 / 10 per cent.
      vocabulary: the distinct characters, sorted.
    """

    name: str
    splits: dict[Split, jax.Array]
    vocabulary: str


def from_string(name: str, text: str, vocabulary: str = "") -> Text:
    """Any text of at least 1000 characters; `vocabulary`, if given, must hold all of them."""
    if len(text) < LEAST:
        raise ValueError(f"text {name!r}: needs at least {LEAST} characters, got {len(text)}.")
    vocabulary = vocabulary or "".join(sorted(set(text)))
    if unknown := sorted(set(text) - set(vocabulary)):
        raise ValueError(
            f"text {name!r}: holds {short(''.join(unknown))}, not in the vocabulary; leave them "
            "out or add them."
        )
    number = {character: index for index, character in enumerate(vocabulary)}
    tokens = jnp.asarray(np.array([number[c] for c in text], np.int32))
    first, second = int(0.8 * len(text)), int(0.9 * len(text))
    splits: dict[Split, jax.Array] = {
        "train": tokens[:first],
        "valid": tokens[first:second],
        "test": tokens[second:],
    }
    return Text(name, splits, vocabulary)


def from_file(path: str | Path) -> Text:
    """A text file in UTF-8."""
    try:
        return from_string(Path(path).name, Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error}).") from None


def python_topics() -> Text:
    """Python's own help topics, about 460 000 characters that come with every Python.

    Only printable ASCII and line ends are kept, so that the vocabulary (96 characters) is the same
    for every version of Python; the text itself differs a little.
    """
    from pydoc_data.topics import topics

    vocabulary = "\n" + "".join(map(chr, range(32, 127)))
    text = "".join(topics[name] for name in sorted(topics))
    kept = "".join(character for character in text if character in vocabulary)
    return from_string("python-topics", kept, vocabulary)
