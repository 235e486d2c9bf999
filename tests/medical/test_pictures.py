"""Plain pictures in every mode that Pillow writes."""

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from healthgpt.images_healthgpt import load_picture
from healthgpt.medical import count_frames, open_picture

MODES = {"1": "png", "L": "png", "LA": "png", "P": "gif", "RGB": "png", "RGBA": "png", "CMYK": "tiff", "YCbCr": "jpg"}
MODES |= {"RGBX": "tiff", "LAB": "tiff", "I;16": "png"}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_reaches_the_processor_as_it_reads_it(mode, tmp_path):
    picture = Image.open(GOLDEN / "images/ct.png").convert("RGB")
    picture = picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode)
    path = tmp_path / f"picture.{MODES[mode]}"
    picture.save(path)
    opened = open_picture(path)
    assert opened.mode == "RGB" and opened.size == picture.size and not opened.info
    assert opened.tobytes() == load_picture(str(path), 336).tobytes()


def test_transparency_is_dropped_whatever_the_file_calls_it(tmp_path):
    picture = Image.new("RGB", (8, 8), (200, 100, 50))
    picture.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png", transparency=0)
    picture.save(tmp_path / "colour.png", transparency=(200, 100, 50))
    with_alpha = picture.convert("RGBA")
    with_alpha.putalpha(0)
    with_alpha.save(tmp_path / "alpha.png")
    for name in ("palette", "colour", "alpha"):
        assert open_picture(tmp_path / f"{name}.png").getcolors() == [(64, (200, 100, 50))]


def test_greys_of_a_wider_range_are_stretched(tmp_path):
    values = np.linspace(-1000, 3000, 64, dtype=np.float32).reshape(8, 8)
    expected = ((values + 1000.0) / 4000 * 255).round()
    Image.fromarray(values).save(tmp_path / "float.tiff")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "whole.tiff")
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "float.tiff")), expected)
    assert abs(np.asarray(open_picture(tmp_path / "whole.tiff")) - expected).max() <= 1
    Image.fromarray(np.array([[0, 255, 256, 65535]], np.int32)).save(tmp_path / "sixteen.tiff")
    assert np.asarray(open_picture(tmp_path / "sixteen.tiff"))[0, :, 0].tolist() == [0, 0, 1, 255]  # the upper 8 bits


def test_pages_and_metadata(tmp_path):
    pages = [Image.new("L", (4, 4), grey) for grey in (10, 20, 30)]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:], description="Doe^Jane")
    assert count_frames(tmp_path / "pages.tiff") == 3
    greys = [open_picture(tmp_path / "pages.tiff", frame).getpixel((0, 0))[0] for frame in (None, 0, 2)]
    assert greys == [10, 10, 30]
    with pytest.raises(ValueError, match="has no frame 3: it has 3, numbered from 0 to 2"):
        open_picture(tmp_path / "pages.tiff", 3)
    text = PngInfo()
    text.add_text("Patient", "Doe^Jane")
    exif = Image.Exif()
    exif[0x010E] = "Doe^Jane"
    pages[0].save(tmp_path / "text.png", pnginfo=text, exif=exif)
    for name in ("text.png", "pages.tiff"):
        picture = open_picture(tmp_path / name)
        assert not picture.info and not picture.getexif() and not hasattr(picture, "text")
        picture.save(tmp_path / "out.png")
        assert b"Doe" in (tmp_path / name).read_bytes() and b"Doe" not in (tmp_path / "out.png").read_bytes()


def test_what_is_no_picture(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((GOLDEN / "images/ct.png").read_bytes()[:500])
    (tmp_path / "empty").touch()
    for name in ("memory", "memory.nii"):  # a file that nobody can read at its start, not even root
        (tmp_path / name).symlink_to("/proc/self/mem")
    for name, message in (
        ("text.png", "'.*text.png' is not a picture that can be read: it is neither DICOM nor NIfTI"),
        ("empty", "it is neither DICOM nor NIfTI"),
        ("cut.png", "'.*cut.png' is not a picture that can be read: "),
        ("nowhere.png", "There is no picture file '.*nowhere.png'"),
        ("memory", r"'.*memory' cannot be read: Input/output error\.$"),
        ("memory.nii", r"'.*memory.nii' cannot be read: Input/output error\.$"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_picture(tmp_path / name)
        assert "\n" not in str(error.value)
