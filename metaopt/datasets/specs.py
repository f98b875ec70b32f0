"""The data sets known by name: what they hold, and which files they are prepared from."""

from typing import NamedTuple

KINDS = {
    "idx": "IDX files",
    "cifar": ".bin files",
    "svhn": ".mat files",
    "folders": "class folders",
}


class Spec(NamedTuple):
    """A data set.

    Attributes:
      name: as in ``metaopt.datasets.load(name)``; prepared sets bear the name that TensorFlow
        Datasets gives them, with the configuration after a slash.
      shape: of one input.
      num_classes: labels are ``0 .. num_classes - 1``.
      examples: split -> how many there are in the official files.
      readers: which readers are tried in turn (names of `metaopt.datasets.prepare.READERS`);
        empty: embedded.
      files: what ``metaopt data prepare NAME --from DIR`` looks for.
      official: whether TensorFlow Datasets has a builder of this name.
    """

    name: str
    shape: tuple[int, ...]
    num_classes: int
    examples: dict[str, int]
    readers: tuple[str, ...] = ()
    files: str = ""
    official: bool = True

    @property
    def command(self) -> str:
        """What prepares it."""
        return f"metaopt data prepare {self.name} --from DIR"

    @property
    def source(self) -> str:
        """Where its examples come from, in a word or two."""
        return " or ".join(KINDS[reader] for reader in self.readers) or "embedded"


CLASS_FOLDERS = "class folders train/CLASS/*.png, optional val/, test/"
IDX = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-... of both, also as .gz"

SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("digits", (8, 8, 1), 10, {"all": 1797}),
        Spec("moons", (2,), 2, {"all": 2000}),
        Spec("circles", (2,), 2, {"all": 2000}),
        Spec("spirals", (2,), 2, {"all": 2000}),
        Spec("mnist", (28, 28, 1), 10, {"train": 60000, "test": 10000}, ("idx",), IDX),
        Spec("fashion_mnist", (28, 28, 1), 10, {"train": 60000, "test": 10000}, ("idx",), IDX),
        Spec(
            *("cifar10", (32, 32, 3), 10, {"train": 50000, "test": 10000}),
            readers=("cifar", "folders"),
            files=f"binary version: data_batch_1.bin .. _5.bin, test_batch.bin; or {CLASS_FOLDERS}",
        ),
        Spec(
            *("cifar100", (32, 32, 3), 100, {"train": 50000, "test": 10000}),
            readers=("cifar", "folders"),
            files=f"binary version: train.bin, test.bin; or {CLASS_FOLDERS}",
        ),
        Spec(
            *("svhn_cropped", (32, 32, 3), 10, {"train": 73257, "test": 26032}),
            readers=("svhn", "folders"),
            files=f"train_32x32.mat, test_32x32.mat; or {CLASS_FOLDERS}",
        ),
        Spec(
            *("imagenet_resized/32x32", (32, 32, 3), 1000, {"train": 1281167, "test": 50000}),
            readers=("folders",),
            files=CLASS_FOLDERS,
        ),
        Spec(
            *("imagenet_resized/64x64", (64, 64, 3), 1000, {"train": 1281167, "test": 50000}),
            readers=("folders",),
            files=CLASS_FOLDERS,
        ),
        Spec(
            *("places365_small", (256, 256, 3), 365, {"train": 1803460, "test": 36500}),
            readers=("folders",),
            files=CLASS_FOLDERS,
        ),
        Spec(
            *("tiny_imagenet", (64, 64, 3), 200, {"train": 100000, "test": 10000}),
            readers=("folders",),
            files="tiny-imagenet-200.zip, or its folder",
            official=False,
        ),
    )
}


# sha256 of the uncompressed files (the gzip headers differ between distributions): images and
# labels of training, then of test.
_SHA256 = {
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion_mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
_KINDS = ("images-idx3", "labels-idx1")
_IDX_FILES = tuple(f"{stem}-{kind}-ubyte" for stem in ("train", "t10k") for kind in _KINDS)
CONTENT: dict[str, dict[str, str]] = {
    name: dict(zip(_IDX_FILES, digests, strict=True)) for name, digests in _SHA256.items()
}


def own_spec(name: str) -> Spec:
    """A set of the user's own, of any shape and number of classes."""
    return Spec(
        *(name, (), 0, {}),
        readers=("idx", "folders"),
        files=f"IDX files ({IDX}); or {CLASS_FOLDERS}",
        official=False,
    )
