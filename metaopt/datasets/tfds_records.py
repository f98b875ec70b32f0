"""Folders of TensorFlow Datasets (ArrayRecord files), written and read without TensorFlow.

The stock builders cannot extract files without TensorFlow. A builder of our own with the stock
name, version and features writes records that the unmodified ``tfds.data_source`` reads.
tensorflow-datasets is slow to import, so it is imported only to write records, or to decode them
for the first time.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.core.extras import optional_imports
from metaopt.datasets.catalog import Spec
from metaopt.datasets.pictures import encode_png
from metaopt.datasets.sources import Example, Examples, ImageSet

OWN_VERSION = "1.0.0"  # of a user's own sets
READ_SIZE = 256  # records read together; one by one takes five times as long


def class_names(spec: Spec) -> tuple[str, ...]:
    """The names of the classes in TensorFlow Datasets.

    Args:
      spec: the data set.

    Returns:
      The names; () when TensorFlow Datasets lacks the set, or numbers its classes.
    """
    if not spec.in_tfds:
        return ()
    names = tuple(_stock_builder(spec, Path("unused")).info.features["label"].names)
    return () if names == tuple(map(str, range(len(names)))) else names


def write(
    spec: Spec, image_set: ImageSet, root: Path, on_example: Callable[[str, Example], None]
) -> Path:
    """Writes the records of a data set.

    Args:
      spec: the data set.
      image_set: its images.
      root: the folder under which ``NAME/VERSION`` is made.
      on_example: called with the split and each example, in the order of the records.

    Returns:
      The folder of the records.
    """
    tfds = _import_tfds()

    builder = _make_builder(spec, image_set, root, on_example)
    config = tfds.download.DownloadConfig(
        compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False
    )
    # Hide its progress bars and messages; `on_example` can show progress.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare(download_config=config)
    return Path(builder.data_dir)


def read(root: Path, name: str, version: str) -> ImageSet:
    """Opens prepared records. The images are decoded when they are iterated over.

    Args:
      root: the folder of prepared sets.
      name: of the set.
      version: of the set.

    Returns:
      The images, in the order of the records.

    Raises:
      ValueError: when the records are not labelled images, or not ArrayRecord files.
    """
    tfds = _import_tfds()

    full_name = f"{name}:{version}"
    features: Any = tfds.builder(full_name, data_dir=root).info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(f"no labelled images, but {', '.join(sorted(features))}")
    try:
        sources: Any = tfds.data_source(
            full_name,
            data_dir=root,
            download=False,
            decoders={"image": tfds.decode.SkipDecoding()},  # the stock decoder needs OpenCV
        )
    except NotImplementedError:
        raise ValueError(
            'not in the ArrayRecord format; prepare it with file_format="array_record"'
        ) from None
    shape = features["image"].shape
    splits = {
        split: Examples(
            count=len(source), iterate=lambda source=source: _decode_records(source, shape)
        )
        for split, source in sources.items()
    }
    return ImageSet(splits=splits, shape=shape, class_names=tuple(features["label"].names))


def _decode_records(source: Any, shape: tuple[int, int, int]) -> Iterator[Example]:
    with optional_imports("data", needed_by="metaopt.datasets"):
        import PIL.Image

    for start in range(0, len(source), READ_SIZE):
        indices = range(start, min(start + READ_SIZE, len(source)))
        for record in source.__getitems__(indices):
            with PIL.Image.open(io.BytesIO(record["image"])) as image:
                pixels = np.asarray(image.convert("L" if shape[2] == 1 else "RGB"))
            yield Example(image=pixels.reshape(shape), label=int(record["label"]))


def _import_tfds() -> Any:
    with optional_imports("data", needed_by="metaopt.datasets"):
        import tensorflow_datasets
    return tensorflow_datasets


def _stock_builder(spec: Spec, root: Path) -> Any:
    tfds = _import_tfds()

    return tfds.builder(spec.name, data_dir=root, file_format="array_record")


def _make_builder(
    spec: Spec, image_set: ImageSet, root: Path, on_example: Callable[[str, Example], None]
) -> Any:
    """A builder with the stock metadata, or that of a user's own set, and our examples."""
    tfds = _import_tfds()
    from tensorflow_datasets.core.registered import skip_registration

    if spec.in_tfds:
        stock = _stock_builder(spec, root)
        features, version, config = stock.info.features, stock.version, stock.builder_config
        if tuple(features["label"].names) != image_set.class_names:
            features["label"].names = image_set.class_names
    else:
        image = tfds.features.Image(shape=image_set.shape)
        label = tfds.features.ClassLabel(names=image_set.class_names)
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        version, config = tfds.core.Version(OWN_VERSION), None

    def records(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, example in enumerate(image_set.splits[split].iterate()):
            on_example(split, example)
            image = io.BytesIO(encode_png(example.image))
            yield index, {"image": image, "label": example.label, **example.extra}

    with skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            name = spec.name.partition("/")[0]
            VERSION = version
            BUILDER_CONFIGS = [config] if config else []

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=features,
                    supervised_keys=("image", "label"),
                    disable_shuffling=True,  # records stay in the order of the files
                )

            def _split_generators(self, dl_manager):
                del dl_manager  # nothing is downloaded
                return {split: records(split) for split in image_set.splits}

            def _generate_examples(self):
                raise NotImplementedError  # `_split_generators` returns the examples

        config_name = {"config": config.name} if config else {}
        return Builder(data_dir=root, file_format="array_record", **config_name)
