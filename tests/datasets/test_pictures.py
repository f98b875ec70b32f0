"""PNG files are those that Pillow reads; a contact sheet shows the images themselves."""

import io

import numpy as np
import pytest
from dataset_files import digit_images
from PIL import Image

from metaopt import datasets
from metaopt.datasets.pictures import contact_sheet, encode_png


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_pillow_reads_the_encoded_pixels(channels, mode):
    for image in digit_images(side=16, channels=channels)[0][:5, :, 3:]:  # 16 x 13
        with Image.open(io.BytesIO(encode_png(image))) as opened:
            assert opened.mode == mode
            np.testing.assert_array_equal(np.asarray(opened).reshape(image.shape), image)


def test_a_contact_sheet_has_a_row_of_images_for_each_class():
    data = datasets.digits()
    sheet = contact_sheet(data)
    # Ten rows of ten 8x8 images, enlarged four times, with a white line around each.
    assert sheet.shape == (331, 331, 3) and sheet.dtype == np.uint8
    assert (sheet[::33] == 255).all() and (sheet[:, ::33] == 255).all()
    x, y = np.asarray(data.splits["train"]["x"]), np.asarray(data.splits["train"]["y"])
    first_three = np.rint(x[np.flatnonzero(y == 3)[0]] * (255 / 16))
    np.testing.assert_array_equal(sheet[100:132:4, 1:33:4], first_three.repeat(3, axis=-1))


def test_points_have_no_contact_sheet():
    with pytest.raises(ValueError, match="'moons' holds no images"):
        contact_sheet(datasets.moons())
