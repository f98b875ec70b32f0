"""Loads data sets by name: embedded ones, and those prepared from files."""

import os
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from metaopt.core.checks import check_known
from metaopt.core.types import Batch, Split
from metaopt.datasets import decoded_arrays, embedded, store, tfds_records
from metaopt.datasets.catalog import SPECS, own_spec, specs
from metaopt.datasets.dataset import Dataset, check, split_in_three

EMBEDDED: dict[str, Callable[[], Dataset]] = {
    "digits": embedded.digits,
    "breast_cancer": embedded.breast_cancer,
    "moons": embedded.moons,
    "circles": embedded.circles,
    "spirals": embedded.spirals,
}
MAX_HELD_OUT = 5000  # training examples that become "valid"; at most a tenth of them
SEED = 0


def load(name: str, *, root: Path | None = None) -> Dataset:
    """Loads a data set onto the device.

    Args:
      name: of the set, embedded or prepared.
      root: the folder of prepared sets; default: `data_root`.

    Returns:
      The data set. Prepared sets have images uint8 ``[n, H, W, C]`` and scale 1/255. Their "test"
      split is the official test set (or the official validation set, if test images have no
      labels). "valid" is 5000 training examples, or a tenth if that is less, chosen with a fixed
      seed (see `hold_out`); "train" is the rest.

    Raises:
      ValueError: when the name is unknown (lists the closest names), the set is not prepared
        (gives the command that prepares it), or has been damaged since.
    """
    if name in EMBEDDED:
        return EMBEDDED[name]()
    root = root or store.data_root()
    folder = store.find(root, name)
    if folder is None:
        check_known("data set", name, specs(root))
        raise ValueError(
            f"data set {name!r} is not prepared: no records of it in {root.absolute()}. Run "
            f"`{SPECS[name].command}`, where DIR holds {SPECS[name].files}. Where to get them: "
            "docs/data.md. Another folder of prepared sets: set METAOPT_DATA_DIR."
        )
    arrays, num_classes = _load_arrays(root, name, folder)
    return _make_dataset(name, arrays, num_classes)


def _load_arrays(root: Path, name: str, folder: Path) -> tuple[decoded_arrays.Arrays, int]:
    """The arrays and the number of classes. Missing or damaged arrays are decoded again."""
    prepare_again = f"run `{own_spec(name).command} --overwrite True`."
    decoded_arrays.check_records(folder, fix=prepare_again)
    arrays = decoded_arrays.load(folder)
    if arrays is None:
        _decode(root, name, folder, fix=prepare_again)
        arrays = decoded_arrays.load(folder)
    manifest = decoded_arrays.read_manifest(folder)
    if arrays is None or manifest is None:
        raise ValueError(f"{folder}: changed while it was read; try again.")
    return arrays, len(manifest["class_names"])


def _decode(root: Path, name: str, folder: Path, fix: str) -> None:
    """Decodes the records in `folder` into arrays beside them."""
    with store.lock(root, name), store.staging_folder(root, name) as staging:
        if decoded_arrays.load(folder) is not None:
            return  # another process has decoded them meanwhile
        try:
            image_set = tfds_records.read(root, name, folder.name)
            with decoded_arrays.writer(staging, image_set, f"decode {name}") as write_example:
                for split, examples in image_set.splits.items():
                    for example in examples.iterate():
                        write_example(split, example)
        except ImportError:
            raise  # a missing package says nothing about the records
        except Exception as error:  # libraries raise errors of many types on damaged bytes
            raise ValueError(f"{folder}: cannot be read: {error}; {fix}") from error
        decoded_arrays.write_manifest(staging, records=folder, image_set=image_set)
        store.publish(
            staging / decoded_arrays.FOLDER,
            folder / decoded_arrays.FOLDER,
            staging=staging,
            root=root,
        )


def _make_dataset(name: str, arrays: decoded_arrays.Arrays, num_classes: int) -> Dataset:
    """Assigns the original splits to train, valid and test, and moves them to the device."""
    _check_memory(name, arrays)
    labelled = {split: (x, y) for split, (x, y) in arrays.items() if len(y) and y.min() >= 0}
    if "train" not in labelled:
        raise ValueError(f"data set {name!r}: no labelled training images, got {list(arrays)}.")
    train_x, train_y = labelled["train"]
    if "test" in labelled and "validation" in labelled:
        train, valid, test = labelled["train"], labelled["validation"], labelled["test"]
    elif "test" in labelled or "validation" in labelled:
        kept, held_out = hold_out(len(train_y))
        train = train_x[kept], train_y[kept]
        valid = train_x[held_out], train_y[held_out]
        test = labelled["test"] if "test" in labelled else labelled["validation"]
    else:
        return split_in_three(
            name=name, x=train_x, y=train_y, num_classes=num_classes, scale=1 / 255
        )
    splits: dict[Split, Batch] = {
        "train": _to_device(*train),
        "valid": _to_device(*valid),
        "test": _to_device(*test),
    }
    return check(Dataset(name=name, splits=splits, num_classes=num_classes, scale=1 / 255))


def hold_out(n: int) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " held_out"]]:
    """Chooses the training examples that become "valid".

    NumPy guarantees that `RandomState` never changes its numbers. Those of its newer generators
    may change between versions.

    Args:
      n: number of training examples.

    Returns:
      The indices of the examples that stay in "train" and of those held out, both ascending.
    """
    order = np.random.RandomState(SEED).permutation(n)
    num_held_out = min(MAX_HELD_OUT, n // 10)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


def _to_device(x: np.ndarray, y: np.ndarray) -> Batch:
    return {"x": jnp.array(x), "y": jnp.array(y, jnp.int32)}


def _check_memory(name: str, arrays: decoded_arrays.Arrays) -> None:
    if not hasattr(os, "sysconf"):  # Windows
        return
    needed = sum(x.nbytes for x, _ in arrays.values())
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > installed:
        raise ValueError(
            f"data set {name!r}: its images take {needed / 1e9:.0f} GB, this machine has "
            f"{installed / 1e9:.0f} GB; prepare some of the classes under a name of your own."
        )
