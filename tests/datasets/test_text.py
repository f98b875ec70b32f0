"""Texts are encoded without loss; what is not text is refused."""

import os

import numpy as np
import pytest

from metaopt import datasets


def decode(text):
    tokens = np.concatenate([text.splits[split] for split in ("train", "valid", "test")])
    return "".join(text.vocabulary[token] for token in tokens)


def test_the_tokens_of_a_file_decode_to_its_text(tmp_path):
    content = "Straße, naïve café\n" * 100
    (tmp_path / "mine.txt").write_text(content, encoding="utf-8")
    text = datasets.text_from_file(tmp_path / "mine.txt")
    assert decode(text) == content and text.name == "mine.txt"
    assert [len(text.splits[split]) for split in ("train", "valid", "test")] == [1520, 190, 190]


def test_python_topics_have_a_fixed_vocabulary():
    text = datasets.python_topics()
    assert len(text.vocabulary) == 96 and len(decode(text)) > 300_000
    assert 'The "if" statement is used for conditional execution' in decode(text)


def test_short_and_binary_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1000 characters, got 5"):
        datasets.text_from_string("mine", "short")
    (tmp_path / "image.png").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(ValueError, match=r"image.png: not a text file in UTF-8"):
        datasets.text_from_file(tmp_path / "image.png")


def test_only_a_file_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"is not a plain file|cannot be read"):
            datasets.text_from_file(path)
    (tmp_path / "mine.txt").write_bytes(b"one line\r\n" * 200)
    (tmp_path / "link.txt").symlink_to(tmp_path / "mine.txt")
    assert decode(datasets.text_from_file(tmp_path / "link.txt")) == "one line\n" * 200
