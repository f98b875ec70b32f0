"""Prepared sets that have been damaged since."""

import json
import shutil

import numpy as np
import pytest
from dataset_files import write_digits_idx
from refusals import bad_inputs, refused

from metaopt import datasets


def changed(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    files = write_digits_idx(tmp_path_factory.mktemp("idx"), gz=False, train=40, test=20)
    datasets.prepare("mine", files, root=root)
    return root


RECORDS = "mine-train.array_record-00000-of-00001"
undecoded = lambda f: shutil.rmtree(f / "decoded")


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def manifest(**fields):
    def spoil(folder):
        path = folder / "decoded" / "manifest.json"
        content = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return spoil


PREPARED = {
    "records gone": (lambda f: (f / RECORDS).unlink(), f"{RECORDS} is missing"),
    "records half": (changed(RECORDS, lambda b: b[: len(b) // 2]), f"{RECORDS} has changed"),
    "features flipped": (changed("features.json", lambda b: b[:-2]), "features.json has changed"),
    "undecoded, records half": (
        both(undecoded, changed(RECORDS, lambda b: b[: len(b) // 2])),
        "cannot be read: .*--overwrite True",
    ),
    "undecoded, records gone": (
        both(undecoded, lambda f: (f / RECORDS).unlink()),
        "cannot be read: .*--overwrite True",
    ),
    "undecoded, features no JSON": (
        both(undecoded, changed("features.json", lambda b: b"{")),
        "cannot be read: .*--overwrite True",
    ),
    "undecoded, info a list": (
        both(undecoded, changed("dataset_info.json", lambda b: b"[]")),
        "cannot be read: .*--overwrite True",
    ),
}


@bad_inputs(PREPARED)
def test_a_damaged_set_is_refused(prepared, tmp_path, bad, match):
    root = shutil.copytree(prepared, tmp_path / "root")
    folder = root / "mine" / "1.0.0"
    bad(folder)
    refused(lambda: datasets.load("mine", root=root), match, folder)


MANIFESTS = {
    "a manifest that climbs out": manifest(source={"../../../secret": "0"}),
    "a manifest of no arrays": manifest(arrays=3),
    "arrays that climb out": manifest(arrays={"../x.npy": "0"}),
    "class names a number": manifest(class_names=3),
}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_bad_manifest_of_arrays_is_made_again(prepared, tmp_path, manifest):
    root = shutil.copytree(prepared, tmp_path / "root")
    MANIFESTS[manifest](root / "mine" / "1.0.0")
    for name, examples in datasets.load("mine", root=root).splits.items():
        expected = datasets.load("mine", root=prepared).splits[name]
        np.testing.assert_array_equal(examples["x"], expected["x"])
