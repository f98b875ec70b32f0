"""IDX files are read exactly; messages on missing, damaged or other files say what to do."""

import gzip
import re

import numpy as np
import pytest
from dataset_files import assert_holds, digit_images, idx_bytes, read_all, write_digits_idx

from metaopt.datasets import hold_out, idx, prepare

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize("gz", [True, False])
def test_arrays_are_read_as_they_were_written(tmp_path, gz):
    image_set, examples = read_all(idx, write_digits_idx(tmp_path, gz=gz))
    x, y = digit_images()
    assert_holds(examples["train"], x[:300], y[:300])
    assert_holds(examples["test"], x[300:360], y[300:360])
    assert image_set.shape == (8, 8, 1) and image_set.class_names == tuple("0123456789")


def test_other_usual_names_are_found_below_the_folder(tmp_path):
    folder = write_digits_idx(tmp_path / "raw", gz=False)
    (folder / IMAGES).rename(folder / "train-images.idx3-ubyte")
    (folder / "t10k-labels-idx1-ubyte").rename(folder / "test-labels.idx1-ubyte")
    _, examples = read_all(idx, tmp_path)
    assert len(examples["test"]) == 60


def flip(payload: bytes, at: int) -> bytes:
    return payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :]


@pytest.mark.parametrize(
    "name, change, match",
    [
        (IMAGES, lambda b: b[:-1], "cut short"),
        (IMAGES, lambda b: b[:9], "cut short: no whole header"),
        (IMAGES, lambda b: b + b"\0", "longer than its header announces"),
        (IMAGES, lambda b: b"PK\3\4" + b[4:], "begins with 0x504b0304, IDX images begin with 0x0"),
        (LABELS, lambda b: flip(b, 3), "begins with 0x00000800, IDX labels"),
        # 2^96 bytes, and 2 GiB from 2 kB: refused before memory is taken.
        (IMAGES, lambda b: b[:4] + b"\xff" * 12 + b[16:], "cannot hold"),
        (IMAGES, lambda b: b[:4] + b"\0\0\0\x08" + b"\0\0\x40\0" * 2 + b[16:2016], "cannot hold"),
        (LABELS, lambda b: idx_bytes(np.zeros(299, np.uint8)), "299 labels for the 300 images"),
    ],
)
@pytest.mark.parametrize("gz", [True, False])
def test_a_file_that_is_not_what_it_says_is_named(tmp_path, name, change, match, gz):
    folder = write_digits_idx(tmp_path, gz=gz)
    path = folder / (f"{name}.gz" if gz else name)
    if gz:
        path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(match)) as caught:
        read_all(idx, folder)
    message = str(caught.value)
    assert str(path) in message
    assert "download the file again" in message or "download both files again" in message


@pytest.mark.parametrize(
    "change", [lambda b: b[:-20], lambda b: flip(b, len(b) // 2), lambda b: b"not gzip"]
)
def test_a_damaged_gzip_file_is_named(tmp_path, change):
    path = write_digits_idx(tmp_path) / f"{IMAGES}.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged or cut short") as caught:
        read_all(idx, tmp_path)
    assert str(path) in str(caught.value) and "metaopt data prepare mine" in str(caught.value)


def test_the_message_on_a_missing_file_gives_the_command(tmp_path):
    folder = write_digits_idx(tmp_path)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte") as caught:
        read_all(idx, folder, "mnist")
    assert f"`metaopt data prepare mnist --from {folder}` again" in str(caught.value)


def test_two_files_of_one_name_are_ambiguous(tmp_path):
    write_digits_idx(tmp_path / "a")
    write_digits_idx(tmp_path / "b")
    with pytest.raises(ValueError, match=re.escape(f"a/{IMAGES}.gz and b/{IMAGES}.gz")):
        read_all(idx, tmp_path)


def test_other_images_are_not_accepted_as_mnist(tmp_path):
    with pytest.raises(ValueError, match="not the official content of mnist") as caught:
        prepare("mnist", write_digits_idx(tmp_path / "from"), root=tmp_path / "root")
    assert f"{IMAGES}.gz" in str(caught.value) and "download the file again" in str(caught.value)


@pytest.fixture(scope="module")
def official_mnist(real_data, tmp_path_factory):
    """The four official files without gzip, put together again from the prepared set."""
    splits = real_data("mnist").splits
    kept, held_out = hold_out(60000)
    train_x, train_y = np.empty((60000, 28, 28, 1), np.uint8), np.empty(60000, np.uint8)
    for split, where in (("train", kept), ("valid", held_out)):
        train_x[where], train_y[where] = splits[split]["x"], splits[split]["y"]
    folder = tmp_path_factory.mktemp("official")
    test_x, test_y = np.asarray(splits["test"]["x"]), np.asarray(splits["test"]["y"], np.uint8)
    for stem, x, y in (("train", train_x, train_y), ("t10k", test_x, test_y)):
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(x[..., 0]))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(y))
    return folder


def test_the_official_content_is_recognised_by_its_sha256(official_mnist):
    image_set, examples = read_all(idx, official_mnist, "mnist")
    assert "sha256" in image_set.note
    assert len(examples["train"]) == 60000 and len(examples["test"]) == 10000


def test_one_flipped_bit_of_the_real_images_is_detected(official_mnist):
    path = official_mnist / "t10k-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes(flip(whole, 4_000_000))
    with pytest.raises(ValueError, match="not the official content of mnist") as caught:
        read_all(idx, official_mnist, "mnist")
    path.write_bytes(whole)
    assert str(path) in str(caught.value)


def test_the_files_of_another_set_are_recognised(official_mnist):
    with pytest.raises(ValueError, match="this is mnist; run `metaopt data prepare mnist"):
        read_all(idx, official_mnist, "fashion_mnist")
