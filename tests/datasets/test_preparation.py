"""Prepared sets: the stock library reads them, they are complete or absent, damage is detected."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from dataset_files import digit_images, write_class_folders, write_digits_idx, write_idx

from metaopt import datasets
from metaopt.datasets import decoded_arrays, store, tfds_records

X, Y = digit_images(side=32, channels=3, n=60)
PREPARE_AGAIN = "metaopt data prepare mine --from DIR --overwrite True"


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory):
    """The root of one prepared set of the user's own, "mine": 300 + 60 digits."""
    root = tmp_path_factory.mktemp("data")
    datasets.prepare("mine", write_digits_idx(tmp_path_factory.mktemp("from")), root=root)
    return root


@pytest.fixture
def root(prepared_once, tmp_path):
    """A copy of that root, which a test may damage."""
    return shutil.copytree(prepared_once, tmp_path / "copy")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_stock_data_source_reads_the_real_images(real_data, name):
    splits = real_data(name).splits
    root = datasets.data_root()
    source = tfds.data_source(name, data_dir=root, download=False, split="test")
    assert len(source) == 10000
    for i in (0, 1, 17, 5000, 9999):
        np.testing.assert_array_equal(source[i]["image"], splits["test"]["x"][i])
        assert source[i]["label"] == splits["test"]["y"][i]
    kept, held_out = datasets.hold_out(60000)
    source = tfds.data_source(name, data_dir=root, download=False, split="train")
    assert len(source) == 60000
    for split, indices in (("train", kept), ("valid", held_out)):
        for i in (0, 3, len(indices) - 1):
            record = source[int(indices[i])]
            np.testing.assert_array_equal(record["image"], splits[split]["x"][i])
            assert record["label"] == splits[split]["y"][i]


# Examples per class in training, mean pixel of training and of test, as published with the files.
PUBLISHED = {
    "mnist": ((5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949), 33.3184, 33.7912),
    "fashion_mnist": ((6000,) * 10, 72.9404, 73.1466),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_sets_have_the_published_counts_and_means(real_data, name):
    counts, train_mean, test_mean = PUBLISHED[name]
    data = real_data(name)
    train, valid, test = (data.splits[split] for split in ("train", "valid", "test"))
    assert {part["x"].dtype for part in data.splits.values()} == {np.dtype(np.uint8)}
    assert data.scale == 1 / 255 and data.num_classes == 10
    assert [len(part["y"]) for part in (train, valid, test)] == [55000, 5000, 10000]
    labels = np.concatenate([train["y"], valid["y"]])
    np.testing.assert_array_equal(np.bincount(labels), counts)
    pixels = np.concatenate([train["x"], valid["x"]])
    np.testing.assert_allclose(pixels.mean(), train_mean, atol=1e-4)
    np.testing.assert_allclose(np.asarray(test["x"]).mean(), test_mean, atol=1e-4)


@pytest.mark.parametrize(
    "name, side, names",
    [
        ("cifar10", 32, "abcdefghij"),
        ("svhn_cropped", 32, "0123456789"),
        ("imagenet_resized/64x64", 64, None),
        ("places365_small", 256, None),
    ],
)
def test_official_sets_are_prepared_from_class_folders(tmp_path, name, side, names):
    x, y = digit_images(side=side, channels=3, n=40)
    spec = datasets.specs()[name]
    names = names or tfds_records.class_names(spec)[5:15]
    write_class_folders(tmp_path / "from" / "train", x[:30], y[:30], names)
    folder_names = [name.replace("/", "-") for name in names]  # as in Places' own folders
    write_class_folders(tmp_path / "from" / "test", x[30:40], y[30:40], folder_names)
    root = tmp_path / "root"
    assert datasets.prepare(name, tmp_path / "from", root=root).fresh
    assert datasets.state(name, root) == "prepared"
    source = tfds.data_source(name, data_dir=root, download=False, split="test")
    order = np.argsort([folder_names[label] for label in y[30:40]], kind="stable") + 30
    np.testing.assert_array_equal([record["image"] for record in source], x[order])
    label_of_name = source.dataset_info.features["label"].names.index
    expected_labels = [label_of_name(names[y[i]]) for i in order]
    assert [record["label"] for record in source] == expected_labels
    data = datasets.load(name, root=root)
    np.testing.assert_array_equal(data.splits["test"]["x"], x[order])
    assert data.num_classes == spec.num_classes


def test_a_set_of_ones_own_is_loaded_by_its_name(prepared_once):
    data = datasets.load("mine", root=prepared_once)
    x, y = digit_images()
    kept, held_out = datasets.hold_out(300)
    for split, part in (("train", kept), ("valid", held_out), ("test", np.arange(300, 360))):
        np.testing.assert_array_equal(data.splits[split]["x"], x[part])
        np.testing.assert_array_equal(data.splits[split]["y"], y[part])
    spec = datasets.specs(prepared_once)["mine"]
    assert (spec.shape, spec.num_classes) == ((8, 8, 1), 10)
    assert spec.examples == {"train": 300, "test": 60}


def test_a_prepared_set_is_replaced_only_on_request(root, tmp_path):
    x, y = digit_images()
    parts = {"train": (x[:50, ..., 0], y[:50]), "t10k": (x[50:70, ..., 0], y[50:70])}
    other = write_idx(tmp_path / "other", parts)
    assert not datasets.prepare("mine", other, root=root).fresh
    assert len(datasets.load("mine", root=root).splits["test"]["y"]) == 60
    assert datasets.prepare("mine", other, root=root, overwrite=True).fresh
    assert len(datasets.load("mine", root=root).splits["test"]["y"]) == 20
    assert sorted(path.name for path in root.iterdir()) == [".mine.lock", "mine"]


def test_a_failed_preparation_leaves_the_old_set(root, tmp_path):
    bad = tmp_path / "bad"
    write_class_folders(bad / "train", X[:20], Y[:20], "abcdefghij")
    path = sorted((bad / "train" / "j").iterdir())[-1]  # read after others have been written
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="no readable image") as caught:
        datasets.prepare("mine", bad, root=root, overwrite=True)
    assert str(caught.value).startswith(str(path))
    assert len(datasets.load("mine", root=root).splits["test"]["y"]) == 60
    assert sorted(path.name for path in root.iterdir()) == [".mine.lock", "mine"]


def damage_file(path, damage: str, byte: int, mask: int) -> None:
    """Removes a file, cuts its end off, or flips bits of one byte."""
    payload = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(payload[:-7])
    else:
        payload[byte] ^= mask
        path.write_bytes(payload)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("file", ["mine-train.array_record-00000-of-00001", "features.json"])
def test_damaged_records_are_named_with_the_command(root, damage, file):
    path = root / "mine" / "1.0.0" / file
    damage_file(path, damage, byte=path.stat().st_size // 2, mask=1)
    with pytest.raises(ValueError, match=r"has changed since|is missing") as caught:
        datasets.load("mine", root=root)
    assert str(path) in str(caught.value) and PREPARE_AGAIN in str(caught.value)


@pytest.mark.parametrize("file", ["train-x.npy", "test-y.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_arrays_are_decoded_again(root, damage, file):
    expected = datasets.load("mine", root=root)
    folder = root / "mine" / "1.0.0"
    byte = 10 if file == "manifest.json" else -5
    damage_file(folder / decoded_arrays.FOLDER / file, damage, byte=byte, mask=0x80)
    for _ in range(2):
        data = datasets.load("mine", root=root)
        for split, examples in expected.splits.items():
            np.testing.assert_array_equal(data.splits[split]["x"], examples["x"])
            np.testing.assert_array_equal(data.splits[split]["y"], examples["y"])
        assert decoded_arrays.load(folder) is not None


def test_records_without_arrays_are_decoded(root):
    """TensorFlow Datasets itself leaves no arrays."""
    shutil.rmtree(root / "mine" / "1.0.0" / decoded_arrays.FOLDER)
    data = datasets.load("mine", root=root)
    np.testing.assert_array_equal(data.splits["test"]["x"], digit_images()[0][300:360])
    assert data.num_classes == 10


def flip_bit_in_a_block(records: bytes) -> bytes:
    damaged = bytearray(records)
    damaged[len(records) // 5] ^= 1  # not at the end of a block, which is padding
    return bytes(damaged)


@pytest.mark.parametrize(
    "file, change, match",
    [
        (
            "dataset_info.json",
            lambda payload: payload.replace(b"array_record", b"tfrecord"),
            "not in the ArrayRecord format",
        ),
        (
            "features.json",
            lambda payload: payload.replace(b'"image"', b'"scan"', 1),
            "no labelled images, but label, scan",
        ),
        ("features.json", lambda payload: payload.replace(b"{", b"[", 1), "cannot be read"),
        ("mine-train.array_record-00000-of-00001", flip_bit_in_a_block, "cannot be read"),
    ],
)
def test_records_that_cannot_be_decoded_are_named_with_the_command(root, file, change, match):
    folder = root / "mine" / "1.0.0"
    shutil.rmtree(folder / decoded_arrays.FOLDER)
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    with pytest.raises(ValueError, match=match) as caught:
        datasets.load("mine", root=root)
    assert str(folder) in str(caught.value) and PREPARE_AGAIN in str(caught.value)
    assert not (folder / decoded_arrays.FOLDER).exists()


def start_preparation(root, source) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "metaopt", "data", "prepare", "mine"]
    return subprocess.Popen(
        [*arguments, "--from", str(source)],
        env={**os.environ, "METAOPT_DATA_DIR": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def many_images(tmp_path_factory):
    """Files whose preparation takes seconds."""
    x, y = digit_images()
    x, y = np.tile(x[..., 0], (20, 1, 1)), np.tile(y, 20)
    folder = tmp_path_factory.mktemp("many")
    return write_idx(folder, {"train": (x, y), "t10k": (x[:50], y[:50])}, gz=False)


def test_after_a_killed_preparation_the_set_is_absent(tmp_path, many_images):
    root = tmp_path / "root"
    process = start_preparation(root, many_images)
    deadline = time.monotonic() + 120
    while not any(
        path.stat().st_size > 100_000 for path in root.glob(".mine.part-*/**/train-x.npy")
    ):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(root.glob(".mine.part-*"))  # what it left behind
    assert datasets.state("mine", root) == "not prepared"
    with pytest.raises(ValueError, match="unknown data set 'mine'"):
        datasets.load("mine", root=root)
    assert datasets.prepare("mine", write_digits_idx(tmp_path / "again"), root=root).fresh
    assert not list(root.glob(".mine.part-*"))
    assert len(datasets.load("mine", root=root).splits["test"]["y"]) == 60


def test_two_processes_prepare_one_set_once(tmp_path, many_images):
    root = tmp_path / "root"
    processes = [start_preparation(root, many_images) for _ in range(2)]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    was_prepared = sorted("already prepared" in stdout for stdout, _ in outputs)
    assert was_prepared == [False, True], outputs
    test = datasets.load("mine", root=root).splits["test"]
    np.testing.assert_array_equal(test["x"], digit_images(n=50)[0])
    assert sorted(path.name for path in root.iterdir()) == [".mine.lock", "mine"]


def test_a_root_that_cannot_be_written_is_one_line_that_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("METAOPT_DATA_DIR", str(tmp_path / "file" / "data"))
    with pytest.raises(OSError, match=r"cannot be written .*; set METAOPT_DATA_DIR"):
        datasets.prepare("mine", tmp_path)
    assert datasets.load("moons").num_classes == 2  # the others need no folder


def test_a_set_that_was_being_replaced_when_its_process_was_killed_comes_back(tmp_path):
    root, target = tmp_path / "root", tmp_path / "root" / "mine" / "1.0.0"
    target.mkdir(parents=True)
    (target / store.INFO).write_text("old")
    leftover = root / ".mine.part-killed"
    new = leftover / "mine" / "1.0.0"
    new.mkdir(parents=True)
    with pytest.raises(FileNotFoundError):  # the second of the two renames
        store.publish(leftover / "nothing", target, staging=leftover, root=root)
    assert not target.exists()
    with store.lock(root, "mine"), store.staging_folder(root, "mine"):
        assert (target / store.INFO).read_text() == "old"
    assert not leftover.exists()
