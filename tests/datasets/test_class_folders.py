"""The reader of images in class folders: splits, labels, Tiny ImageNet's layout, bad images."""

import gzip
import io
import os
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


def put(folder, name, image, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def plain(value, mode="L"):
    return Image.fromarray(np.full((8, 8), value, np.uint8)).convert(mode)


def labelled(folder):
    """Class name -> images, of training."""
    image_set, examples = read_all(class_folders, folder)
    found = {}
    for example in examples["train"]:
        found.setdefault(image_set.class_names[example.label], []).append(example.image)
    return found


def test_images_of_16_bits_keep_their_values(tmp_path):
    deep = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    for number, name in enumerate(("x.png", "y.tif", "z.pgm")):
        put(tmp_path, f"train/{'abc'[number]}/{name}", Image.fromarray(deep))
    put(tmp_path, "train/d/plain.png", plain(7))
    found = labelled(tmp_path)
    for name in "abc":
        np.testing.assert_array_equal(found[name][0][..., 0], deep >> 8)
    assert (found["d"][0] == 7).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "jfif", "bmp", "gif", "tif", "webp"])
def test_formats_of_images_are_read(tmp_path, suffix):
    options = {"format": "JPEG"} if suffix == "jfif" else {}
    options |= {"lossless": True} if suffix == "webp" else {}
    for name, value in (("a", 10), ("b", 200)):
        put(tmp_path, f"train/{name}/x.{suffix}", plain(value, "RGB"), **options)
    found = labelled(tmp_path)
    assert abs(int(found["a"][0].max()) - 10) < 3 and abs(int(found["b"][0].min()) - 200) < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_camera_says(tmp_path, orientation):
    shown = Image.fromarray(np.arange(8, dtype=np.uint8).repeat(16).reshape(8, 16) * 30)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # to a transposition of Pillow
    stored = shown.transpose(Image.Transpose(back[orientation])) if orientation > 1 else shown
    exif = Image.Exif()
    exif[0x0112] = orientation
    put(tmp_path, "train/a/0.jpg", stored, exif=exif, quality=100)
    put(tmp_path, "train/b/0.png", stored, exif=exif)
    found = labelled(tmp_path)
    for name in "ab":
        assert found[name][0].shape == (8, 16, 1)
        difference = found[name][0][..., 0].astype(int) - np.asarray(shown)
        assert np.abs(difference).max() < 8, name


@pytest.mark.parametrize("names", [("Train", "Test"), ("TRAINING", "Testing"), ("train", "VALID")])
def test_folders_of_splits_have_any_case(tmp_path, names):
    for name in names:
        for cls in "ab":
            put(tmp_path, f"{name}/{cls}/x.png", plain(1))
    image_set, examples = read_all(class_folders, tmp_path)
    assert image_set.class_names == ("a", "b") and len(examples) == 2 and "train" in examples


def test_a_folder_in_a_class_folder_belongs_to_this_class(tmp_path):
    put(tmp_path, "train/cat-black/0.png", plain(1))
    put(tmp_path, "train/cat/black/0.png", plain(2))
    found = labelled(tmp_path)
    assert [image.max() for image in found["cat"]] == [2]
    assert [image.max() for image in found["cat-black"]] == [1]


def half_transparent(mode):
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[0, 0, 3] = 0
    return Image.fromarray(pixels).convert(mode)


def animated(folder):
    frames = [plain(value) for value in (1, 200)]
    put(folder, "train/a/z.gif", frames[0], save_all=True, append_images=frames[1:])


SILENT = {
    "an animation": (animated, r"train/a/z\.gif: holds 2 frames"),
    "transparency": (
        lambda f: put(f, "train/a/z.png", half_transparent("RGBA")),
        r"train/a/z\.png: has transparent pixels",
    ),
    "a transparent colour": (
        lambda f: put(f, "train/a/z.png", plain(0), transparency=0),
        r"train/a/z\.png: has transparent pixels",
    ),
    "floats": (
        lambda f: put(f, "train/a/z.tif", plain(0, "F")),
        r"train/a/z\.tif: its pixels are of the mode F",
    ),
    "an empty class folder": (
        lambda f: (f / "train" / "c").mkdir(),
        "train/c: a class folder without an image",
    ),
    "a class of images that cannot be read": (
        lambda f: put(f, "train/c/z.jp2", plain(0)),
        "train/c: a class folder without an image",
    ),
    "an image that cannot be read among others": (
        lambda f: (f / "train" / "a" / "z.heic").write_bytes(b"x"),
        r"train/a/z\.heic: neither an image that can be read",
    ),
    "an empty class folder of another split": (
        lambda f: (f / "test" / "a").mkdir(parents=True),
        "test/a: a class folder without an image",
    ),
    "two folders of one split": (
        lambda f: [put(f, f"{name}/a/z.png", plain(0)) for name in ("val", "valid")],
        "both val and valid are folders of the split validation",
    ),
    "no folder of training": (
        lambda f: [(f / "train").rename(f / "x"), put(f, "test/a/z.png", plain(0))],
        "holds the folder test, but no folder train",
    ),
    "a pipe": (lambda f: os.mkfifo(f / "train" / "a" / "z.png"), r"z\.png: a pipe or a device"),
}


@pytest.mark.parametrize("case", SILENT)
def test_what_would_be_other_data_is_refused_by_name(tmp_path, case):
    for name in "ab":
        put(tmp_path, f"train/{name}/0.png", plain(0, "RGB"))
        (tmp_path / "train" / name / "notes.txt").write_text("a note")
    change, match = SILENT[case]
    change(tmp_path)
    with pytest.raises(ValueError, match=match):
        read_all(class_folders, tmp_path)


def test_opaque_images_with_an_alpha_channel_are_images(tmp_path):
    put(tmp_path, "train/a/0.png", plain(9, "RGBA"))
    put(tmp_path, "train/b/0.png", plain(9, "LA"))
    assert {name: images[0].max() for name, images in labelled(tmp_path).items()} == {
        "a": 9,
        "b": 9,
    }


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path, "train/a/0.png", plain(9))
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"train/a: cannot be read \(Permission denied\)"):
        read_all(class_folders, tmp_path)


def spoil_zip(path, change):
    """Changes the central and the local header of the only entry."""
    payload = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        change(payload, payload.find(signature) + flags)
    path.write_bytes(payload)


ZIPS = {
    "encrypted": (lambda b, at: b.__setitem__(at, b[at] | 1), "'train/a/0.png' is encrypted"),
    "deflate64": (lambda b, at: b.__setitem__(at + 2, 9), "compressed by method 9, which is not"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_a_zip_file_that_cannot_be_unpacked_is_refused(tmp_path, case):
    path, (change, match) = tmp_path / "x.zip", ZIPS[case]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train/a/0.png", b"x" * 50)
    spoil_zip(path, change)
    with pytest.raises(ValueError, match=match):
        read_all(class_folders, path)


def test_an_empty_class_folder_in_a_zip_file_is_found_too(tmp_path):
    buffer = io.BytesIO()
    plain(1).save(buffer, "PNG")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("train/a/0.png", buffer.getvalue())
        archive.writestr("train/b/", b"")
    with pytest.raises(ValueError, match="train/b: a class folder without an image"):
        read_all(class_folders, tmp_path / "x.zip")
