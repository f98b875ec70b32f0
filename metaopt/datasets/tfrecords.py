"""TensorFlow Datasets folders (ArrayRecord files) written and read without TensorFlow.

The stock builders cannot extract without TensorFlow. A builder of our own under the stock name,
version and features writes what the unmodified ``tfds.data_source`` reads. Its imports are slow:
they happen only where records are written, or read for the first time.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.core.extras import optional_imports
from metaopt.datasets import png
from metaopt.datasets.examples import Example, Examples, Reading
from metaopt.datasets.specs import Spec

OWN_VERSION = "1.0.0"
AT_ONCE = 256  # records; reading them one by one takes five times as long


def class_names(spec: Spec) -> tuple[str, ...]:
    """What TensorFlow Datasets calls the classes of an official set; () where it gives numbers."""
    names = tuple(_stock(spec, Path("unused")).info.features["label"].names)
    return () if names == tuple(map(str, range(len(names)))) else names


def write(
    spec: Spec, reading: Reading, root: Path, on_example: Callable[[str, Example], None]
) -> Path:
    """Writes the records under `root` and returns their folder.

    Args:
      on_example: called with the split and each example, in the order of the records.
    """
    tfds = _tensorflow_datasets()

    builder = _builder(spec, reading, root, on_example)
    config = tfds.download.DownloadConfig(
        compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False
    )
    # Its own bars and notes would be mixed with ours.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare(download_config=config)
    return Path(builder.data_dir)


def read(root: Path, name: str, version: str) -> Reading:
    """The examples of prepared records, in their order, decoded one by one.

    Raises: ValueError: they are no labelled images, or of another format than ArrayRecord.
    """
    tfds = _tensorflow_datasets()

    versioned = f"{name}:{version}"
    features: Any = tfds.builder(versioned, data_dir=root).info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(f"no labelled images, but {', '.join(sorted(features))}")
    try:
        sources: Any = tfds.data_source(
            versioned,
            data_dir=root,
            download=False,
            decoders={"image": tfds.decode.SkipDecoding()},  # its own would ask for OpenCV
        )
    except NotImplementedError:
        message = 'not in the ArrayRecord format; prepare it with file_format="array_record"'
        raise ValueError(message) from None
    shape = features["image"].shape
    splits = {
        split: Examples(len(source), lambda source=source: _rows(source, shape))
        for split, source in sources.items()
    }
    return Reading(splits, shape, tuple(features["label"].names))


def _rows(source: Any, shape: tuple[int, int, int]) -> Iterator[Example]:
    with optional_imports("data", needed_by="metaopt.datasets"):
        from PIL import Image
    for start in range(0, len(source), AT_ONCE):
        indices = range(start, min(start + AT_ONCE, len(source)))
        for record in source.__getitems__(indices):
            with Image.open(io.BytesIO(record["image"])) as image:
                pixels = np.asarray(image.convert("L" if shape[2] == 1 else "RGB"))
            yield Example(pixels.reshape(shape), int(record["label"]))


def _tensorflow_datasets() -> Any:
    with optional_imports("data", needed_by="metaopt.datasets"):
        import tensorflow_datasets
    return tensorflow_datasets


def _stock(spec: Spec, root: Path) -> Any:
    tfds = _tensorflow_datasets()

    return tfds.builder(spec.name, data_dir=root, file_format="array_record")


def _builder(
    spec: Spec, reading: Reading, root: Path, on_example: Callable[[str, Example], None]
) -> Any:
    tfds = _tensorflow_datasets()
    from tensorflow_datasets.core.registered import skip_registration

    if spec.official:
        stock = _stock(spec, root)
        features, version, config = stock.info.features, stock.version, stock.builder_config
        if tuple(features["label"].names) != reading.class_names:
            features["label"].names = reading.class_names
    else:
        image = tfds.features.Image(shape=reading.shape)
        label = tfds.features.ClassLabel(names=reading.class_names)
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        version, config = tfds.core.Version(OWN_VERSION), None

    def rows(split: str):
        for i, example in enumerate(reading.splits[split].rows()):
            on_example(split, example)
            image = io.BytesIO(png.encode(example.image))
            yield i, {"image": image, "label": example.label, **example.extra}

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
                return {split: rows(split) for split in reading.splits}

            def _generate_examples(self):
                raise NotImplementedError  # `_split_generators` gives the examples themselves

        configured = {"config": config.name} if config else {}
        return Builder(data_dir=root, file_format="array_record", **configured)
