"""Readers of the other official files, on small files of the same formats."""

import gzip
import io
import zipfile

import numpy as np
import pytest
from dataset_files import digit_images, write_class_folders
from PIL import Image
from scipy.io import savemat

from metaopt.datasets import cifar, folders, svhn
from metaopt.datasets.sources import open_source
from metaopt.datasets.specs import SPECS, own_spec

X, Y = digit_images(side=32, channels=3)


def read(reader, path, name):
    with open_source(path) as files:
        reading = reader.read(files, SPECS.get(name) or own_spec(name))
        return reading, {split: list(e.rows()) for split, e in reading.splits.items()}


def assert_holds(rows, images, labels):
    np.testing.assert_array_equal(np.stack([row.image for row in rows]), images)
    np.testing.assert_array_equal([row.label for row in rows], labels)


def cifar_rows(part, *labels):
    """Label bytes, then 1024 red, 1024 green and 1024 blue ones, row by row."""
    return b"".join(
        bytes(row) + b"".join(image[:, :, c].tobytes() for c in range(3))
        for image, *row in zip(X[part], *labels, strict=True)
    )


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


def test_cifar10_binary_version(cifar10):
    reading, rows = read(cifar, cifar10, "cifar10")
    assert_holds(rows["train"], X[:50], Y[:50])
    assert_holds(rows["test"], X[50:60], Y[50:60])
    assert reading.class_names == tuple("abcdefghij")


def test_cifar100_binary_version_has_two_labels(tmp_path):
    fine = Y[:30] * 9
    (tmp_path / "train.bin").write_bytes(cifar_rows(slice(0, 20), Y[:20], fine[:20]))
    (tmp_path / "test.bin").write_bytes(cifar_rows(slice(20, 30), Y[20:30], fine[20:]))
    _, rows = read(cifar, tmp_path, "cifar100")
    assert_holds(rows["train"], X[:20], fine[:20])
    assert [row.extra["coarse_label"] for row in rows["test"]] == Y[20:30].tolist()


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda path: path.unlink(), "data_batch_3.bin is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "no whole number of rows of 3073"),
        (lambda path: path.write_bytes(b""), "no whole number of rows of 3073"),
        (lambda path: path.write_bytes(b"\x63" * 3073), "label 99, but cifar10 has 10 classes"),
    ],
)
def test_bad_cifar_files_are_named(cifar10, change, match):
    change(cifar10 / "cifar-10-batches-bin" / "data_batch_3.bin")
    with pytest.raises(ValueError, match=match):
        read(cifar, cifar10, "cifar10")


@pytest.mark.parametrize(
    "name, files",
    [("cifar10", ("data_batch_1", "test_batch")), ("cifar100", ("train", "test", "meta"))],
)
def test_pickles_are_refused(tmp_path, name, files):
    for file in files:
        (tmp_path / file).write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(ValueError, match=r"pickles, which can run code; get the binary version"):
        read(cifar, tmp_path, name)


def write_svhn(folder, split, part):
    labels = np.where(Y[part] == 0, 10, Y[part])[:, None]  # MATLAB's digit 0 is 10
    arrays = {"X": np.moveaxis(X[part], 0, -1), "y": labels}
    savemat(folder / f"{split}_32x32.mat", arrays, do_compression=True)


def test_svhn_matlab_files(tmp_path):
    write_svhn(tmp_path, "train", slice(0, 40)), write_svhn(tmp_path, "test", slice(40, 60))
    _, rows = read(svhn, tmp_path, "svhn_cropped")
    assert_holds(rows["train"], X[:40], Y[:40])
    assert_holds(rows["test"], X[40:60], Y[40:60])


@pytest.mark.parametrize(
    "payload, match",
    [(b"", "damaged"), (None, "test_32x32.mat is missing"), ("cut", "damaged"), ("y", "labels")],
)
def test_bad_svhn_files_are_named(tmp_path, payload, match):
    write_svhn(tmp_path, "train", slice(0, 40)), write_svhn(tmp_path, "test", slice(40, 60))
    path = tmp_path / "test_32x32.mat"
    if payload is None:
        path.unlink()
    elif payload == "y":
        savemat(path, {"X": np.moveaxis(X[:5], 0, -1), "y": np.zeros((5, 1), np.uint8)})
    else:
        path.write_bytes(path.read_bytes()[:2000] if payload == "cut" else payload)
    with pytest.raises(ValueError, match=match) as caught:
        read(svhn, tmp_path, "svhn_cropped")
    assert path.name in str(caught.value)


def test_class_folders_with_three_splits(tmp_path):
    names = [f"digit-{i}" for i in range(10)]
    for split, part in (("train", slice(0, 60)), ("val", slice(60, 80)), ("test", slice(80, 90))):
        write_class_folders(tmp_path / split, X[part], Y[part], names)
    (tmp_path / "train" / ".DS_Store").write_bytes(b"no image")
    reading, rows = read(folders, tmp_path, "mine")
    assert reading.class_names == tuple(names) and reading.shape == (32, 32, 3)
    for split, part in (
        ("train", slice(0, 60)),
        ("validation", slice(60, 80)),
        ("test", slice(80, 90)),
    ):
        order = np.argsort(Y[part], kind="stable")  # folders come in the order of their names
        assert_holds(rows[split], X[part][order], Y[part][order])


def test_classes_without_a_train_folder(tmp_path):
    write_class_folders(tmp_path / "some" / "set", X[:30], Y[:30], "abcdefghij")
    reading, rows = read(folders, tmp_path, "mine")
    assert reading.class_names == tuple("abcdefghij")
    assert set(rows) == {"train"} and len(rows["train"]) == 30


def test_labels_of_official_sets_are_the_official_ones(tmp_path):
    """Two classes of ImageNet, whose folders are sorted otherwise than its labels."""
    wnids = ["n02119789", "n02100735"]  # labels 0 and 1 in TensorFlow Datasets
    write_class_folders(tmp_path / "train", X[:20], Y[:20] % 2, wnids)
    reading, rows = read(folders, tmp_path, "imagenet_resized/32x32")
    assert len(reading.class_names) == 1000
    assert [row.label for row in rows["train"]] == [1] * 10 + [0] * 10


@pytest.mark.parametrize(
    "path, match",
    [
        ("test/digt-1/a.png", r"'digt-1' is none of the 10 classes \(digit-1"),
        ("train/a.png", "in no class folder"),
        ("other/digit-1/a.png", "in no class folder"),
    ],
)
def test_an_image_in_the_wrong_place_is_named(tmp_path, path, match):
    write_class_folders(tmp_path / "train", X[:20], Y[:20], [f"digit-{i}" for i in range(10)])
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(X[0]).save(tmp_path / path)
    with pytest.raises(ValueError, match=match):
        read(folders, tmp_path, "mine")


def test_images_of_one_kind(tmp_path):
    gray, y = digit_images(side=32)
    write_class_folders(tmp_path / "train", gray[:20], y[:20], "abcdefghij")
    reading, _ = read(folders, tmp_path, "mine")
    assert reading.shape == (32, 32, 1)
    Image.fromarray(X[0]).save(tmp_path / "train" / "b" / "z.png")
    with pytest.raises(ValueError, match=r"b/z.png: a colour image"):
        read(folders, tmp_path, "mine")


def jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture(params=["zip", "folder"])
def tiny_imagenet(request, tmp_path):
    """The layout of tiny-imagenet-200 with 200 classes, one or two images each."""
    images, _ = digit_images(side=64, channels=3)
    path, top = tmp_path / "tiny-imagenet-200.zip", "tiny-imagenet-200"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(220):
            wnid = f"n{i % 200:08d}"
            # Some of the real images are gray.
            image = images[i] if i else images[i, :, :, 0]
            archive.writestr(f"{top}/train/{wnid}/images/{wnid}_{i}.JPEG", jpeg(image))
            archive.writestr(f"{top}/train/{wnid}/{i}_boxes.txt", "0\t0\t62\t62\n")
        lines = []
        for i in range(8):
            archive.writestr(f"{top}/val/images/val_{i}.JPEG", jpeg(images[300 + i]))
            archive.writestr(f"{top}/test/images/test_{i}.JPEG", jpeg(images[400 + i]))
            lines.append(f"val_{i}.JPEG\tn{100 + i:08d}\t0\t32\t44\t62\n")
        archive.writestr(f"{top}/val/val_annotations.txt", "".join(lines))
    if request.param == "zip":
        return path, images
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked")
    return tmp_path / "unpacked", images


def test_tiny_imagenet_from_its_zip_and_from_its_folder(tiny_imagenet):
    path, images = tiny_imagenet
    reading, rows = read(folders, path, "tiny_imagenet")
    assert set(rows) == {"train", "validation"} and len(reading.class_names) == 200
    assert [row.label for row in rows["validation"]] == list(range(100, 108))
    decoded = np.stack([row.image for row in rows["validation"]]).astype(int)
    assert np.abs(decoded - images[300:308]).mean() < 6  # JPEG keeps the digits, not each pixel
    assert sorted(row.label for row in rows["train"])[:4] == [0, 0, 1, 1]
    assert rows["train"][0].image.shape == (64, 64, 3)


def test_gzip_of_an_image_is_no_image(tmp_path):
    write_class_folders(tmp_path / "train", X[:20], Y[:20], "abcdefghij")
    path = tmp_path / "train" / "a" / "00000.png"
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match="no readable image"):
        read(folders, tmp_path, "mine")
