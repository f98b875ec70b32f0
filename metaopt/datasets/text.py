"""Text as sequences of characters in three splits."""

import io
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.core.checks import show
from metaopt.core.files import read_plain
from metaopt.core.types import Split

MIN_LENGTH = 1000  # characters


class Text(NamedTuple):
    """A text as token numbers, one per character.

    Attributes:
      name: the name in messages.
      splits: split -> tokens ``[n]`` int32, indices into `vocabulary`. The splits are consecutive
        parts of the text: 80 / 10 / 10 per cent.
      vocabulary: the distinct characters, sorted.
    """

    name: str
    splits: dict[Split, jax.Array]
    vocabulary: str


def from_string(name: str, text: str, vocabulary: str = "") -> Text:
    """Encodes a string.

    Args:
      name: the name in messages.
      text: at least 1000 characters.
      vocabulary: the characters that are encoded; default: those that occur in `text`, sorted.

    Returns:
      The encoded text.

    Raises:
      ValueError: when `text` is too short, or has characters that `vocabulary` lacks.
    """
    if len(text) < MIN_LENGTH:
        raise ValueError(f"text {name!r}: needs at least {MIN_LENGTH} characters, got {len(text)}.")
    vocabulary = vocabulary or "".join(sorted(set(text)))
    if unknown := sorted(set(text) - set(vocabulary)):
        raise ValueError(
            f"text {name!r}: holds {show(''.join(unknown))}, not in the vocabulary; remove them "
            "from the text or add them to the vocabulary."
        )
    token = {character: index for index, character in enumerate(vocabulary)}
    tokens = jnp.asarray(np.array([token[character] for character in text], np.int32))
    train_end, valid_end = int(0.8 * len(text)), int(0.9 * len(text))
    splits: dict[Split, jax.Array] = {
        "train": tokens[:train_end],
        "valid": tokens[train_end:valid_end],
        "test": tokens[valid_end:],
    }
    return Text(name=name, splits=splits, vocabulary=vocabulary)


def from_file(path: str | Path) -> Text:
    """Encodes a text file.

    Args:
      path: a file in UTF-8 of at least 1000 characters; at most 1 GiB.

    Returns:
      The encoded text, named after the file.

    Raises:
      ValueError: when the file cannot be read, is not UTF-8, or is too short or too large.
    """
    payload = read_plain(Path(path).resolve())
    try:
        text = io.TextIOWrapper(io.BytesIO(payload), encoding="utf-8").read()  # "\r\n" -> "\n"
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error}).") from None
    return from_string(Path(path).name, text)


def python_topics() -> Text:
    """Python's own help topics: about 460 000 characters that come with every Python.

    Returns:
      The encoded text. Only printable ASCII and line ends are kept, so that the vocabulary (96
      characters) is the same for every version of Python; the text itself differs a little.
    """
    from pydoc_data.topics import topics

    vocabulary = "\n" + "".join(map(chr, range(32, 127)))
    text = "".join(topics[name] for name in sorted(topics))
    kept = "".join(character for character in text if character in vocabulary)
    return from_string("python-topics", kept, vocabulary)
