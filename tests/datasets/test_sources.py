"""Folders and zip files cannot lead out of themselves, nor exhaust the memory."""

import os
import re
import stat
import zipfile

import numpy as np
import pytest
from dataset_files import digit_images, write_class_folders
from PIL import Image

from metaopt.datasets import prepare


def prepare_mine(source, tmp_path):
    return prepare("mine", source, root=tmp_path / "root")


@pytest.fixture
def images(tmp_path):
    x, y = digit_images()
    write_class_folders(tmp_path / "from" / "train", x[:20], y[:20], "0123456789")
    return tmp_path / "from"


@pytest.mark.parametrize("folder", [False, True])
def test_symbolic_links_are_refused(images, tmp_path, folder):
    (tmp_path / "secret").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "secret" / "x.png")
    target = tmp_path / "secret" if folder else tmp_path / "secret" / "x.png"
    link = images / "train" / ("10" if folder else "0/link.png")
    os.symlink(target, link)
    with pytest.raises(ValueError, match=re.escape(f"{link}: a symbolic link")):
        prepare_mine(images, tmp_path)


def write_zip(path, *entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, payload in entries:
            archive.writestr(name, payload)
    return path


@pytest.mark.parametrize("name", ["../train/0/a.png", "/train/0/a.png", "train/../../0/a.png"])
def test_entries_that_lead_out_of_the_archive_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="leads out of the archive"):
        prepare_mine(write_zip(tmp_path / "a.zip", (name, b"x")), tmp_path)


def test_a_link_in_an_archive_is_refused(tmp_path):
    link = zipfile.ZipInfo("train/0/a.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(ValueError, match="is a symbolic link"):
        prepare_mine(write_zip(tmp_path / "a.zip", (link, b"/etc/passwd")), tmp_path)


def test_an_archive_that_expands_too_much_is_refused(tmp_path):
    bomb = write_zip(tmp_path / "a.zip", ("train/0/a.png", bytes(20_000_000)))
    with pytest.raises(ValueError, match="would expand to 20000000"):
        prepare_mine(bomb, tmp_path)


def test_an_image_of_unexpected_size_is_refused_before_it_is_decoded(images, tmp_path):
    huge = images / "train" / "9" / "zzz.png"
    Image.new("1", (6000, 6000)).save(huge)  # a few kB that would be 36 MB
    with pytest.raises(ValueError, match=r"zzz.png: 6000x6000 pixels, expected 8x8"):
        prepare_mine(images, tmp_path)


@pytest.mark.parametrize("change", [lambda png: png[:60], lambda png: b"GIF89a" + png[6:]])
def test_an_unreadable_image_is_named(images, tmp_path, change):
    path = next((images / "train" / "3").iterdir())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(f"{path}: no readable image")):
        prepare_mine(images, tmp_path)


def test_a_source_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder or zip file"):
        prepare_mine(tmp_path / "nowhere", tmp_path)
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"a.npy: neither a folder nor a zip file"):
        prepare_mine(tmp_path / "a.npy", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds nothing that mine can be made of"):
        prepare_mine(tmp_path / "empty", tmp_path)


@pytest.mark.parametrize("name", ["../mine", "/mine", "Mine", "", "a/b/c", ".mine"])
def test_a_name_cannot_lead_out_of_the_data_folder(images, tmp_path, name):
    with pytest.raises(ValueError, match="use lower-case letters"):
        prepare(name, images, root=tmp_path / "root")
    assert not (tmp_path / "root").exists()
