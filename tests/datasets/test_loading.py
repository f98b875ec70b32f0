"""Data sets by name: which are known, what is missing and how to get it, how they are split."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from dataset_files import digit_images, write_class_folders
from PIL import Image

from metaopt import datasets
from metaopt.cli import main
from metaopt.datasets.loading import EMBEDDED

X, Y = digit_images()


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("METAOPT_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sets_are_what_their_specs_say(root, name):
    data, spec = datasets.load(name), datasets.specs()[name]
    assert datasets.state(name) == "embedded"
    assert data.splits["train"]["x"].shape[1:] == spec.shape
    assert data.num_classes == spec.num_classes
    assert sum(len(part["y"]) for part in data.splits.values()) == sum(spec.examples.values())


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
    "name, close",
    [
        ("fashion-mnist", "fashion_mnist"),
        ("cifar", "cifar10, cifar100"),
        ("tiny-imagenet", "tiny_imagenet"),
        ("imagenet_resized/16x16", "imagenet_resized/64x64"),
        ("quite another", "known: digits, breast_cancer, moons"),
        ("../mnist", "mnist"),
    ],
)
def test_the_message_on_an_unknown_name_lists_the_closest_names(root, name, close):
    with pytest.raises(ValueError, match="unknown data set") as caught:
        datasets.load(name)
    assert repr(name) in str(caught.value) and close in str(caught.value)


def test_the_message_on_a_set_that_is_not_prepared_gives_the_command(root, capsys):
    assert main(["data", "show", "cifar10"]) == 2
    error = capsys.readouterr().err
    command = "metaopt data prepare cifar10 --from DIR"
    for part in ("'cifar10'", str(root), command, "test_batch.bin"):
        assert part in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("n, num_held_out", [(60000, 5000), (300, 30), (9, 0)])
def test_held_out_examples_never_change(n, num_held_out):
    kept, held_out = datasets.hold_out(n)
    assert len(held_out) == num_held_out
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(n))
    # Against the generator that NumPy has frozen, by its legacy name.
    order = np.random.mtrand.RandomState(0).permutation(n)
    assert set(order[:num_held_out]) == set(held_out)


def load_parts(tmp_path, **parts: slice):
    """Prepares a set from class folders, one part of the digits per split, and loads it."""
    for split, part in parts.items():
        write_class_folders(tmp_path / "from" / split, X[part], Y[part], "0123456789")
    datasets.prepare("mine", tmp_path / "from", root=tmp_path / "root")
    return datasets.load("mine", root=tmp_path / "root").splits


def sizes(splits):
    return {split: len(examples["y"]) for split, examples in splits.items()}


def test_official_validation_images_are_kept(tmp_path):
    splits = load_parts(tmp_path, train=slice(0, 100), val=slice(100, 130), test=slice(130, 150))
    assert sizes(splits) == {"train": 100, "valid": 30, "test": 20}


def test_without_test_images_the_validation_images_are_the_test(tmp_path):
    splits = load_parts(tmp_path, train=slice(0, 100), val=slice(100, 130))
    assert sizes(splits) == {"train": 90, "valid": 10, "test": 30}
    order = np.argsort(Y[100:130], kind="stable") + 100
    np.testing.assert_array_equal(splits["test"]["x"], X[order])


def test_training_images_alone_are_split_in_three(tmp_path):
    splits = load_parts(tmp_path, train=slice(0, 100))
    assert sizes(splits) == {"train": 70, "valid": 10, "test": 20}


def test_images_are_bytes_on_the_device(tmp_path):
    splits = load_parts(tmp_path, train=slice(0, 40), test=slice(40, 60))
    assert all(isinstance(part["x"], jnp.ndarray) for part in splits.values())
    assert {part["x"].dtype for part in splits.values()} == {jnp.dtype(jnp.uint8)}
    assert {part["y"].dtype for part in splits.values()} == {jnp.dtype(jnp.int32)}


def test_the_command_prepares_lists_and_shows_a_set(root, tmp_path, capsys):
    write_class_folders(tmp_path / "from" / "train", X[:40], Y[:40], "0123456789")
    arguments = ["data", "prepare", "mine", "--from", str(tmp_path / "from")]
    assert main(arguments) == 0
    assert "mine: prepared in" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "already prepared" in capsys.readouterr().out
    assert main(["data", "list"]) == 0
    listing = capsys.readouterr().out
    row = {line.split()[0]: line for line in listing.splitlines() if line.split()}
    assert "8x8x1" in row["mine"] and "40" in row["mine"] and "prepared" in row["mine"]
    assert "embedded" in row["digits"] and "not" in row["mnist"]
    assert "metaopt data prepare mnist --from DIR" in listing
    picture = tmp_path / "sheet.png"
    assert main(["data", "show", "mine", "--out", str(picture)]) == 0
    assert "28" in capsys.readouterr().out  # 70 per cent of 40
    with Image.open(picture) as sheet:
        pixels = np.asarray(sheet)
    # Ten rows of ten 8x8 images, enlarged four times, with a white line around each.
    assert pixels.shape == (331, 331, 3)
    train = datasets.load("mine").splits["train"]
    first = np.asarray(train["x"])[np.flatnonzero(np.asarray(train["y"]) == 3)[0]]
    np.testing.assert_array_equal(pixels[100:132:4, 1:33:4, 0], first[..., 0])


def test_points_have_no_picture(root, tmp_path, capsys):
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
