"""`metaopt.datasets.prepare` and `load` on files that are damaged, foreign or hostile."""

import gzip
import os
import shutil
import stat
import struct
import zipfile
import zlib

import numpy as np
import pytest
from dataset_files import digit_images, idx_bytes, write_class_folders, write_digits_idx
from PIL import Image
from refusals import bad_inputs, bomb, refused

from metaopt import datasets

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
MARKER = "executed"


@pytest.fixture(scope="module")
def idx_files(tmp_path_factory):
    return write_digits_idx(tmp_path_factory.mktemp("idx"), gz=False, train=40, test=20)


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    x, y = digit_images(n=40)
    for split in ("train", "test"):
        write_class_folders(folder / split, x[:20], y[:20] % 2, ("even", "odd"))
    return folder


def changed(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def header(*fields):
    """Replaces the first big-endian numbers of a file."""
    made = struct.pack(f">{len(fields)}I", *fields)
    return lambda payload: made + payload[len(made) :]


def zipped(change=lambda archive: None, first="train/even/00000.png"):
    """The folder as a zip file (which is what is given), with further entries."""

    def spoil(folder):
        target = folder.with_suffix(".zip")
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(next(iter(sorted(folder.rglob("*ubyte*")))), first)
            change(archive)
        return target

    return spoil


def link_entry(archive):
    entry = zipfile.ZipInfo("train/even/link.png")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(entry, "/etc/passwd")


def linked(name):
    def spoil(folder):
        os.replace(folder / name, folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return spoil


IDX = {
    "images missing": (lambda f: (f / IMAGES).unlink(), f"{IMAGES} .*missing"),
    "images twice": (
        lambda f: shutil.copy(f / IMAGES, f / "train-images.idx3-ubyte"),
        "holds .* and .*give the folder of one",
    ),
    "images empty": (changed(IMAGES, lambda b: b""), f"{IMAGES}: cut short: no whole header"),
    "images without the last byte": (changed(IMAGES, lambda b: b[:-1]), f"{IMAGES}: cut short"),
    "images and one byte more": (changed(IMAGES, lambda b: b + b"x"), f"{IMAGES}: longer than"),
    "images of floats": (changed(IMAGES, header(0x0D03)), "begins with 0x00000d03"),
    "2^96 bytes announced": (changed(IMAGES, header(0x803, *[2**32 - 1] * 3)), "cut short"),
    "no image": (changed(IMAGES, lambda b: idx_bytes(np.zeros((0, 8, 8), np.uint8))), "for the 0"),
    "images of no size": (
        changed(IMAGES, lambda b: idx_bytes(np.zeros((40, 0, 8), np.uint8))),
        f"{IMAGES}: images of no size",
    ),
    "fewer labels": (
        changed(LABELS, lambda b: idx_bytes(np.zeros(7, np.uint8))),
        f"{LABELS}: 7 labels for the 40 images",
    ),
    "test images of another size": (
        changed("t10k-images-idx3-ubyte", lambda b: idx_bytes(np.zeros((20, 4, 4), np.uint8))),
        r"images of \(4, 4\), but those of training are \(8, 8\)",
    ),
    "a pickle": (
        lambda f: (f / IMAGES).write_bytes(bomb(f.parent / MARKER)),
        f"{IMAGES}: begins with 0x8004",
    ),
    "a link": (linked(IMAGES), f"{IMAGES}: a symbolic link"),
    "a link to a folder": (lambda f: (f / "more").symlink_to("/etc"), "more: a symbolic link"),
    "gzip cut short": (
        lambda f: (
            (f / f"{IMAGES}.gz").write_bytes(gzip.compress((f / IMAGES).read_bytes())[:200]),
            (f / IMAGES).unlink(),
        ),
        f"{IMAGES}.gz: (damaged or )?cut short",
    ),
    "gzip of a bomb": (
        lambda f: (
            (f / f"{IMAGES}.gz").write_bytes(gzip.compress(b"\0" * (20 << 20))),
            (f / IMAGES).unlink(),
        ),
        f"{IMAGES}.gz: begins with 0x00000000",
    ),
    "gzip that is none": (
        lambda f: (f / IMAGES).rename(f / f"{IMAGES}.gz"),
        f"{IMAGES}.gz: damaged or cut short",
    ),
    "an entry that climbs out": (zipped(first="../../evil.png"), "leads out of the archive"),
    "an entry with a backslash": (
        zipped(lambda a: a.writestr("a\\..\\b.png", "x")),
        "leads out of the archive",
    ),
    "an entry that is a link": (zipped(link_entry), "is a symbolic link"),
    "an archive that expands a thousandfold": (
        zipped(lambda a: a.writestr("train/even/big.png", b"\0" * (30 << 20))),
        "would expand to",
    ),
    "an archive of no image": (zipped(), "no readable image"),
}


@bad_inputs(IDX)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_bad_idx_files_are_refused(idx_files, tmp_path, bad, match):
    folder = shutil.copytree(idx_files, tmp_path / "files")
    made = bad(folder)
    source = made if isinstance(made, type(folder)) and made.suffix == ".zip" else folder
    refused(lambda: datasets.prepare("mine", source, root=tmp_path / "root"), match, folder)
    assert not (tmp_path / "root" / "mine").exists() and not (tmp_path / MARKER).exists()


def saved(name, image):
    def spoil(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)

    return spoil


def chunk(kind, payload=b""):
    return (
        struct.pack(">I", len(payload))
        + kind
        + payload
        + struct.pack(">I", zlib.crc32(kind + payload))
    )


def huge_png(side):
    """The beginning of a PNG file of so many pixels."""
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT")


ONE = "train/even/00000.png"
CLASSES = {
    "an image half": (changed(ONE, lambda b: b[:60]), f"{ONE}: no readable image"),
    "an image that is text": (changed(ONE, lambda b: b"hello"), f"{ONE}: no readable image"),
    "an image that is a pickle": (
        lambda f: (f / ONE).write_bytes(bomb(f.parent / MARKER)),
        f"{ONE}: no readable image",
    ),
    "an image with a flipped bit": (
        changed("train/odd/00001.png", lambda b: b[:50] + bytes([b[50] ^ 255]) + b[51:]),
        "train/odd/00001.png: no readable image",
    ),
    "an image of another size": (saved(ONE, Image.new("L", (9, 8))), "pixels, expected"),
    "an image of 400 megapixels": (
        lambda f: (f / "train/odd/zz.png").write_bytes(huge_png(20_000)),
        "zz.png: no readable image",
    ),
    "an image of 100 megapixels": (
        lambda f: (f / "train/odd/zz.png").write_bytes(huge_png(10_000)),
        "zz.png: 10000x10000 pixels, expected",
    ),
    "a colour image among gray ones": (
        saved("train/odd/zz.png", Image.new("RGB", (8, 8))),
        "zz.png: a colour image, but the first one is gray",
    ),
    "an image in no class folder": (
        saved("train/zz.png", Image.new("L", (8, 8))),
        "train/zz.png: in no class folder",
    ),
    "a test class unknown in training": (
        saved("test/third/zz.png", Image.new("L", (8, 8))),
        "'third' is none of the 2 classes",
    ),
    "no image": (
        lambda f: [shutil.rmtree(f / "train"), shutil.rmtree(f / "test")],
        "holds nothing that mine can be made of",
    ),
    "an image that is a link": (linked(ONE), f"{ONE}: a symbolic link"),
    "an image that is a folder": (
        lambda f: (
            (f / ONE).unlink(),
            (f / ONE).mkdir(),
            saved(f"{ONE}/x.png", Image.new("L", (9, 9)))(f),
        ),
        "pixels, expected|class",
    ),
}


@bad_inputs(CLASSES)
def test_bad_class_folders_are_refused(class_folders, tmp_path, bad, match):
    folder = shutil.copytree(class_folders, tmp_path / "files")
    bad(folder)
    refused(lambda: datasets.prepare("mine", folder, root=tmp_path / "root"), match, folder)
    assert not (tmp_path / "root" / "mine").exists() and not (tmp_path / MARKER).exists()
