"""Random damage: the result is an error of metaopt's, or what the undamaged files hold."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from dataset_files import write_digits_idx
from evaluations import contenders, write_index, write_task
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import fingerprint, refused, within

import metaopt
from metaopt import datasets
from metaopt.core import checks
from metaopt.datasets import idx
from metaopt.datasets.catalog import own_spec
from metaopt.datasets.sources import open_source
from metaopt.jobs.evaluate import EvaluateJob
from metaopt.jobs.train import TrainJob
from metaopt.meta import NESConfig, PESConfig, TBPTTConfig
from metaopt.optimizers import L3RS, LSTM, Celo2, VeLO
from metaopt.report import summary

IDX_FILES = ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
PARAMS = {"w": np.ones((2, 2), np.float32)}
fuzzed = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def damages(draw):
    """``bytes -> bytes``: some bytes replaced, a part cut out, or a part doubled."""
    kind = draw(st.sampled_from(["flip", "cut", "double", "end"]))
    places = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4))

    def damage(payload):
        at, change = int(places[0][0] * (len(payload) - 1)), places[0][1]
        if kind == "end":
            return payload[:at]
        if kind == "cut":
            return payload[:at] + payload[at + change :]
        if kind == "double":
            return payload[: at + change] + payload[at:]
        damaged = bytearray(payload)
        for place, mask in places:
            damaged[int(place * (len(damaged) - 1))] ^= mask
        return bytes(damaged)

    return damage


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    settings = LSTM(hidden=2, layers=1)
    theta = settings.build().init(jax.random.key(0), PARAMS)
    return metaopt.save(tmp_path_factory.mktemp("e") / "x", settings, theta, {"task": "t"})


@pytest.fixture(scope="module")
def plain(exported):
    return metaopt.load(exported)


@pytest.fixture(scope="module")
def idx_files(tmp_path_factory):
    return write_digits_idx(tmp_path_factory.mktemp("idx"), gz=False, train=20, test=10)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    write_task(folder / "0-first", "first", contenders(0))
    write_index(folder, ["0-first"])
    return folder


def same_or_refused(read, same, folder):
    """`read` is refused, or `same` accepts its result; the folder is unchanged in both cases."""
    before = fingerprint(folder)
    with within(30):
        try:
            result = read()
        except ValueError:
            refused(read, ".", folder)
            return
    assert fingerprint(folder) == before
    same(result)


@fuzzed
@given(damage=damages(), name=st.sampled_from(["spec.json", "theta.safetensors"]))
def test_a_damaged_export(exported, plain, tmp_path, damage, name):
    folder = shutil.copytree(exported, tmp_path / "x", dirs_exist_ok=True)
    (folder / name).write_bytes(damage((exported / name).read_bytes()))

    def same(export):
        # Only the free text of a spec can change so that the export can still be read.
        jax.tree.map(np.testing.assert_array_equal, export.theta, plain.theta)
        assert (export.name, export.sha256) == (plain.name, plain.sha256)

    same_or_refused(lambda: metaopt.load(folder), same, folder)


@fuzzed
@given(
    damage=damages(), name=st.sampled_from(["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
)
def test_a_damaged_idx_file(idx_files, tmp_path, damage, name):
    folder = shutil.copytree(idx_files, tmp_path / "x", dirs_exist_ok=True)
    (folder / name).write_bytes(damage((idx_files / name).read_bytes()))

    def read():
        with open_source(folder) as files:
            return idx.read(files, own_spec("mine"))

    def same(dataset):
        # Pixels have no checksum. The number of examples is the one in the header.
        for examples in dataset.splits.values():
            assert examples.count == len(list(examples.iterate()))

    same_or_refused(read, same, folder)


@fuzzed
@given(
    damage=damages(),
    name=st.sampled_from(["evaluation.json", "0-first/record.json", "0-first/0.npz"]),
)
def test_a_damaged_evaluation(evaluation, tmp_path, damage, name):
    folder = shutil.copytree(evaluation, tmp_path / "x", dirs_exist_ok=True)
    (folder / name).write_bytes(damage((evaluation / name).read_bytes()))

    def same(evaluation):
        for row in summary.rows(evaluation.tasks[0]):
            assert isinstance(row.optimizer, str)

    same_or_refused(lambda: summary.load(folder), same, folder)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers()),
)


@pytest.mark.parametrize(
    "config",
    [L3RS, LSTM, VeLO, Celo2, NESConfig, PESConfig, TBPTTConfig, TrainJob, EvaluateJob],
)
@fuzzed
@given(data=st.data())
def test_random_settings(config, data):
    """They are refused, or the settings hold them unchanged, with the annotated types."""
    names = [field.name for field in dataclasses.fields(config)]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    fields = {name: data.draw(VALUES) for name in chosen}
    with within(30):
        try:
            job = config(**fields)
        except ValueError:
            refused(lambda: config(**fields), ".")
            return
    checks.check_fields(job)
    for name, value in fields.items():
        assert value is None or getattr(job, name) == value


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inside: st.one_of(
        st.lists(inside, max_size=3), st.dictionaries(st.text(max_size=5), inside, max_size=3)
    ),
    max_leaves=8,
)


@fuzzed
@given(data=st.data())
def test_random_json_in_a_spec(exported, plain, tmp_path, data):
    folder = shutil.copytree(exported, tmp_path / "x", dirs_exist_ok=True)
    spec = json.loads((exported / "spec.json").read_text())
    names = data.draw(st.lists(st.sampled_from(sorted(spec)), min_size=1, max_size=2))
    spec |= {name: data.draw(JSON) for name in names}
    (folder / "spec.json").write_text(json.dumps(spec))

    def same(export):
        jax.tree.map(np.testing.assert_array_equal, export.theta, plain.theta)

    same_or_refused(lambda: metaopt.load(folder), same, folder)


@fuzzed
@given(name=st.text(max_size=20))
def test_random_names_of_data_sets(tmp_path, name):
    """No name leads out of the data folder."""
    if name in datasets.specs(tmp_path):
        return
    refused(lambda: datasets.load(name, root=tmp_path), "unknown data set", tmp_path)
