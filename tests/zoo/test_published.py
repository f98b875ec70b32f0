"""Reading published meta-parameters, by name and from files, whole and damaged ones."""

import os

import golden
import jax
import msgpack
import numpy as np
import pytest
from flax import serialization
from velo_reference import random_theta

import metaopt
from metaopt.optimizers import (
    AdafacMLP,
    Celo,
    Celo2,
    CeloAdam,
    VeLO,
    layouts,
    theta_from_named,
)
from metaopt.zoo.exports import LARGEST_PUBLISHED, load_published

NAMED = random_theta(0, hidden=5, bank=2)
# Kind -> settings that its file must give, and its leaves by name.
KINDS = {
    "velo": (VeLO(hidden=5, bank=2), NAMED),
    "celo": (Celo(hidden=16, bank=4), golden.named_theta(golden.load("celo/celo_bank_small"))),
    "celo_adam": (CeloAdam(hidden=64), None),
    "celo2": (Celo2(), golden.named_theta(golden.load("celo/celo2_base_1"))),
    "adafac_mlp": (AdafacMLP(), golden.named_theta(golden.load("celo/adafac_small_1"))),
}


def named_of(kind):
    named = KINDS[kind][1] or layouts.leaves_by_name(metaopt.load("celo-adam").theta)
    return {name.removeprefix("theta/"): np.asarray(value) for name, value in named.items()}


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
    actual = layouts.leaves_by_name(theta)
    assert actual.keys() == named.keys()
    for name, expected in named.items():
        np.testing.assert_array_equal(actual[name], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_and_the_sizes_of_a_file_are_inferred(kind, tmp_path):
    named = named_of(kind)
    exported = load_published(write(tmp_path / "theta.state", nested(named)))
    assert exported.settings == KINDS[kind][0] and exported.name == kind
    assert_is_named(exported.theta, named)
    exported.apply(num_steps=10)
    again = metaopt.load(metaopt.save(tmp_path / "own", exported.settings, exported.theta))
    assert again.settings == exported.settings


@pytest.mark.parametrize("prefix", ["", "theta/"])
def test_leaves_are_taken_by_name_with_and_without_prefix(prefix):
    shuffled = {f"{prefix}{k}": NAMED[k] for k in sorted(NAMED, reverse=True)}
    theta = theta_from_named("velo", shuffled)
    assert list(theta["rnn_params"]["rnn/linear"]) == ["w", "b"]
    assert_is_named(theta)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda theta: theta,
        lambda theta: {"params": theta, "gen_id": "a", "step": 3},
        lambda theta: (theta, "", 0),
    ],
    ids=["bare", "checkpoint", "tuple"],
)
def test_published_files_of_each_form_are_read(tmp_path, wrap):
    assert_is_named(load_published(write(tmp_path / "params", wrap(nested(NAMED)))).theta)


def test_arrays_that_flax_cut_into_chunks_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    assert_is_named(load_published(write(tmp_path / "params", nested(NAMED))).theta)


def without(name):
    return {k: v for k, v in NAMED.items() if k != name}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (without("rnn_params/step_size/b"), "missing: rnn_params/step_size/b"),
        ({**NAMED, "rnn_params/x/w": np.ones(2)}, "not known: rnn_params/x/w"),
        ({**NAMED, "ff_mod_stack/~/w1": np.ones((2, 4, 5))}, r"w1 is \(2, 4, 5\), not \(2, 4, 4\)"),
        ({**NAMED, "rnn_params/rnn_to_controls/w": np.ones(3)}, r"must be \[hidden, bank\]"),
        ({**NAMED, "rnn_params/step_size/b": np.array([np.nan])}, "step_size/b must hold finite"),
        ({**NAMED, "rnn_params/step_size/b": np.array([1])}, "step_size/b must hold .* floating"),
        ({**NAMED, "rnn_params/step_size/b": "text"}, "step_size/b"),
    ],
)
def test_leaves_that_do_not_fit_are_listed(tmp_path, named, message):
    with pytest.raises(ValueError, match=rf"theta_from_named\('velo'\): .*{message}"):
        theta_from_named("velo", named)
    path = write(tmp_path / "params", nested(named))
    with pytest.raises(metaopt.CheckpointError, match=f"load_published.*params.*{message}"):
        load_published(path)


@pytest.mark.parametrize("other", KINDS)
def test_the_theta_of_another_optimizer_is_refused(other):
    for kind in KINDS:
        if kind != other:
            with pytest.raises(ValueError, match=rf"theta_from_named\('{kind}'\): "):
                theta_from_named(kind, named_of(other))


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match=r"unknown optimizer 'celo3'; did you mean .*celo2"):
        theta_from_named("celo3", NAMED)
    with pytest.raises(ValueError, match=r"velo.*missing: ff_mod_stack/~/b0, .* and 27 more"):
        theta_from_named("velo", {})


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
        msgpack.packb({}),
        msgpack.packb({"params": 3}),
        msgpack.packb({"params": {"a": {1: 2}}}),
        msgpack.packb({"params": {"a": msgpack.ExtType(1, b"\x93")}}),
        msgpack.packb({"params": {"__msgpack_chunked_array__": True, "shape": 3}}),
        msgpack.packb({"rnn_params": {"linear_1": {"w": "text"}}}),
        b"\x81\xa6params" * 3000,  # nested deeper than a parser follows
        b"\xdd\xff\xff\xff\xff",  # claims four thousand million entries
    ],
)
def test_damaged_and_foreign_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "strange"
    path.write_bytes(content)
    with pytest.raises(metaopt.CheckpointError, match=r"load_published\('.*strange'\): "):
        load_published(path)


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(LARGEST_PUBLISHED + 1)  # sparse: takes no space
    os.symlink(huge, tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "huge": "its 268435457 bytes are too many",
        "link": "is a symbolic link",
        "pipe": "is not a plain file",
        "none": "cannot be read",
        ".": "is not a plain file",
    }.items():
        with pytest.raises(metaopt.CheckpointError, match=message):
            load_published(tmp_path / name)


def test_names_with_and_without_prefix_are_not_mixed_silently():
    both = {**NAMED, "theta/rnn_params/step_size/b": np.zeros(1)}
    with pytest.raises(ValueError, match="with and without 'theta/'"):
        theta_from_named("velo", both)


def test_theta_is_float32(tmp_path):
    halves = {name: value.astype(np.float16) for name, value in NAMED.items()}
    theta = load_published(write(tmp_path / "half", nested(halves))).theta
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(theta))
