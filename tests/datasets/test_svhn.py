"""The reader of SVHN's MATLAB files, on small files of the same format."""

import numpy as np
import pytest
from dataset_files import assert_holds, digit_images, read_all
from scipy.io import savemat

from metaopt.datasets import svhn

X, Y = digit_images(side=32, channels=3)


@pytest.fixture
def svhn_files(tmp_path):
    for split, part in (("train", slice(0, 40)), ("test", slice(40, 60))):
        labels = np.where(Y[part] == 0, 10, Y[part])[:, None]  # SVHN's label of the digit 0 is 10
        arrays = {"X": np.moveaxis(X[part], 0, -1), "y": labels}
        savemat(tmp_path / f"{split}_32x32.mat", arrays, do_compression=True)
    return tmp_path


def test_svhn_is_read_as_it_was_written(svhn_files):
    _, examples = read_all(svhn, svhn_files, "svhn_cropped")
    assert_holds(examples["train"], X[:40], Y[:40])
    assert_holds(examples["test"], X[40:60], Y[40:60])


def empty(path):
    path.write_bytes(b"")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:2000])


def label_zero(path):
    savemat(path, {"X": np.moveaxis(X[:5], 0, -1), "y": np.zeros((5, 1), np.uint8)})


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda path: path.unlink(), "test_32x32.mat is missing"),
        (empty, "damaged"),
        (cut_short, "damaged"),
        (label_zero, "labels"),
    ],
)
def test_a_bad_svhn_file_is_named(svhn_files, change, match):
    path = svhn_files / "test_32x32.mat"
    change(path)
    with pytest.raises(ValueError, match=match) as caught:
        read_all(svhn, svhn_files, "svhn_cropped")
    assert path.name in str(caught.value)
