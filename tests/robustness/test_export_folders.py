"""`metaopt.load` on export folders that are damaged, foreign or hostile."""

import gzip
import os
import pickle
import shutil

import jax
import numpy as np
import pytest
from export_damage import (
    KERNEL,
    MARKER,
    each,
    flip,
    header,
    leaves,
    link_away,
    npz_of_objects,
    pickled,
    replaced,
    signed,
    sparse,
    spec,
    text,
    twice,
    weights,
)
from refusals import bad_inputs, bomb, refused

import metaopt
from metaopt.optimizers import L3RS, LSTM
from metaopt.zoo.exports import SPEC, WEIGHTS

PARAMS = {"w": np.ones((2, 2), np.float32)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An LSTM and an L3RS as they are exported."""
    root = tmp_path_factory.mktemp("exports")
    for settings in (LSTM(hidden=2, layers=1), L3RS(base=("sgd", "lion"))):
        theta = settings.build().init(jax.random.key(0), PARAMS)
        metaopt.save(root / settings.name, settings, theta)
    return root


@pytest.fixture
def copy(exported, tmp_path):
    shutil.copytree(exported / "lstm", tmp_path / "x")
    return tmp_path / "x"


DAMAGED = {
    "no spec": (lambda f: (f / SPEC).unlink(), f"{SPEC}: cannot be read"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS}: cannot be read"),
    "a file, no folder": (
        lambda f: (shutil.rmtree(f), f.write_text("x")),
        "there is no such folder",
    ),
    "no such folder": (shutil.rmtree, "there is no such folder"),
    "spec is a pipe": (replaced(SPEC, os.mkfifo), f"{SPEC}: .*not a plain file"),
    "spec is a link": (link_away(SPEC), f"{SPEC}: is a symbolic link"),
    "weights are a link": (link_away(WEIGHTS), f"{WEIGHTS}: is a symbolic link"),
    "weights link to a device": (
        replaced(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
        f"{WEIGHTS}: is a symbolic link",
    ),
    "spec of 4 GB": (replaced(SPEC, sparse(4 << 30)), f"{SPEC}: .*bytes are too many"),
    "weights of 1 TB": (replaced(WEIGHTS, sparse(1 << 40)), f"{WEIGHTS}: .*bytes are too many"),
    "spec half": (
        lambda f: (f / SPEC).write_bytes((f / SPEC).read_bytes()[:200]),
        f"{SPEC}: not valid JSON",
    ),
    "spec not UTF-8": (text(b'{"format": 1, "optimizer": "\xff\xfe"}'), "not valid JSON"),
    "spec a pickle": (pickled(SPEC), f"{SPEC}: not valid JSON"),
    "spec a list": (text("[1]"), "not the spec of a metaopt export"),
    "spec null": (text("null"), "not the spec of a metaopt export"),
    "spec deep": (text("[" * 200_000), f"{SPEC}: not valid JSON"),
    "theta deep": (
        text('{"format":1,"theta":' + '{"a":' * 3000 + "1" + "}" * 3001),
        f"{SPEC}: ",
    ),
    "sha256 twice": (twice("sha256"), f"{SPEC}: .*'sha256' occurs twice"),
    "format 1": (spec(format=1), "format 1 was written by .*this version reads format 2"),
    "format 3": (spec(format=3, metaopt="9.1"), "format 3 is newer.*9.1.*Upgrade"),
    "format 10^5000": (text('{"format": 1' + "0" * 5000 + "}"), f"{SPEC}: "),
    "format 0": (spec(format=0), f"{SPEC}: .*format 0"),
    "format true": (spec(format=True), "no format number"),
    "no format": (spec(format=None), "no format number"),
    "no theta": (spec(theta=None), "'theta' is missing"),
    "trained a number": (spec(trained=3), "'trained' is missing or not a dict"),
    "sha256 a number": (spec(sha256=5), "'sha256' is missing or not a str"),
    "sha256 of something else": (spec(sha256="0" * 64), f"{WEIGHTS}: its checksum"),
    "unknown optimizer": (spec(optimizer="adamm"), "unknown optimizer 'adamm'"),
    "optimizer a module": (spec(optimizer="os.system"), "unknown optimizer 'os.system'"),
    "optimizer of 1 MB": (spec(optimizer="x" * 1_000_000), "unknown optimizer"),
    "unknown setting": (spec(settings__hiden=3), "'lstm' has no setting 'hiden'"),
    "hidden 0": (spec(settings__hidden=0), "hidden must be at least 1"),
    "hidden null": (
        lambda f: (f / SPEC).write_text(
            (f / SPEC).read_text().replace('"hidden": 2', '"hidden": null')
        ),
        "hidden must be an integer",
    ),
    "hidden of another network": (
        spec(settings__hidden=3),
        "theta.*does not fit|other shape|expected",
    ),
    "hidden 10^12": (spec(settings__hidden=10**12), "does not fit|expected"),
    "layers of another network": (spec(settings__layers=2), "memory of 1 layers, but layers=2"),
    "theta 600 deep": (
        lambda f: (
            spec(theta={"a": 0})(f),
            (f / SPEC).write_text(
                (f / SPEC).read_text().replace('{"a": 0}', '{"a": ' * 600 + "0" + "}" * 600)
            ),
        ),
        f"{WEIGHTS}: ",
    ),
    "p negative": (spec(settings__p=-1.0), "p must be positive"),
    "another optimizer's theta": (
        spec(optimizer="l3rs", settings={}),
        "other leaves than expected",
    ),
    "VeLO with this theta": (spec(optimizer="velo", settings={}), "not VeLO's meta-parameters"),
    "theta empty": (spec(theta={}), "leaves that the spec does not know"),
    "a leaf too many in the spec": (
        spec(theta__more="float32[1]"),
        f"{WEIGHTS}: leaf 'more' of the spec is missing",
    ),
    "a leaf's dtype is another": (
        spec(theta__net__readout__kernel="float16[2,1]"),
        f"{WEIGHTS}: leaf '{KERNEL}' is float32.2,1., but the spec says float16",
    ),
    "a leaf's shape is another": (
        spec(theta__net__readout__kernel="float32[1,2]"),
        f"{WEIGHTS}: leaf '{KERNEL}' is float32.2,1., but the spec says",
    ),
    "a leaf of 4 EB in the spec": (
        spec(theta__net__readout__kernel="float32[1000000000,1000000000]"),
        f"{WEIGHTS}: leaf '{KERNEL}' is float32.2,1., but the spec says",
    ),
    "a leaf named by a path that climbs out": (
        leaves(lambda a: {**a, "../../../etc/passwd": np.ones(1, np.float32)}),
        "does not know: .*etc/passwd",
    ),
    "weights half": (weights(lambda b: b[: len(b) // 2]), f"{WEIGHTS}: its checksum"),
    "weights and one byte more": (weights(lambda b: b + b"\0"), f"{WEIGHTS}: its checksum"),
    "a bit of a number flipped": (weights(flip(-5)), f"{WEIGHTS}: its checksum"),
    "weights empty, signed": (signed(lambda b: b""), f"{WEIGHTS}: not a safetensors file"),
    "a header of 2^63 bytes": (
        signed(lambda b: b"\xff" * 7 + b"\x7f" + b[8:]),
        f"{WEIGHTS}: not a safetensors file",
    ),
    "a header that is no JSON": (signed(flip(8)), f"{WEIGHTS}: not a safetensors file"),
    "weights a pickle, signed": (pickled(WEIGHTS, sign=True), "not a safetensors file"),
    "weights gzipped, signed": (signed(gzip.compress), f"{WEIGHTS}: not a safetensors file"),
    "weights an npz of objects, signed": (npz_of_objects, f"{WEIGHTS}: not a safetensors file"),
    "a tensor of 4 EB": (
        header(lambda h: h[KERNEL].update(shape=[1_000_000_000, 1_000_000_000])),
        f"{WEIGHTS}: not a safetensors file",
    ),
    "a tensor beyond the end": (
        header(lambda h: h[KERNEL].update(data_offsets=[0, 1 << 40])),
        f"{WEIGHTS}: not a safetensors file",
    ),
    "a leaf missing": (
        leaves(lambda a: {k: v for k, v in a.items() if k != KERNEL}),
        f"{WEIGHTS}: leaf '{KERNEL}' of the spec is missing",
    ),
    "theta NaN": (leaves(each(lambda a: a * np.float32("nan"))), f"{WEIGHTS}: leaf .*NaN or inf"),
    "one number of theta inf": (
        leaves(lambda a: {**a, KERNEL: np.array([[1.0], [np.inf]], np.float32)}),
        f"{WEIGHTS}: leaf '{KERNEL}' holds NaN or inf",
    ),
    "theta of integers": (
        leaves(
            lambda a: {**a, KERNEL: np.ones((2, 1), np.int32)},
            theta__net__readout__kernel="int32[2,1]",
        ),
        f"leaf '{KERNEL}'.* is int32",
    ),
    "a kernel transposed in both": (
        leaves(lambda a: {**a, KERNEL: a[KERNEL].T}, theta__net__readout__kernel="float32[1,2]"),
        "expected .2, 1.",
    ),
}


@bad_inputs(DAMAGED)
def test_a_bad_export_is_refused(copy, bad, match):
    bad(copy)
    refused(lambda: metaopt.load(copy), match, copy.parent)
    assert not (copy.parent / MARKER).exists()


OF_L3RS = {
    "base a string": (spec(settings={"base": "sgd"}), "base must be a tuple"),
    "base a module": (spec(settings={"base": ["os.system"]}), "unknown base 'os.system'"),
    "base twice": (spec(settings={"base": ["sgd", "sgd"]}), "base names must differ"),
    "base other than theta's": (spec(settings={"base": ["sgd", "adam"]}), "other leaves|expected"),
    "variant unknown": (spec(settings__variant="both"), "variant must be one of"),
    "variant other than theta's": (spec(settings__variant="per_layer"), "other leaves|expected"),
    "ema unknown": (spec(settings__ema="two"), "ema must be one of three, one, raw, none, tuple"),
    "ema of 2": (spec(settings__ema=[2.0]), "ema decays must"),
    "hidden a number": (spec(settings__hidden=32), "hidden"),
    "embedding_dim of another": (spec(settings__embedding_dim=3), "expected"),
    "lambda_0 NaN": (spec(settings__lambda_0=float("nan")), "NaN|finite"),
    "layer_names a string": (spec(settings__layer_names="leaf_names"), "no setting 'layer_names'"),
    "an embedding of another size": (
        leaves(
            lambda a: {**a, "embedding/w": np.ones(3, np.float32)},
            theta__embedding={"w": "float32[3]"},
        ),
        "expected .16",
    ),
}


@bad_inputs(OF_L3RS)
def test_a_bad_export_of_l3rs_is_refused(exported, tmp_path, bad, match):
    folder = shutil.copytree(exported / "l3rs", tmp_path / "x")
    bad(folder)
    refused(lambda: metaopt.load(folder), match, tmp_path)


NO_PATHS = {
    "None": (None, "path"),
    "bytes": (b"runs", "path"),
    "a name with a zero byte": ("runs\0x", "no such folder"),
    "a name of 5000 letters": ("x" * 5000, "no such folder"),
}


@bad_inputs(NO_PATHS)
def test_what_is_no_path_is_refused(bad, match):
    refused(lambda: metaopt.load(bad), match)


def test_files_beside_an_export_are_not_touched(copy):
    """A model card may lie there; code and pickles that do are not run."""
    plain = metaopt.load(copy)
    marker = copy.parent / MARKER
    (copy / "__init__.py").write_text(f"open({str(marker)!r}, 'w')")
    (copy / "theta.pkl").write_bytes(bomb(marker))
    (copy / "README.md").write_text("{{ cycler.__init__.__globals__.os.system('true') }}")
    again = metaopt.load(copy)
    jax.tree.map(np.testing.assert_array_equal, plain.theta, again.theta)
    assert not marker.exists()


def test_the_pickle_of_these_tests_does_run_when_it_is_loaded(tmp_path):
    """Otherwise the marker's absence would show nothing."""
    pickle.loads(bomb(tmp_path / MARKER))
    assert (tmp_path / MARKER).exists()
