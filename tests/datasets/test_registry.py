"""Data sets by name: what is known, what is missing and how to get it, and how it is split."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from dataset_files import digit_images, write_class_folders
from PIL import Image

from metaopt import datasets
from metaopt.cli import main
from metaopt.datasets.registry import EMBEDDED


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("METAOPT_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sets_are_what_the_table_says(root, name):
    data, spec = datasets.load(name), datasets.known()[name]
    assert datasets.state(name) == "embedded"
    assert data.splits["train"]["x"].shape[1:] == spec.shape
    assert data.num_classes == spec.num_classes
    assert sum(len(e["y"]) for e in data.splits.values()) == sum(spec.examples.values())


def test_the_data_folder_is_chosen_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("METAOPT_DATA_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert datasets.data_root() == tmp_path / ".cache" / "metaopt" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert str(datasets.data_root()) == "/var/cache/me/metaopt/data"
    monkeypatch.setenv("METAOPT_DATA_DIR", "/data")
    assert str(datasets.data_root()) == "/data"


@pytest.mark.parametrize(
    "name, near",
    [
        ("fashion-mnist", "fashion_mnist"),
        ("cifar", "cifar10, cifar100"),
        ("tiny-imagenet", "tiny_imagenet"),
        ("imagenet_resized/16x16", "imagenet_resized/64x64"),
        ("quite another", "known: digits, moons"),
        ("../mnist", "mnist"),
    ],
)
def test_an_unknown_name_lists_the_near_matches(root, name, near):
    with pytest.raises(ValueError, match="unknown data set") as caught:
        datasets.load(name)
    assert repr(name) in str(caught.value) and near in str(caught.value)


def test_a_set_that_is_not_prepared_comes_with_its_command(root, capsys):
    assert main(["data", "show", "cifar10"]) == 2
    error = capsys.readouterr().err
    for part in (
        "'cifar10'",
        str(root),
        "metaopt data prepare cifar10 --from DIR",
        "test_batch.bin",
    ):
        assert part in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("n, valid", [(60000, 5000), (300, 30), (9, 0)])
def test_held_out_examples_are_a_fixed_part(n, valid):
    kept, held_out = datasets.hold_out(n)
    assert len(held_out) == valid
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(n))
    # Against the generator that numpy has frozen, by its legacy name.
    order = np.random.mtrand.RandomState(0).permutation(n)
    assert set(order[:valid]) == set(held_out)


X, Y = digit_images()


def prepared(tmp_path, **parts):
    for split, part in parts.items():
        write_class_folders(tmp_path / "from" / split, X[part], Y[part], "0123456789")
    datasets.prepare("mine", tmp_path / "from", root=tmp_path / "root")
    return datasets.load("mine", root=tmp_path / "root").splits


def sizes(splits):
    return {split: len(examples["y"]) for split, examples in splits.items()}


def test_official_validation_images_are_kept(tmp_path):
    splits = prepared(tmp_path, train=slice(0, 100), val=slice(100, 130), test=slice(130, 150))
    assert sizes(splits) == {"train": 100, "valid": 30, "test": 20}


def test_without_test_images_the_validation_images_are_the_test(tmp_path):
    splits = prepared(tmp_path, train=slice(0, 100), val=slice(100, 130))
    assert sizes(splits) == {"train": 90, "valid": 10, "test": 30}
    order = np.argsort(Y[100:130], kind="stable") + 100
    np.testing.assert_array_equal(splits["test"]["x"], X[order])


def test_training_images_alone_are_split_in_three(tmp_path):
    assert sizes(prepared(tmp_path, train=slice(0, 100))) == {"train": 70, "valid": 10, "test": 20}


def test_images_are_bytes_on_the_device(tmp_path):
    splits = prepared(tmp_path, train=slice(0, 40), test=slice(40, 60))
    assert all(isinstance(e["x"], jnp.ndarray) for e in splits.values())
    assert {e["x"].dtype for e in splits.values()} == {jnp.dtype(jnp.uint8)}
    assert {e["y"].dtype for e in splits.values()} == {jnp.dtype(jnp.int32)}


def test_prepare_list_and_show(root, tmp_path, capsys):
    write_class_folders(tmp_path / "from" / "train", X[:40], Y[:40], "0123456789")
    arguments = ["data", "prepare", "mine", "--from", str(tmp_path / "from")]
    assert main(arguments) == 0
    assert "mine: prepared in" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "already prepared" in capsys.readouterr().out
    assert main(["data", "list"]) == 0
    listed = capsys.readouterr().out
    row = {line.split()[0]: line for line in listed.splitlines() if line.split()}
    assert "8x8x1" in row["mine"] and "40" in row["mine"] and "prepared" in row["mine"]
    assert "embedded" in row["digits"] and "not" in row["mnist"]
    assert "metaopt data prepare mnist --from DIR" in listed
    picture = tmp_path / "sheet.png"
    assert main(["data", "show", "mine", "--out", str(picture)]) == 0
    assert "28" in capsys.readouterr().out  # 70 per cent of 40
    with Image.open(picture) as sheet:
        pixels = np.asarray(sheet)
    # Ten rows of ten 8x8 images, enlarged four times, a white line around each.
    assert pixels.shape == (331, 331, 3)
    train = datasets.load("mine").splits["train"]
    first = np.asarray(train["x"])[np.flatnonzero(np.asarray(train["y"]) == 3)[0]]
    np.testing.assert_array_equal(pixels[100:132:4, 1:33:4, 0], first[..., 0])


def test_a_picture_of_points_is_refused(root, tmp_path, capsys):
    assert main(["data", "show", "moons", "--out", str(tmp_path / "a.png")]) == 2
    assert "holds no images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["prepare"], "metaopt data prepare NAME --from DIR"),
        (["prepare", "mnist"], "metaopt data prepare NAME --from DIR"),
        (["prepare", "digits", "--from", "."], "embedded; there is nothing to prepare"),
        (["prepare", "mnist", "--from", "/nothing/here"], "/nothing/here: no such folder"),
        (["prepare", "../mnist", "--from", "."], "use lower-case letters"),
    ],
)
def test_mistakes_are_one_line(root, arguments, message, capsys):
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not os.path.exists(root / "mnist")
