"""Data sets by name: embedded, prepared, or known and not prepared."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from metaopt.core import checks
from metaopt.core.extras import MissingExtra
from metaopt.core.types import Batch, Split
from metaopt.datasets import decoded, embedded, store, tfrecords
from metaopt.datasets.base import Dataset, check, split_in_three
from metaopt.datasets.examples import Reading
from metaopt.datasets.progress import progress
from metaopt.datasets.specs import SPECS, Spec, own_spec

EMBEDDED: dict[str, Callable[[], Dataset]] = {
    "digits": embedded.digits,
    "moons": embedded.moons,
    "circles": embedded.circles,
    "spirals": embedded.spirals,
}
HELD_OUT = 5000  # training examples that become "valid", at most a tenth of them
SEED = 0


def known(root: Path | None = None) -> dict[str, Spec]:
    """Name -> what it is: the sets of `specs.SPECS`, then those of the user's own under `root`."""
    root = root or store.data_root()
    own = [name for name in store.prepared(root) if name not in SPECS]
    return {**SPECS, **{name: _own(root, name) for name in own}}


def state(name: str, root: Path | None = None) -> Literal["embedded", "prepared", "not prepared"]:
    """Whether `load` would find `name`."""
    if name in EMBEDDED:
        return "embedded"
    return "prepared" if store.find(root or store.data_root(), name) else "not prepared"


def load(name: str, *, root: Path | None = None) -> Dataset:
    """The data set `name` on the device: images uint8 ``[n, H, W, C]``, scale 1/255.

    The official test images are "test" (where they have no labels: the official validation
    images). 5000 training examples, or a tenth if that is less, chosen with a fixed seed, are
    "valid", the others "train".

    Raises:
      ValueError: an unknown name (with the near matches), a known set that is not prepared (with
        the command that prepares it), or one that has been damaged since.
    """
    if name in EMBEDDED:
        return EMBEDDED[name]()
    root = root or store.data_root()
    folder = store.find(root, name)
    if folder is None:
        checks.check_known("data set", name, known(root))
        raise ValueError(
            f"data set {name!r} is not prepared: no records of it in {root.absolute()}. Give "
            f"`{SPECS[name].command}`, where DIR holds {SPECS[name].files}. Where to get them: "
            "docs/data.md. Another place of prepared sets: set METAOPT_DATA_DIR."
        )
    arrays, num_classes = _arrays(root, name, folder)
    return _dataset(name, arrays, num_classes)


def _own(root: Path, name: str) -> Spec:
    """What a set of the user's own holds; without shape and classes until it is first decoded."""
    folder = store.find(root, name)
    about = decoded.manifest(folder) if folder else None
    if about is None:
        return own_spec(name)
    return own_spec(name)._replace(
        shape=tuple(about["shape"]),
        num_classes=len(about["class_names"]),
        examples=about["examples"],
    )


def _arrays(root: Path, name: str, folder: Path) -> tuple[decoded.Arrays, int]:
    """The images and the number of classes, checked against the records."""
    decoded.check_source(folder, f"give `{own_spec(name).command} --overwrite True`.")
    arrays = decoded.load(folder)
    if arrays is None:
        _decode(root, name, folder)
        arrays = decoded.load(folder)
    about = decoded.manifest(folder)
    if arrays is None or about is None:
        raise ValueError(f"{folder}: changed while it was read; try again.")
    return arrays, len(about["class_names"])


def _decode(root: Path, name: str, folder: Path) -> None:
    """Writes the arrays beside the records, for records written elsewhere or damaged arrays."""
    with store.lock(root, name), store.workplace(root, name) as workplace:
        if decoded.load(folder) is not None:
            return  # another process has done it meanwhile
        try:
            reading = _copy(root, name, folder, workplace)
        except MissingExtra:
            raise
        except Exception as error:  # the libraries raise whatever damaged bytes lead them to
            command = f"{own_spec(name).command} --overwrite True"
            raise ValueError(f"{folder}: cannot be read: {error}; give `{command}`.") from error
        decoded.seal(workplace, folder, reading)
        store.publish(workplace / decoded.FOLDER, folder / decoded.FOLDER, workplace / "replaced")


def _copy(root: Path, name: str, folder: Path, to: Path) -> Reading:
    """Decodes all records into arrays below `to`."""
    reading = tfrecords.read(root, name, folder.name)
    counts = {split: examples.count for split, examples in reading.splits.items()}
    with (
        progress(f"decode {name}", sum(counts.values())) as advance,
        decoded.recording(to, reading.shape, counts) as record,
    ):
        for split, examples in reading.splits.items():
            for example in examples.rows():
                record(split, example)
                advance()
    return reading


def _dataset(name: str, arrays: decoded.Arrays, num_classes: int) -> Dataset:
    _check_memory(name, arrays)
    labelled = {split: (x, y) for split, (x, y) in arrays.items() if len(y) and y.min() >= 0}
    if "train" not in labelled:
        raise ValueError(f"data set {name!r}: no labelled training images, got {list(arrays)}.")
    train_x, train_y = labelled["train"]
    tests = [split for split in ("test", "validation") if split in labelled]
    if not tests:
        return split_in_three(name, train_x, train_y, num_classes, scale=1 / 255)
    kept, held_out = np.arange(len(train_y)), np.arange(0)
    if len(tests) == 1:
        kept, held_out = hold_out(len(train_y))
        valid = train_x[held_out], train_y[held_out]
    else:
        valid = labelled["validation"]
    splits: dict[Split, Batch] = {
        "train": _on_device(train_x[kept], train_y[kept]),
        "valid": _on_device(*valid),
        "test": _on_device(*labelled[tests[0]]),
    }
    return check(Dataset(name, splits, num_classes, 1 / 255))


def hold_out(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of `n` training examples that stay, and of those held out; both ascending.

    numpy keeps the numbers of `RandomState` as they are for ever; those of its newer generators
    may change between versions.
    """
    order = np.random.RandomState(SEED).permutation(n)
    held_out = min(HELD_OUT, n // 10)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _on_device(x: np.ndarray, y: np.ndarray) -> Batch:
    return {"x": jnp.array(x), "y": jnp.array(y, jnp.int32)}


def _check_memory(name: str, arrays: decoded.Arrays) -> None:
    needed = sum(x.nbytes for x, _ in arrays.values())
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(
            f"data set {name!r}: its images take {needed / 1e9:.0f} GB, this machine has "
            f"{there / 1e9:.0f} GB; prepare a part of the classes under a name of your own."
        )
