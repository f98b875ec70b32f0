"""Reading meta-parameters by name and from files, whole and damaged ones."""

import msgpack
import numpy as np
import pytest
from flax import serialization
from velo_reference import random_theta

from metaopt.optimizers import velo_import
from metaopt.optimizers.velo_import import load_velo, velo_theta_from_named

NAMED = random_theta(0, hidden=5, bank=2)


def nested(named):
    """The tree of a published file: two names contain special characters."""
    tree = {}
    for name, value in named.items():
        *path, leaf = name.replace("rnn/linear", "rnn%linear").split("/")
        branch = tree
        for part in path:
            branch = branch.setdefault(part.replace("%", "/"), {})
        branch[leaf] = value
    return tree


def write(path, content):
    path.write_bytes(serialization.to_bytes(content))
    return path


def assert_is_named(theta, named=NAMED):
    assert list(theta["rnn_params"]["rnn/linear"]) == ["w", "b"]
    flat = serialization.to_state_dict(theta)
    actual = velo_import.leaves_by_name(flat)
    assert actual.keys() == named.keys()
    for name, expected in named.items():
        np.testing.assert_array_equal(actual[name], expected)


@pytest.mark.parametrize("prefix", ["", "theta/"])
def test_leaves_are_taken_by_name_with_and_without_prefix(prefix):
    shuffled = {f"{prefix}{k}": NAMED[k] for k in sorted(NAMED, reverse=True)}
    assert_is_named(velo_theta_from_named(shuffled))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda theta: theta,
        lambda theta: {"params": theta, "gen_id": "a", "step": 3},
        lambda theta: (theta, "", 0),
    ],
    ids=["bare", "checkpoint", "tuple"],
)
def test_published_files_of_each_kind_are_read(tmp_path, wrap):
    assert_is_named(load_velo(write(tmp_path / "params", wrap(nested(NAMED)))))


def test_arrays_that_flax_cut_into_chunks_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    assert_is_named(load_velo(write(tmp_path / "params", nested(NAMED))))


def without(name):
    return {k: v for k, v in NAMED.items() if k != name}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (without("rnn_params/step_size/b"), "missing: rnn_params/step_size/b"),
        ({**NAMED, "rnn_params/x/w": np.ones(2)}, "not known: rnn_params/x/w"),
        ({}, "missing: ff_mod_stack/~/b0, .* and 27 more"),
        ({**NAMED, "ff_mod_stack/~/w1": np.ones((2, 4, 5))}, r"w1 is \(2, 4, 5\), not \(2, 4, 4\)"),
        ({**NAMED, "rnn_params/rnn_to_controls/w": np.ones(3)}, r"must be \[hidden, bank\]"),
        ({**NAMED, "rnn_params/step_size/b": np.array([np.nan])}, "step_size/b must hold finite"),
        ({**NAMED, "rnn_params/step_size/b": np.array([1])}, "step_size/b must hold .* floating"),
        ({**NAMED, "rnn_params/step_size/b": "text"}, "step_size/b"),
    ],
)
def test_leaves_that_do_not_fit_are_listed(tmp_path, named, message):
    with pytest.raises(ValueError, match=f"velo_theta_from_named: .*{message}"):
        velo_theta_from_named(named)
    path = write(tmp_path / "params", nested(named))
    with pytest.raises(ValueError, match=f"load_velo.*params.*{message}"):
        load_velo(path)


WHOLE = serialization.to_bytes({"params": nested(NAMED)})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95 a pickle",
        b"PK\x03\x04",
        WHOLE[:100],
        WHOLE[:-1],
        WHOLE + b"\x00",
        msgpack.packb([1, 2, 3]),
        msgpack.packb("text"),
        msgpack.packb({"params": 3}),
        msgpack.packb({"params": {"a": {1: 2}}}),
        msgpack.packb({"params": {"a": msgpack.ExtType(1, b"\x93")}}),
        msgpack.packb({"params": {"__msgpack_chunked_array__": True, "shape": 3}}),
        b"\x81\xa6params" * 3000,  # nested deeper than a parser follows
        b"\xdd\xff\xff\xff\xff",  # claims four thousand million entries
    ],
)
def test_damaged_and_foreign_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "strange"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"load_velo\('.*strange'\): "):
        load_velo(path)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(velo_import.MAX_FILE_BYTES + 1)  # sparse: takes no space
    with pytest.raises(ValueError, match=r"huge'\): the file has 1073741825 bytes"):
        load_velo(path)


def test_names_with_and_without_prefix_are_not_mixed_silently():
    both = {**NAMED, "theta/rnn_params/step_size/b": np.zeros(1)}
    with pytest.raises(ValueError, match="with and without 'theta/'"):
        velo_theta_from_named(both)
