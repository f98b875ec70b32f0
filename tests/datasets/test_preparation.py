"""Prepared sets: read by the stock TensorFlow Datasets, whole or not there, damage is seen."""

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
from PIL import Image

from metaopt import datasets
from metaopt.datasets import decoded, png, tfrecords

X, Y = digit_images(side=32, channels=3, n=60)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A prepared set of the user's own: 300 + 60 digits."""
    root = tmp_path_factory.mktemp("data")
    source = write_digits_idx(tmp_path_factory.mktemp("from"))
    datasets.prepare("mine", source, root=root)
    return root, source


@pytest.fixture
def mine(once, tmp_path):
    """A copy of it that may be damaged."""
    shutil.copytree(once[0], tmp_path / "copy")
    return tmp_path / "copy", once[1]


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_png_files_are_read_by_pillow(tmp_path, channels, mode):
    for image in digit_images(side=16, channels=channels)[0][:5, :, 3:]:  # 16 x 13
        (tmp_path / "a.png").write_bytes(png.encode(image))
        with Image.open(tmp_path / "a.png") as opened:
            assert opened.mode == mode
            np.testing.assert_array_equal(np.asarray(opened).reshape(image.shape), image)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_real_images_are_read_by_the_stock_data_source(real_data, name):
    data = real_data(name)
    root = datasets.data_root()
    source = tfds.data_source(name, data_dir=root, download=False, split="test")
    assert len(source) == 10000
    for i in (0, 1, 17, 5000, 9999):
        np.testing.assert_array_equal(source[i]["image"], data.splits["test"]["x"][i])
        assert source[i]["label"] == data.splits["test"]["y"][i]
    kept, held_out = datasets.hold_out(60000)
    source = tfds.data_source(name, data_dir=root, download=False, split="train")
    assert len(source) == 60000
    for split, indices in (("train", kept), ("valid", held_out)):
        for i in (0, 3, len(indices) - 1):
            record = source[int(indices[i])]
            np.testing.assert_array_equal(record["image"], data.splits[split]["x"][i])
            assert record["label"] == data.splits[split]["y"][i]


# Counts and means as published with the files.
REAL = {
    "mnist": ((5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949), 33.3184, 33.7912),
    "fashion_mnist": ((6000,) * 10, 72.9404, 73.1466),
}


@pytest.mark.parametrize("name", REAL)
def test_real_sets_hold_what_is_known_of_them(real_data, name):
    counts, train_mean, test_mean = REAL[name]
    data = real_data(name)
    train, valid, test = (data.splits[split] for split in ("train", "valid", "test"))
    assert {e["x"].dtype for e in data.splits.values()} == {np.dtype(np.uint8)}
    assert data.scale == 1 / 255 and data.num_classes == 10
    assert [len(e["y"]) for e in (train, valid, test)] == [55000, 5000, 10000]
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
def test_official_sets_from_class_folders(tmp_path, name, side, names):
    x, y = digit_images(side=side, channels=3, n=40)
    names = names or tfrecords.class_names(datasets.known()[name])[5:15]
    write_class_folders(tmp_path / "from" / "train", x[:30], y[:30], names)
    written = [name.replace("/", "-") for name in names]  # as Places' own folders have it
    write_class_folders(tmp_path / "from" / "test", x[30:40], y[30:40], written)
    made = datasets.prepare(name, tmp_path / "from", root=tmp_path / "root")
    assert made.fresh and datasets.state(name, tmp_path / "root") == "prepared"
    source = tfds.data_source(name, data_dir=tmp_path / "root", download=False, split="test")
    order = np.argsort([written[label] for label in y[30:40]], kind="stable") + 30
    np.testing.assert_array_equal([record["image"] for record in source], x[order])
    label = source.dataset_info.features["label"].names.index
    assert [r["label"] for r in source] == [label(names[y[i]]) for i in order]
    data = datasets.load(name, root=tmp_path / "root")
    np.testing.assert_array_equal(data.splits["test"]["x"], x[order])
    assert data.num_classes == datasets.known()[name].num_classes


def test_a_set_of_ones_own_is_loaded_by_its_name(once):
    root, _ = once
    data = datasets.load("mine", root=root)
    x, y = digit_images()
    kept, held_out = datasets.hold_out(300)
    for split, part in (("train", kept), ("valid", held_out), ("test", np.arange(300, 360))):
        np.testing.assert_array_equal(data.splits[split]["x"], x[part])
        np.testing.assert_array_equal(data.splits[split]["y"], y[part])
    spec = datasets.known(root)["mine"]
    assert (spec.shape, spec.num_classes) == ((8, 8, 1), 10)
    assert spec.examples == {"train": 300, "test": 60}


def test_a_prepared_set_is_left_alone_unless_told_otherwise(mine, tmp_path):
    root = mine[0]
    x, y = digit_images()
    parts = {"train": (x[:50, ..., 0], y[:50]), "t10k": (x[50:70, ..., 0], y[50:70])}
    other = write_idx(tmp_path / "other", parts)
    assert not datasets.prepare("mine", other, root=root).fresh
    assert len(datasets.load("mine", root=root).splits["test"]["y"]) == 60
    assert datasets.prepare("mine", other, root=root, overwrite=True).fresh
    assert len(datasets.load("mine", root=root).splits["test"]["y"]) == 20
    assert sorted(p.name for p in root.iterdir()) == [".mine.lock", "mine"]


def test_a_failed_preparation_leaves_the_old_set(mine, tmp_path):
    root = mine[0]
    bad = tmp_path / "bad"
    write_class_folders(bad / "train", X[:20], Y[:20], "abcdefghij")
    path = sorted((bad / "train" / "j").iterdir())[-1]  # found bad after others were written
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="no readable image") as caught:
        datasets.prepare("mine", bad, root=root, overwrite=True)
    assert str(caught.value).startswith(str(path))
    assert len(datasets.load("mine", root=root).splits["test"]["y"]) == 60
    assert sorted(p.name for p in root.iterdir()) == [".mine.lock", "mine"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("file", ["mine-train.array_record-00000-of-00001", "features.json"])
def test_damaged_records_are_named_with_the_command(mine, damage, file):
    path = mine[0] / "mine" / "1.0.0" / file
    if damage == "remove":
        path.unlink()
    else:
        payload = bytearray(path.read_bytes())
        payload[len(payload) // 2] ^= 1
        path.write_bytes(payload if damage == "flip" else payload[:-7])
    with pytest.raises(ValueError, match=r"has changed since|is missing") as caught:
        datasets.load("mine", root=mine[0])
    assert str(path) in str(caught.value)
    assert "metaopt data prepare mine --from DIR --overwrite True" in str(caught.value)


@pytest.mark.parametrize("file", ["train-x.npy", "test-y.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_arrays_are_made_again_from_the_records(mine, damage, file):
    root = mine[0]
    expected = datasets.load("mine", root=root)
    path = root / "mine" / "1.0.0" / decoded.FOLDER / file
    if damage == "remove":
        path.unlink()
    else:
        payload = bytearray(path.read_bytes())
        payload[10 if file == "manifest.json" else -5] ^= 0x80
        path.write_bytes(payload if damage == "flip" else payload[:-7])
    for _ in range(2):
        data = datasets.load("mine", root=root)
        for split, examples in expected.splits.items():
            np.testing.assert_array_equal(data.splits[split]["x"], examples["x"])
            np.testing.assert_array_equal(data.splits[split]["y"], examples["y"])
        assert decoded.load(root / "mine" / "1.0.0") is not None


def test_records_that_others_wrote_are_decoded(mine):
    """As TensorFlow Datasets leaves them: without our arrays."""
    root = mine[0]
    shutil.rmtree(root / "mine" / "1.0.0" / decoded.FOLDER)
    data = datasets.load("mine", root=root)
    np.testing.assert_array_equal(data.splits["test"]["x"], digit_images()[0][300:360])
    assert data.num_classes == 10


@pytest.mark.parametrize(
    "file, change, match",
    [
        ("dataset_info.json", (b"array_record", b"tfrecord"), "not in the ArrayRecord format"),
        ("features.json", (b'"image"', b'"scan"', 1), "no labelled images, but label, scan"),
        ("features.json", (b"{", b"[", 1), "cannot be read"),
        ("mine-train.array_record-00000-of-00001", None, "cannot be read"),
    ],
)
def test_records_of_others_that_cannot_be_read_are_named(mine, file, change, match):
    folder = mine[0] / "mine" / "1.0.0"
    shutil.rmtree(folder / decoded.FOLDER)
    payload = bytearray((folder / file).read_bytes())
    if change is None:
        payload[len(payload) // 5] ^= 1  # a block's end is padded
    (folder / file).write_bytes(payload.replace(*change) if change else payload)
    with pytest.raises(ValueError, match=match) as caught:
        datasets.load("mine", root=mine[0])
    assert str(folder) in str(caught.value)
    assert "metaopt data prepare mine --from DIR --overwrite True" in str(caught.value)
    assert not (folder / decoded.FOLDER).exists()


def start(root, source, name="mine"):
    arguments = [sys.executable, "-m", "metaopt", "data", "prepare", name]
    return subprocess.Popen(
        [*arguments, "--from", str(source)],
        env={**os.environ, "METAOPT_DATA_DIR": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def long_work(tmp_path_factory):
    """Files whose preparation takes seconds."""
    x, y = digit_images()
    x, y = np.tile(x[..., 0], (20, 1, 1)), np.tile(y, 20)
    folder = tmp_path_factory.mktemp("long")
    return write_idx(folder, {"train": (x, y), "t10k": (x[:50], y[:50])}, gz=False)


def test_a_killed_preparation_is_not_taken_for_a_whole_one(tmp_path, long_work):
    root = tmp_path / "root"
    process = start(root, long_work)
    deadline = time.monotonic() + 120
    while not any(f.stat().st_size > 100_000 for f in root.glob(".mine.part-*/**/train-x.npy")):
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


def test_two_processes_prepare_one_set_once(tmp_path, long_work):
    root = tmp_path / "root"
    processes = [start(root, long_work) for _ in range(2)]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    said = sorted("already prepared" in out for out, _ in outputs)
    assert said == [False, True], outputs
    test = datasets.load("mine", root=root).splits["test"]
    np.testing.assert_array_equal(test["x"], digit_images(n=50)[0])
    assert sorted(p.name for p in root.iterdir()) == [".mine.lock", "mine"]
