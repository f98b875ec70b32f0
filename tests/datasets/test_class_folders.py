"""The reader of images in class folders: splits, labels, Tiny ImageNet's layout, bad images."""

import gzip
import io
import zipfile

import numpy as np
import pytest
from dataset_files import assert_holds, digit_images, read_all, write_class_folders
from PIL import Image

from metaopt.datasets import class_folders

X, Y = digit_images(side=32, channels=3)


def test_three_splits_are_read_in_the_order_of_their_folders(tmp_path):
    names = [f"digit-{i}" for i in range(10)]
    parts = {"train": slice(0, 60), "val": slice(60, 80), "test": slice(80, 90)}
    for folder, part in parts.items():
        write_class_folders(tmp_path / folder, X[part], Y[part], names)
    (tmp_path / "train" / ".DS_Store").write_bytes(b"not an image")
    image_set, examples = read_all(class_folders, tmp_path)
    assert image_set.class_names == tuple(names) and image_set.shape == (32, 32, 3)
    for split, folder in (("train", "train"), ("validation", "val"), ("test", "test")):
        x, y = X[parts[folder]], Y[parts[folder]]
        order = np.argsort(y, kind="stable")  # folders come in the order of their names
        assert_holds(examples[split], x[order], y[order])


def test_class_folders_without_a_train_folder_are_training_images(tmp_path):
    write_class_folders(tmp_path / "some" / "set", X[:30], Y[:30], "abcdefghij")
    image_set, examples = read_all(class_folders, tmp_path)
    assert image_set.class_names == tuple("abcdefghij")
    assert set(examples) == {"train"} and len(examples["train"]) == 30


def test_official_sets_have_the_labels_of_tensorflow_datasets(tmp_path):
    """Two classes of ImageNet whose folders sort differently from their labels."""
    wnids = ["n02119789", "n02100735"]  # labels 0 and 1 in TensorFlow Datasets
    write_class_folders(tmp_path / "train", X[:20], Y[:20] % 2, wnids)
    image_set, examples = read_all(class_folders, tmp_path, "imagenet_resized/32x32")
    assert len(image_set.class_names) == 1000
    assert [example.label for example in examples["train"]] == [1] * 10 + [0] * 10


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
        read_all(class_folders, tmp_path)


def test_gray_images_have_one_channel_and_colour_among_them_is_refused(tmp_path):
    gray, y = digit_images(side=32)
    write_class_folders(tmp_path / "train", gray[:20], y[:20], "abcdefghij")
    image_set, _ = read_all(class_folders, tmp_path)
    assert image_set.shape == (32, 32, 1)
    Image.fromarray(X[0]).save(tmp_path / "train" / "b" / "z.png")
    with pytest.raises(ValueError, match=r"b/z.png: a colour image"):
        read_all(class_folders, tmp_path)


def test_a_compressed_image_is_no_image(tmp_path):
    write_class_folders(tmp_path / "train", X[:20], Y[:20], "abcdefghij")
    path = tmp_path / "train" / "a" / "00000.png"
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match="no readable image"):
        read_all(class_folders, tmp_path)


def jpeg(image: np.ndarray) -> bytes:
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


def test_tiny_imagenet_is_read_from_its_zip_and_from_its_folder(tiny_imagenet):
    path, images = tiny_imagenet
    image_set, examples = read_all(class_folders, path, "tiny_imagenet")
    assert set(examples) == {"train", "validation"} and len(image_set.class_names) == 200
    assert [example.label for example in examples["validation"]] == list(range(100, 108))
    decoded = np.stack([example.image for example in examples["validation"]]).astype(int)
    assert np.abs(decoded - images[300:308]).mean() < 6  # JPEG keeps the digits, not each pixel
    assert sorted(example.label for example in examples["train"])[:4] == [0, 0, 1, 1]
    assert examples["train"][0].image.shape == (64, 64, 3)
