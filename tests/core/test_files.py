"""Files: written as a whole, locked, and read with suspicion."""

import os

import pytest

from metaopt.core import files


def test_a_file_is_written_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x"
    files.write_whole(path, b"old")
    with monkeypatch.context() as broken, pytest.raises(OSError, match="killed"):
        broken.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("killed")))
        files.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    files.write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["x"]


def test_a_lock_is_held_until_its_file_is_closed(tmp_path):
    lock = tmp_path / "new" / "lock"
    with files.one_at_a_time(lock), open(lock, "w") as second:
        with pytest.raises(BlockingIOError):
            files.hold_lock(second, wait=False)
    with open(lock, "w") as second:
        files.hold_lock(second, wait=False)


def test_a_plain_file_is_read_and_anything_else_is_refused(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert files.read_plain(path, most=3) == b"abc"
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for name, most, message in (
        ("x", 2, r"x: its 3 bytes are too many; at most 2\."),
        ("link", 3, r"link: is a symbolic link; put the file itself in its place\."),
        ("pipe", 3, r"pipe: is not a plain file; put the file itself in its place\."),
        (".", 3, r": is not a plain file; "),
        ("missing", 3, r"missing: cannot be read \(No such file or directory\)\."),
    ):
        with pytest.raises(ValueError, match=message):
            files.read_plain(tmp_path / name, most)


def test_json_has_each_key_once_and_bounded_depth():
    assert files.parse_json(b'{"a": [1, null], "b": {"a": "\xc3\xa9"}}') == {
        "a": [1, None],
        "b": {"a": "é"},
    }
    for payload, message in (
        (b'{"a": {"b": 1, "b": 2}}', r"^the key 'b' occurs twice$"),
        (b"[" * 100_000, "^nested too deeply$"),
        (b"{", "Expecting property name"),
        (b"\xff", "invalid start byte"),
    ):
        with pytest.raises(ValueError, match=message):
            files.parse_json(payload)


def test_the_cache_is_where_the_user_wants_it(tmp_path, monkeypatch):
    monkeypatch.setenv("METAOPT_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("METAOPT_CACHE_DIR")
    assert files.cache_folder() == tmp_path / "cache" / "metaopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_folder() == tmp_path / "home" / ".cache" / "metaopt"
