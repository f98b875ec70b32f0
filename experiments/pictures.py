"""Pictures of the README and of the pages of docs, small enough to be committed.

    python -m experiments.pictures docs/images/report-desktop.png

A palette of 256 colours makes a picture of lines and text a third as large, with no visible
difference.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

LARGEST = 150_000  # bytes of a committed picture


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG file with a palette, and closes it."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(with_palette(picture))


def with_palette(file: Path | io.BytesIO) -> bytes:
    """The PNG file of a picture, reduced to 256 colours.

    Raises:
      ValueError: the result is larger than a committed picture may be.
    """
    with Image.open(file) as image:
        reduced = image if image.mode == "P" else _reduced(image)
        payload = io.BytesIO()
        reduced.save(payload, "PNG", optimize=True)
    size = payload.tell()
    if size > LARGEST:
        raise ValueError(f"picture of {size} bytes, at most {LARGEST}; draw it smaller.")
    return payload.getvalue()


def _reduced(image: Image.Image) -> Image.Image:
    # Dithering would add noise to the areas between the lines.
    return image.convert("RGB").quantize(
        256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Reduces picture files in place."""
    parser = argparse.ArgumentParser(description="reduce PNG files to 256 colours")
    parser.add_argument("files", type=Path, nargs="+")
    for path in parser.parse_args(argv).files:
        path.write_bytes(with_palette(path))


if __name__ == "__main__":
    main()
