"""The archives of official data sets: damaged, foreign, or made of pickles."""

import os
import struct
import zlib

import numpy as np
from dataset_files import write_digits_idx
from refusals import bad_inputs, bomb, refused

from metaopt import datasets

MARKER = "executed"


def files(**content):
    def make(folder):
        for name, payload in content.items():
            payload = payload(folder) if callable(payload) else payload
            (folder / name.replace("__", ".")).write_bytes(payload)

    return make


def cifar10(row=3073, rows=2, label=0):
    payload = (bytes([label]) + b"\0" * (row - 1)) * rows
    names = [f"data_batch_{i}__bin" for i in range(1, 6)] + ["test_batch__bin"]
    return dict.fromkeys(names, payload)


def mat(**arrays):
    from scipy.io import savemat

    def make(folder):
        savemat(folder / "made.mat", arrays)
        payload = (folder / "made.mat").read_bytes()
        (folder / "made.mat").unlink()
        return payload

    return make


def mat_bomb(folder):
    """0.1 MB that unpack to 100 MB, in an element that is not even asked for."""
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    stream = zlib.compress(b"\0" * (100 << 20), 9)
    return header + struct.pack("<II", 15, len(stream)) + stream


GOOD_X, GOOD_Y = np.zeros((32, 32, 3, 2), np.uint8), np.array([[1], [10]])
SVHN = {"train_32x32__mat": mat(X=GOOD_X, y=GOOD_Y)}
ARCHIVES = {
    "cifar10: one batch missing": (
        "cifar10",
        files(**{k: v for k, v in cifar10().items() if "3" not in k}),
        "data_batch_3.bin is missing",
    ),
    "cifar10: a row cut short": (
        "cifar10",
        files(**{**cifar10(), "data_batch_2__bin": b"\0" * 3072}),
        "data_batch_2.bin: 3072 bytes are not a whole number of 3073-byte rows",
    ),
    "cifar10: label 11": (
        "cifar10",
        files(**cifar10(label=11)),
        "data_batch_1.bin: label 11, but cifar10 has 10 classes",
    ),
    "cifar10: the pickles": (
        "cifar10",
        files(
            **{
                name: lambda folder: bomb(folder.parent / MARKER)
                for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
            }
        ),
        "pickles, which can run code; get the binary version",
    ),
    "svhn: only a training file": (
        "svhn_cropped",
        files(**SVHN),
        "test_32x32.mat is missing",
    ),
    "svhn: no MATLAB file": (
        "svhn_cropped",
        files(**SVHN, test_32x32__mat=b"hello" * 50),
        "test_32x32.mat: damaged",
    ),
    "svhn: a pickle": (
        "svhn_cropped",
        files(**SVHN, test_32x32__mat=lambda folder: bomb(folder.parent / MARKER)),
        "test_32x32.mat: damaged",
    ),
    "svhn: a file cut short": (
        "svhn_cropped",
        files(**SVHN, test_32x32__mat=lambda f: mat(X=GOOD_X, y=GOOD_Y)(f)[:300]),
        "test_32x32.mat: damaged",
    ),
    "svhn: a bomb": (
        "svhn_cropped",
        files(**SVHN, test_32x32__mat=mat_bomb),
        "test_32x32.mat: damaged .*expands more than 100 times",
    ),
    "cifar10: names of 1 TB": (
        "cifar10",
        lambda folder: (
            files(**cifar10(), batches__meta__txt=b"x")(folder),
            os.truncate(folder / "batches.meta.txt", 1 << 40),
        ),
        "batches.meta.txt: its 1099511627776 bytes are too many",
    ),
    "cifar10: names that are no text": (
        "cifar10",
        files(**cifar10(), batches__meta__txt=b"\xff\xfe"),
        "batches.meta.txt: not text in UTF-8",
    ),
    "cifar10: a batch of 13 GB": (
        "cifar10",
        lambda folder: (
            files(**cifar10())(folder),
            os.truncate(folder / "test_batch.bin", 3073 << 22),
        ),
        "test_batch.bin: its 12889096192 bytes are too many",
    ),
    "svhn: no y": (
        "svhn_cropped",
        files(**SVHN, test_32x32__mat=mat(X=GOOD_X)),
        "test_32x32.mat: damaged",
    ),
    "svhn: floats": (
        "svhn_cropped",
        files(**SVHN, test_32x32__mat=mat(X=GOOD_X * 1.0, y=GOOD_Y)),
        "expected X uint8",
    ),
    "svhn: label 0": (
        "svhn_cropped",
        files(**SVHN, test_32x32__mat=mat(X=GOOD_X, y=GOOD_Y - 1)),
        r"y \[n\] in 1..10",
    ),
    "svhn: fewer labels": (
        "svhn_cropped",
        files(**SVHN, test_32x32__mat=mat(X=GOOD_X, y=GOOD_Y[:1])),
        "and 1 labels",
    ),
    "mnist: other content": (
        "mnist",
        lambda folder: write_digits_idx(folder),
        "not the official content of mnist",
    ),
}


@bad_inputs(ARCHIVES)
def test_bad_archives_are_refused(tmp_path, target, bad, match):
    folder = tmp_path / "files"
    folder.mkdir()
    bad(folder)
    refused(lambda: datasets.prepare(target, folder, root=tmp_path / "root"), match, folder)
    assert not (tmp_path / MARKER).exists()
