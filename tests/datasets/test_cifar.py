"""The reader of CIFAR's binary versions, on small files of the same format."""

import numpy as np
import pytest
from dataset_files import assert_holds, digit_images, read_all

from metaopt.datasets import cifar

X, Y = digit_images(side=32, channels=3)


def cifar_rows(part: slice, *labels: np.ndarray) -> bytes:
    """Rows of label bytes, then 1024 red, 1024 green and 1024 blue ones, row by row."""
    rows = []
    for image, *row_labels in zip(X[part], *labels, strict=True):
        rows.append(bytes(row_labels))
        rows.extend(image[:, :, channel].tobytes() for channel in range(3))
    return b"".join(rows)


@pytest.fixture
def cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i in range(5):
        part = slice(10 * i, 10 * i + 10)
        (folder / f"data_batch_{i + 1}.bin").write_bytes(cifar_rows(part, Y[part]))
    (folder / "test_batch.bin").write_bytes(cifar_rows(slice(50, 60), Y[50:60]))
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    return tmp_path


def test_cifar10_is_read_as_it_was_written(cifar10):
    image_set, examples = read_all(cifar, cifar10, "cifar10")
    assert_holds(examples["train"], X[:50], Y[:50])
    assert_holds(examples["test"], X[50:60], Y[50:60])
    assert image_set.class_names == tuple("abcdefghij")


def test_cifar100_has_two_labels(tmp_path):
    fine = Y[:30] * 9
    (tmp_path / "train.bin").write_bytes(cifar_rows(slice(0, 20), Y[:20], fine[:20]))
    (tmp_path / "test.bin").write_bytes(cifar_rows(slice(20, 30), Y[20:30], fine[20:]))
    _, examples = read_all(cifar, tmp_path, "cifar100")
    assert_holds(examples["train"], X[:20], fine[:20])
    coarse = [example.extra["coarse_label"] for example in examples["test"]]
    assert coarse == Y[20:30].tolist()


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda path: path.unlink(), "data_batch_3.bin is missing"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            "not a whole number of 3073-byte rows",
        ),
        (lambda path: path.write_bytes(b""), "not a whole number of 3073-byte rows"),
        (lambda path: path.write_bytes(b"\x63" * 3073), "label 99, but cifar10 has 10 classes"),
    ],
)
def test_a_bad_cifar_file_is_named(cifar10, change, match):
    change(cifar10 / "cifar-10-batches-bin" / "data_batch_3.bin")
    with pytest.raises(ValueError, match=match):
        read_all(cifar, cifar10, "cifar10")


@pytest.mark.parametrize(
    "name, files",
    [("cifar10", ("data_batch_1", "test_batch")), ("cifar100", ("train", "test", "meta"))],
)
def test_pickles_are_refused(tmp_path, name, files):
    for file in files:
        (tmp_path / file).write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(ValueError, match=r"pickles, which can run code; get the binary version"):
        read_all(cifar, tmp_path, name)
