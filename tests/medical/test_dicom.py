"""DICOM files that pydicom ships, against the equations of PS3.3 C.11 in numpy, and files with a patient's name all over."""

import logging

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.uid import MPEG2MPML, HTJ2KLossless

from healthgpt.medical import count_frames, open_picture


def shipped(name):
    return get_testdata_file(name, download=False)


def pixels_of(path, frame=None):
    return np.asarray(open_picture(path, frame))


def uncompressed(**changes):
    """A CT of 16-bit integers from -1000 to 1095, with other tags."""
    dataset = pydicom.dcmread(shipped("CT_small.dcm"))
    values = np.arange(-1000, 1096, dtype=np.int16)[: 32 * 64].reshape(32, 64)
    dataset.Rows, dataset.Columns, dataset.PixelData = 32, 64, values.tobytes()
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -100
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    return dataset, values * 2.0 - 100


def saved(dataset, path):
    dataset.save_as(path)
    return path


def linear(values, center, width):
    """PS3.3 C.11.2.1.2.1, written as the standard has it, onto 0 to 255."""
    below, above = values <= center - 0.5 - (width - 1) / 2, values > center - 0.5 + (width - 1) / 2
    return np.where(below, 0, np.where(above, 255, ((values - (center - 0.5)) / (width - 1) + 0.5) * 255))


def exact(values, center, width):
    return np.clip((values - center) / width + 0.5, 0, 1) * 255


def sigmoid(values, center, width):
    return 255 / (1 + np.exp(-4 * (values - center) / width))


@pytest.mark.parametrize(
    ("function", "restated"), [(None, linear), ("LINEAR", linear), ("LINEAR_EXACT", exact), ("SIGMOID", sigmoid)]
)
@pytest.mark.parametrize(("center", "width"), [(40, 400), ([300.5, 40], [1250, 80]), (-500, 20)])
def test_windows_follow_the_standard(function, restated, center, width, tmp_path):
    changes = {"WindowCenter": center, "WindowWidth": width} | ({"VOILUTFunction": function} if function else {})
    dataset, values = uncompressed(**changes)
    first = (center[0], width[0]) if isinstance(center, list) else (center, width)
    drawn = pixels_of(saved(dataset, tmp_path / "ct"))
    assert drawn.shape == (32, 64) and drawn.min() < 128 < drawn.max()
    np.testing.assert_array_equal(drawn, restated(values, *first).round())
    dataset.PhotometricInterpretation = "MONOCHROME1"
    np.testing.assert_array_equal(pixels_of(saved(dataset, tmp_path / "inverted")), 255 - drawn)


def test_files_of_scanners_show_through_their_windows():
    for name in ("MR_small.dcm", "dicomdirtests/98892001/CT5N/2062", "dicomdirtests/77654033/CR1/6154"):
        dataset = pydicom.dcmread(shipped(name))
        values = dataset.pixel_array * float(dataset.get("RescaleSlope", 1)) + float(
            dataset.get("RescaleIntercept", 0)
        )
        expected = linear(values, float(dataset.WindowCenter), float(dataset.WindowWidth))
        expected = 255 - expected if dataset.PhotometricInterpretation == "MONOCHROME1" else expected
        assert abs(pixels_of(shipped(name)) - expected).max() <= 0.5


def test_without_a_window_values_span_black_to_white_and_padding_does_not_count(tmp_path):
    dataset, values = uncompressed(PixelPaddingValue=-1000)
    low = values[values > values.min()].min()
    expected = ((values - low) / (values.max() - low) * 255).clip(0).round()
    np.testing.assert_array_equal(pixels_of(saved(dataset, tmp_path / "a")), expected)
    dataset.add_new("PixelPaddingRangeLimit", "SS", -501)
    np.testing.assert_array_equal(
        pixels_of(saved(dataset, tmp_path / "b")), ((values + 1100) / (values.max() + 1100) * 255).clip(0).round()
    )
    dataset, values = uncompressed(PixelData=np.full((32, 64), 7, np.int16).tobytes())
    assert not pixels_of(saved(dataset, tmp_path / "c")).any()
    assert set(np.unique(pixels_of(shipped("liver_1frame.dcm")))) == {0, 255}  # one bit a pixel


WINDOW = {"WindowCenter": 40, "WindowWidth": 400}


@pytest.mark.parametrize(
    ("keyword", "others"),
    [
        *((keyword, WINDOW) for keyword in ("VOILUTFunction", "RescaleSlope", "RescaleIntercept", *WINDOW)),
        *((keyword, {}) for keyword in ("PixelPaddingValue", "NumberOfFrames", "VOILUTSequence")),
        ("PixelPaddingRangeLimit", {"PixelPaddingValue": -1000}),
    ],
)
def test_an_empty_element_counts_as_absent(keyword, others, tmp_path):
    dataset, _ = uncompressed(**others)
    dataset.pop(keyword, None)
    absent = pixels_of(saved(dataset, tmp_path / "absent"))
    dataset.add_new(keyword, dictionary_VR(keyword).split()[-1], None)  # as anonymisers leave it
    np.testing.assert_array_equal(pixels_of(saved(dataset, tmp_path / "empty")), absent)


@pytest.mark.parametrize(
    ("function", "width"), [("LINEAR", 0), ("LINEAR", 0.5), ("LINEAR_EXACT", 0), ("SIGMOID", 0), ("SIGMOID", [-1, 9])]
)
def test_a_window_of_a_forbidden_width_counts_as_absent(function, width, tmp_path):
    dataset, values = uncompressed(WindowCenter=[40, 40], WindowWidth=width, VOILUTFunction=function)
    expected = ((values - values.min()) / (values.max() - values.min()) * 255).round()
    np.testing.assert_array_equal(pixels_of(saved(dataset, tmp_path / "ct")), expected)


@pytest.mark.parametrize("depth", [8, 12, 16])
def test_lookup_tables(depth, tmp_path):
    dataset, _ = uncompressed()
    del dataset.RescaleSlope, dataset.RescaleIntercept
    modality, voi = Dataset(), Dataset()
    modality.LUTDescriptor, modality.ModalityLUTType = [2048, -1000, 16], "US"
    modality.add_new("LUTData", "US", [2 * index for index in range(2048)])
    entries = [int((index / 4095) ** 2 * (2**depth - 1)) for index in range(4096)]
    voi.LUTDescriptor = [4096, 0, depth]
    voi.add_new("LUTData", "US", entries)
    dataset.ModalityLUTSequence, dataset.VOILUTSequence = [modality], [voi]
    dataset.WindowCenter, dataset.WindowWidth = 1, 2  # the table comes first
    values = np.clip(2 * np.arange(2048).reshape(32, 64), 0, 4095)
    expected = (np.array(entries)[values] / (2**depth - 1) * 255).round()
    path = saved(dataset, tmp_path / "tables")
    np.testing.assert_array_equal(pixels_of(path), expected)


def test_enhanced_files_have_a_window_for_each_frame(tmp_path):
    dataset, _ = uncompressed()
    del dataset.RescaleSlope, dataset.RescaleIntercept
    stored = np.frombuffer(dataset.PixelData, np.int16).reshape(32, 64)
    dataset.PixelData, dataset.NumberOfFrames = np.stack([stored, stored]).tobytes(), 2
    shared, rescale = Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 3, 50, "US"
    shared.PixelValueTransformationSequence = [rescale]
    dataset.SharedFunctionalGroupsSequence, frames = [shared], []
    for center, width in ((0, 500), (1000, 200)):
        window, frame = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = center, width
        frame.FrameVOILUTSequence = [window]
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = frames
    path = saved(dataset, tmp_path / "enhanced")
    for frame, window in enumerate(((0, 500), (1000, 200))):
        np.testing.assert_array_equal(pixels_of(path, frame), linear(stored * 3.0 + 50, *window).round())


def test_frames_are_chosen_by_number_and_the_middle_is_the_default():
    path = shipped("rtdose.dcm")
    values = pydicom.dcmread(path).pixel_array
    assert count_frames(path) == 15
    for frame, index in ((None, 7), (0, 0), (14, 14)):
        low, high = values[index].min(), values[index].max()
        np.testing.assert_array_equal(pixels_of(path, frame), ((values[index] - low) / (high - low) * 255).round())
    np.testing.assert_array_equal(pixels_of(shipped("rtdose_rle.dcm")), pixels_of(path))
    for frame in (15, -1):
        with pytest.raises(ValueError, match=f"has no frame {frame}: it has 15, numbered from 0 to 14"):
            open_picture(path, frame)


def test_colours(tmp_path):
    rgb = pydicom.dcmread(shipped("examples_rgb_color.dcm")).pixel_array
    np.testing.assert_array_equal(pixels_of(shipped("examples_rgb_color.dcm")), rgb)
    bars = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)]
    for name in ("SC_rgb_rle.dcm", "SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm", "SC_ybr_full_422_uncompressed.dcm"):
        picture = open_picture(shipped(name))
        assert picture.mode == "RGB"
        for colour, row in zip(bars, (5, 25, 45, 65, 95), strict=True):
            assert max(abs(a - b) for a, b in zip(picture.getpixel((50, row)), colour, strict=True)) <= 5, name
    path = shipped("examples_ybr_color.dcm")  # a cine of JPEG frames
    jpeg = next(pydicom.encaps.generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=30))
    (tmp_path / "frame.jpg").write_bytes(jpeg)
    difference = pixels_of(path, 0).astype(int) - np.asarray(Image.open(tmp_path / "frame.jpg").convert("RGB"))
    assert count_frames(path) == 30 and abs(difference).max() <= 3
    dataset = pydicom.dcmread(shipped("examples_palette.dcm"))
    tables = [
        np.frombuffer(dataset[f"{colour}PaletteColorLookupTableData"].value, "<u2")
        for colour in ("Red", "Green", "Blue")
    ]
    expected = np.stack([table[dataset.pixel_array] >> 8 for table in tables], axis=-1)
    np.testing.assert_array_equal(pixels_of(shipped("examples_palette.dcm")), expected)


def test_compressed_files_show_what_the_uncompressed_show(tmp_path):
    for name in (
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_bigendian.dcm",
    ):
        np.testing.assert_array_equal(pixels_of(shipped(name)), pixels_of(shipped("MR_small.dcm")))
    for name in ("examples_jpeg2k.dcm", "SC_rgb_jpeg_gdcm.dcm", "image_dfl.dcm", "693_J2KI.dcm"):
        assert pixels_of(shipped(name)).std() > 30
    dataset = pydicom.dcmread(shipped("MR_small_jp2klossless.dcm"))
    for syntax, message in (
        (HTJ2KLossless, r"no decoder for it is installed; one suffices: .*pylibjpeg-openjpeg"),
        (MPEG2MPML, "compressed as MPEG2 Main Profile / Main Level, which pydicom does not read"),
    ):
        dataset.file_meta.TransferSyntaxUID = syntax
        with pytest.raises(ValueError, match=message):
            open_picture(saved(dataset, tmp_path / "compressed"))


def test_files_that_cannot_be_shown(tmp_path):
    rgb = pydicom.dcmread(shipped("examples_rgb_color.dcm"))
    rgb.PhotometricInterpretation = "HSV"
    for path, message in (
        (shipped("reportsi.dcm"), "is a DICOM file without pixels"),
        (shipped("dicomdirtests/DICOMDIR"), "is a DICOM file without pixels"),
        (shipped("MR_truncated.dcm"), r"pixels cannot be decoded: it is damaged\.$"),
        (shipped("JPEG-lossy.dcm"), "needs a decoder that is not installed: .*pylibjpeg-libjpeg"),
        (shipped("badVR.dcm"), "cannot be read: it is damaged"),
        (shipped("no_meta.dcm"), "neither DICOM nor NIfTI nor of a format that Pillow knows"),
        (saved(rgb, tmp_path / "hsv"), "those that can: MONOCHROME1, MONOCHROME2, RGB"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_picture(path)
        assert "\n" not in str(error.value)


def test_nothing_of_the_patient_leaves_the_file(tmp_path, capfd, caplog, recwarn):
    dataset, _ = uncompressed(WindowCenter=40, WindowWidth=400)
    names = [element for element in dataset.iterall() if element.tag.group not in (0x0028, 0x7FE0)]
    for element in names:  # also of types that forbid it, about which pydicom warns and quotes it
        if element.VR in ("PN", "LO", "SH", "ST", "DA", "TM", "AS"):
            element._value = pydicom.valuerep.PersonName("Doe^Jane") if element.VR == "PN" else "Doe^Jane"
    with pydicom.config.disable_value_validation():
        good = saved(dataset, tmp_path / "good")
        dataset.PixelData = dataset.PixelData[:100]
        cut = saved(dataset, tmp_path / "cut")
        dataset.NumberOfFrames = "1"
        wrong = saved(dataset, tmp_path / "wrong")
    wrong.write_bytes(wrong.read_bytes().replace(b"\x28\0\x08\0IS\x02\0001 ", b"\x28\0\x08\0IS\x08\0Doe^Jane"))
    assert b"Doe^Jane" in good.read_bytes()
    caplog.set_level(logging.DEBUG)
    picture = open_picture(good)
    assert not picture.info and not picture.getexif()
    picture.save(tmp_path / "out.png")
    assert b"Doe" not in (tmp_path / "out.png").read_bytes()
    for path in (cut, wrong):
        with pytest.raises(ValueError, match="damaged") as error:
            open_picture(path)
        assert "Doe" not in repr(error.value) and error.value.__suppress_context__
    said = [*capfd.readouterr(), caplog.text, *(str(warning.message) for warning in recwarn)]
    assert "Doe" not in "".join(said)
