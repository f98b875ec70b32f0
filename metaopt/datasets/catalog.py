"""The data sets known by name: what they contain, and whether they are prepared."""

from pathlib import Path
from typing import Literal, NamedTuple

from metaopt.datasets import decoded_arrays, store

READER_FILES = {
    "idx": "IDX files",
    "cifar": ".bin files",
    "svhn": ".mat files",
    "class_folders": "class folders",
}


class Spec(NamedTuple):
    """What is known of a data set without reading it.

    Attributes:
      name: as in ``metaopt.datasets.load(name)``. Prepared sets have the name that TensorFlow
        Datasets gives them, with the configuration after a slash.
      shape: of one input; () when unknown.
      num_classes: number of classes; 0 when unknown.
      examples: split of the original files -> number of examples.
      readers: the readers that `prepare` tries in turn (keys of `preparation.READERS`); empty for
        an embedded set.
      files: the files that ``metaopt data prepare NAME --from DIR`` looks for.
      in_tfds: whether TensorFlow Datasets has a builder of this name.
    """

    name: str
    shape: tuple[int, ...]
    num_classes: int
    examples: dict[str, int]
    readers: tuple[str, ...] = ()
    files: str = ""
    in_tfds: bool = False

    @property
    def command(self) -> str:
        """The command that prepares the set."""
        return f"metaopt data prepare {self.name} --from DIR"

    @property
    def source(self) -> str:
        """Where the examples come from, in a few words."""
        return " or ".join(READER_FILES[reader] for reader in self.readers) or "embedded"


CLASS_FOLDERS = "class folders train/CLASS/*.png or *.jpg, optional val/, test/"
IDX_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-... of both, also as .gz"

SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(name="digits", shape=(8, 8, 1), num_classes=10, examples={"all": 1797}),
        Spec(name="breast_cancer", shape=(30,), num_classes=2, examples={"all": 569}),
        Spec(name="moons", shape=(2,), num_classes=2, examples={"all": 2000}),
        Spec(name="circles", shape=(2,), num_classes=2, examples={"all": 2000}),
        Spec(name="spirals", shape=(2,), num_classes=2, examples={"all": 2000}),
        Spec(
            name="mnist",
            shape=(28, 28, 1),
            num_classes=10,
            examples={"train": 60000, "test": 10000},
            readers=("idx",),
            files=IDX_FILES,
            in_tfds=True,
        ),
        Spec(
            name="fashion_mnist",
            shape=(28, 28, 1),
            num_classes=10,
            examples={"train": 60000, "test": 10000},
            readers=("idx",),
            files=IDX_FILES,
            in_tfds=True,
        ),
        Spec(
            name="cifar10",
            shape=(32, 32, 3),
            num_classes=10,
            examples={"train": 50000, "test": 10000},
            readers=("cifar", "class_folders"),
            files=f"binary version: data_batch_1.bin .. _5.bin, test_batch.bin; or {CLASS_FOLDERS}",
            in_tfds=True,
        ),
        Spec(
            name="cifar100",
            shape=(32, 32, 3),
            num_classes=100,
            examples={"train": 50000, "test": 10000},
            readers=("cifar", "class_folders"),
            files=f"binary version: train.bin, test.bin; or {CLASS_FOLDERS}",
            in_tfds=True,
        ),
        Spec(
            name="svhn_cropped",
            shape=(32, 32, 3),
            num_classes=10,
            examples={"train": 73257, "test": 26032},
            readers=("svhn", "class_folders"),
            files=f"train_32x32.mat, test_32x32.mat; or {CLASS_FOLDERS}",
            in_tfds=True,
        ),
        Spec(
            name="imagenet_resized/32x32",
            shape=(32, 32, 3),
            num_classes=1000,
            examples={"train": 1281167, "test": 50000},
            readers=("class_folders",),
            files=CLASS_FOLDERS,
            in_tfds=True,
        ),
        Spec(
            name="imagenet_resized/64x64",
            shape=(64, 64, 3),
            num_classes=1000,
            examples={"train": 1281167, "test": 50000},
            readers=("class_folders",),
            files=CLASS_FOLDERS,
            in_tfds=True,
        ),
        Spec(
            name="places365_small",
            shape=(256, 256, 3),
            num_classes=365,
            examples={"train": 1803460, "test": 36500},
            readers=("class_folders",),
            files=CLASS_FOLDERS,
            in_tfds=True,
        ),
        Spec(
            name="tiny_imagenet",
            shape=(64, 64, 3),
            num_classes=200,
            examples={"train": 100000, "test": 10000},
            readers=("class_folders",),
            files="tiny-imagenet-200.zip, or its folder",
        ),
    )
}


def own_spec(name: str) -> Spec:
    """The spec of a user's own set, of any shape and number of classes.

    Args:
      name: of the set.

    Returns:
      A spec with unknown shape, classes and examples.
    """
    return Spec(
        name=name,
        shape=(),
        num_classes=0,
        examples={},
        readers=("idx", "class_folders"),
        files=f"IDX files ({IDX_FILES}); or {CLASS_FOLDERS}",
    )


def specs(root: Path | None = None) -> dict[str, Spec]:
    """All data sets that are known by name, prepared or not.

    Args:
      root: the folder of prepared sets; default: `data_root`.

    Returns:
      Name -> spec: first the sets that metaopt knows, then the user's own sets under `root`.
    """
    root = root or store.data_root()
    own_names = [name for name in store.list_prepared(root) if name not in SPECS]
    return {**SPECS, **{name: _prepared_spec(root, name) for name in own_names}}


def _prepared_spec(root: Path, name: str) -> Spec:
    """The spec of a user's prepared set; its shape and classes are unknown until it is decoded."""
    spec = own_spec(name)
    folder = store.find(root, name)
    manifest = decoded_arrays.read_manifest(folder) if folder else None
    if manifest is None:
        return spec
    return spec._replace(
        shape=tuple(manifest["shape"]),
        num_classes=len(manifest["class_names"]),
        examples=manifest["examples"],
    )


def state(name: str, root: Path | None = None) -> Literal["embedded", "prepared", "not prepared"]:
    """Whether `load` finds a data set.

    Args:
      name: of the set.
      root: the folder of prepared sets; default: `data_root`.

    Returns:
      "embedded", "prepared", or "not prepared" (also for unknown names).
    """
    if name in SPECS and not SPECS[name].readers:
        return "embedded"
    return "prepared" if store.find(root or store.data_root(), name) else "not prepared"
