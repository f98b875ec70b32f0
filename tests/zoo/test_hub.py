"""Exports from a hub: one in the process that lays files out as the real one's cache does."""

import os
import subprocess
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import metaopt
from metaopt import optimizers
from metaopt.zoo import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SETTINGS = optimizers.LSTM(hidden=3)
THETA = SETTINGS.build().init(jax.random.key(0), {})


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with an export and other files; returns its folder and what was asked for."""
    monkeypatch.setenv("METAOPT_CACHE_DIR", str(tmp_path / "cache"))
    remote = metaopt.save(tmp_path / "remote", SETTINGS, THETA, {"task": "digits"})
    (remote / "README.md").write_text("a model card")
    (remote / "run_me.py").write_text("raise SystemExit('executed')")
    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        if repo_id == "nobody/offline":
            raise LocalEntryNotFoundError("cannot find the requested files in the local cache")
        snapshot = tmp_path / "hub" / repo_id.replace("/", "--") / "snapshots" / COMMIT
        blobs = snapshot.parents[1] / "blobs"
        snapshot.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        for name in set(allow_patterns) & {file.name for file in remote.iterdir()}:
            blob = blobs / name[::-1]
            blob.write_bytes((remote / name).read_bytes())
            if not (snapshot / name).is_symlink():
                os.symlink(blob, snapshot / name)  # as the hub's cache does
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return remote, asked


def test_a_fetched_export_is_the_one_that_was_put_there(repository, tmp_path):
    _, asked = repository
    folder = hub.fetch("owner/name", revision=COMMIT)
    loaded = metaopt.load(folder)
    assert loaded.name == "lstm" and loaded.trained == {"task": "digits"}
    jax.tree.map(np.testing.assert_array_equal, loaded.theta, THETA)
    assert folder == tmp_path / "cache" / "hub" / "owner--name" / COMMIT
    assert asked == [("owner/name", COMMIT, ["spec.json", "theta.safetensors"])]


def test_only_the_two_files_of_an_export_arrive_and_they_are_plain(repository, tmp_path):
    folder = hub.fetch("owner/name", into=tmp_path / "here")
    assert folder == tmp_path / "here"
    assert sorted(file.name for file in folder.iterdir()) == ["spec.json", "theta.safetensors"]
    assert not any(file.is_symlink() for file in folder.iterdir())


def test_a_copied_folder_loads_without_the_hub(repository, monkeypatch):
    remote, _ = repository
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert metaopt.load(remote).name == "lstm"
    with pytest.raises(ImportError, match=r"pip install 'metaopt-jax\[hub\]'"):
        hub.fetch("owner/name")


def test_what_load_would_refuse_does_not_arrive(repository, tmp_path):
    remote, _ = repository
    folder = hub.fetch("owner/name", into=tmp_path / "here")
    weights = remote / "theta.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\1")
    for into in (folder, tmp_path / "new"):
        with pytest.raises(metaopt.CheckpointError, match=r"hub\.fetch.*checksum"):
            hub.fetch("owner/name", into=into)
    assert metaopt.load(folder).name == "lstm"
    assert not (tmp_path / "new").exists()


def test_a_folder_of_other_files_is_not_replaced(repository, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "thesis.tex").write_text("years")
    with pytest.raises(metaopt.CheckpointError, match=r"holds 'thesis\.tex' and no export"):
        hub.fetch("owner/name", into=tmp_path / "results")
    assert os.listdir(tmp_path / "results") == ["thesis.tex"]


def test_a_repository_without_an_export_is_named(repository):
    remote, _ = repository
    (remote / "theta.safetensors").unlink()
    with pytest.raises(metaopt.CheckpointError, match=r"'owner/other'.*no theta\.safetensors"):
        hub.fetch("owner/other")


def test_without_a_network_the_error_says_what_to_do(repository):
    with pytest.raises(metaopt.CheckpointError, match=r"LocalEntryNotFoundError.*give metaopt\.lo"):
        hub.fetch("nobody/offline")


@pytest.mark.parametrize("name", ["name", "../../etc", "a/../b", "a/b/c", "", "-/x", 3, None])
def test_what_is_no_name_of_the_hub_never_gets_there(repository, name):
    _, asked = repository
    with pytest.raises(metaopt.CheckpointError, match="repo_id must be 'owner/name'"):
        hub.fetch(name)
    assert not asked


def test_importing_metaopt_does_not_import_the_hub():
    code = "import sys, metaopt, metaopt.zoo.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
