"""Text as numbers and back."""

import numpy as np
import pytest

from metaopt import datasets


def spell(text):
    tokens = np.concatenate([text.splits[s] for s in ("train", "valid", "test")])
    return "".join(text.vocabulary[t] for t in tokens)


def test_a_file_becomes_numbers_and_back(tmp_path):
    content = "Straße, naïve café\n" * 100
    (tmp_path / "mine.txt").write_text(content, encoding="utf-8")
    text = datasets.text_from_file(tmp_path / "mine.txt")
    assert spell(text) == content and text.name == "mine.txt"
    assert [len(text.splits[s]) for s in ("train", "valid", "test")] == [1520, 190, 190]


def test_python_s_own_text_is_there_with_a_fixed_vocabulary():
    text = datasets.python_topics()
    assert len(text.vocabulary) == 96 and len(spell(text)) > 300_000
    assert 'The "if" statement is used for conditional execution' in spell(text)


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1000 characters, got 5"):
        datasets.text_from_string("mine", "short")
    (tmp_path / "image.png").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(ValueError, match=r"image.png: not a text file in UTF-8"):
        datasets.text_from_file(tmp_path / "image.png")
