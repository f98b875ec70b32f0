"""Files: written as a whole, locked, and read with suspicion."""

import os
import re
import socket
import time

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
        ("/dev/zero", 3, r"/dev/zero: is not a plain file; "),
        ("/proc/self/status", 3, r"status: grows while it is read"),  # its size is 0
    ):
        with pytest.raises(ValueError, match=message):
            files.read_plain(tmp_path / name, most)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(ValueError, match="socket: is not a plain file"):
            files.read_plain(tmp_path / "socket")


def test_a_path_that_changes_after_a_check_is_still_not_followed(tmp_path, monkeypatch):
    (tmp_path / "secret").write_bytes(b"abc")
    (tmp_path / "x").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(type(tmp_path), "is_symlink", lambda path: False)
    with pytest.raises(ValueError, match="x: is a symbolic link"):
        files.read_plain(tmp_path / "x")


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    files.write_whole(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(tmp_path / "x", b"new")
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"old"


def test_only_what_killed_writes_left_is_swept(tmp_path):
    kept = ["x", "x.part", "x.12.parts", ".12.part"]
    for name in (*kept, "x.12.part", "y.json.3456.part"):
        (tmp_path / name).touch()
    files.sweep_parts(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_only_what_metaopt_wrote_is_removed(tmp_path):
    ours = re.compile(r"index|states/(\d+)?")
    for name in ("index", "index.12.part", files.LOCK):
        (tmp_path / name).touch()
    (tmp_path / "states" / "12").mkdir(parents=True)

    def refused(name):
        with pytest.raises(ValueError, match=f"holds '{name}', which metaopt did not write"):
            files.check_only_ours(tmp_path, ours, marks=("index",))

    for foreign in ("thesis.tex", "states/mine", "other/"):
        (tmp_path / foreign).mkdir() if foreign[-1] == "/" else (tmp_path / foreign).touch()
        refused(foreign)
        (tmp_path / foreign).rmdir() if foreign[-1] == "/" else (tmp_path / foreign).unlink()
    (tmp_path / "states" / "13").symlink_to(tmp_path)
    (tmp_path / "index").rename(tmp_path / "states" / "14")  # without its mark it is not known
    refused("states/12")
    (tmp_path / "states" / "14").rename(tmp_path / "index")
    files.check_only_ours(tmp_path, ours, marks=("index",))
    files.remove_contents(tmp_path)
    assert os.listdir(tmp_path) == [files.LOCK]


def test_a_folder_has_one_writer(tmp_path):
    with files.only_writer(tmp_path):
        with pytest.raises(ValueError, match="another process is writing in this folder"):
            with files.only_writer(tmp_path):
                pass
    with files.only_writer(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
def test_all_locks_share_one_hook_that_runs_in_forked_children(tmp_path, monkeypatch):
    hooks = []
    monkeypatch.setattr(os, "register_at_fork", lambda after_in_child: hooks.append(after_in_child))
    files._closed_in_children.cache_clear()
    try:
        with files.one_at_a_time(tmp_path / "a"), files.one_at_a_time(tmp_path / "b"):
            with files.one_at_a_time(tmp_path / "c"):
                pass
            held = list(files._closed_in_children())
            assert len(hooks) == 1 and sum(not file.closed for file in held) == 2
            hooks[0]()
            assert all(file.closed for file in held)
    finally:
        files._closed_in_children.cache_clear()  # the next lock registers a hook


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
def test_a_lock_does_not_outlive_its_process_in_a_forked_child(tmp_path):
    """As children of data loaders do; the lock stays with the parent while that lives."""
    ready, go = os.pipe(), os.pipe()
    with files.only_writer(tmp_path):
        child = os.fork()
        if child == 0:  # lives on until the parent has let the lock go
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
        with pytest.raises(ValueError, match="another process"), files.only_writer(tmp_path):
            pass
    with files.only_writer(tmp_path):
        pass
    os.write(go[1], b"x")
    assert os.waitpid(child, 0)[1] == 0


def test_a_sealed_file_is_read_only_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "x"
    assert files.read_sealed(path) is None
    files.write_sealed(path, b"content\nof lines")
    sealed = path.read_bytes()
    assert files.read_sealed(path) == b"content\nof lines"
    damages = [sealed[:k] for k in range(len(sealed))] + [sealed + b"x"]
    damages += [sealed[:k] + bytes([sealed[k] ^ 1]) + sealed[k + 1 :] for k in range(len(sealed))]
    for damaged in damages:
        path.write_bytes(damaged)
        assert files.read_sealed(path) is None


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


def test_json_is_parsed_in_linear_time():
    """A repeated key at the end of n keys: four times as many take about four times as long."""

    def seconds(number):
        keys = ",".join(f'"k{i}":0' for i in range(number))
        started = time.process_time()
        with pytest.raises(ValueError, match="occurs twice"):
            files.parse_json(f'{{{keys},"k{number - 1}":1}}'.encode())
        return time.process_time() - started

    assert min(seconds(80_000) for _ in range(3)) < 12 * min(seconds(20_000) for _ in range(3))


@pytest.mark.parametrize("variable", ["METAOPT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
def test_a_cache_that_cannot_be_written_is_one_line_that_names_the_variable(
    tmp_path, monkeypatch, variable
):
    for name in ("METAOPT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file" / "x"))
    with pytest.raises(OSError, match=r"file.*cannot be written .*; set METAOPT_CACHE_DIR"):
        files.cache_folder()
    monkeypatch.setenv(variable, str(tmp_path))
    with monkeypatch.context() as read_only, pytest.raises(OSError, match="METAOPT_CACHE_DIR"):
        read_only.setattr(os, "access", lambda *arguments: False)
        files.cache_folder()
    assert files.cache_folder().is_dir()


def test_the_cache_is_where_the_user_wants_it(tmp_path, monkeypatch):
    monkeypatch.setenv("METAOPT_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("METAOPT_CACHE_DIR")
    assert files.cache_folder() == tmp_path / "cache" / "metaopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_folder() == tmp_path / "home" / ".cache" / "metaopt"
