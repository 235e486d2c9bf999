"""Files that are small but hold very much: the memory that they take is bounded, and the bound can be raised."""

import itertools
import json
import os
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image, ImageFile
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from healthgpt.errors_healthgpt import HealthGPTError
from healthgpt.images_healthgpt import load_picture
from healthgpt.medical import count_frames, open_picture

LIMIT = "HEALTHGPT_MAX_IMAGE_PIXELS"
STATUS = Path("/proc/self/status")
# Reads files one after the other and prints what came out and how far the memory rose meanwhile, in MB.
MEASURE = """
import json, sys
import healthgpt.medical.dicom, healthgpt.medical.nifti
from healthgpt.medical import open_picture
from transformers import AutoProcessor

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(name))

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
first, *files = sys.argv[2:]
processor(open_picture(first), "<image>")
for file in files:
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = memory("VmRSS")
    try:
        picture = open_picture(file)
        size = picture.size
        del picture
        if file.endswith((".png", ".jpg")):
            processor(file, "<image>")
    except ValueError as error:
        size = str(error)
    print(json.dumps([size, memory("VmHWM") - before]))
"""


def png(path, width, height):
    """A black image of one bit a pixel."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes(height * (1 + -(-width // 8))))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def dicom(path, frames, rows, columns):
    """Frames whose grey is their number."""
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = frames, rows, columns
    dataset.WindowCenter, dataset.WindowWidth, dataset.RescaleIntercept, dataset.RescaleSlope = 128, 256, 0, 1
    values = np.broadcast_to(np.arange(frames, dtype=np.int16)[:, None, None], (frames, rows, columns))
    dataset.PixelData = values.tobytes()
    dataset.save_as(path)
    return path


def nifti(path, shape, affine=None):
    values = np.broadcast_to(np.arange(shape[2], dtype=np.int16), shape)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def scaled(path, shape):
    """Black voxels of 8 bits that reading makes floats of 64."""
    volume = nibabel.Nifti2Image(np.zeros(shape, np.uint8), np.eye(4))
    volume.header.set_slope_inter(2, 0)
    nibabel.save(volume, path)
    assert nibabel.load(path).dataobj.slope == 2
    return path


def tiff(path, width, height, tile):
    """Greys in one tile, compressed by Deflate."""
    content = zlib.compress(bytes(tile * tile), 1)
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 8, 325: len(content)}
    place = 8 + len(content) + len(content) % 2
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", place) + content.ljust(place - 8, b"\0")
    path.write_bytes(head + struct.pack("<H", len(tags)) + directory + bytes(4))
    return path


def compressed(path, syntax, frame):
    """A frame in a data set that says that it has 16 x 16 greys of 8 bits."""
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.Rows = dataset.Columns = 16
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)
    return path


def grey_image(kind, side):
    """A black image as a file's bytes."""
    file = BytesIO()
    Image.new("L", (side, side)).save(file, kind, no_jp2=True)
    return file.getvalue()


def run_lengths(size):
    """Zeros as one segment of RLE."""
    return struct.pack("<16L", 1, 64, *[0] * 14) + b"\x81\0" * (size // 128)


def large_tiff(path, width, height, rows=None, tile=None):
    """Greys that are black at the left and white at the right, compressed by Deflate."""
    row = np.linspace(0, 255, width).round().astype(np.uint8)
    if tile:
        padded = np.pad(row, (0, -width % tile))
        columns = [zlib.compress(np.tile(part, tile).tobytes(), 1) for part in np.split(padded, len(padded) // tile)]
        contents, down = columns, -(-height // tile)
    else:
        contents, down = [zlib.compress(np.tile(row, rows).tobytes(), 1)], height // rows
    places = list(itertools.accumulate(map(len, contents[:-1]), initial=16))
    tags = {256: [width], 257: [height], 258: [8], 259: [8], 262: [1], 277: [1]}
    tags |= {322: [tile], 323: [tile]} if tile else {278: [rows]}
    tags |= dict(zip((324, 325) if tile else (273, 279), (places * down, [*map(len, contents)] * down), strict=True))
    return directory(path, contents, tags)


def directory(path, contents, tags):
    """A TIFF file whose strips or tiles begin at byte 16, all tags 32-bit numbers."""
    body = b"".join(contents)
    place = 16 + len(body) + len(body) % 2
    entries, longer = b"", b""
    for tag, values in sorted(tags.items()):
        value = values[0] if len(values) == 1 else place + 2 + 12 * len(tags) + 4 + len(longer)
        longer += b"" if len(values) == 1 else struct.pack(f"<{len(values)}I", *values)
        entries += struct.pack("<HHII", tag, 4, len(values), value)
    head = (b"II*\0" + struct.pack("<I", place)).ljust(16, b"\0")
    path.write_bytes(head + body.ljust(place - 16, b"\0") + struct.pack("<H", len(tags)) + entries + bytes(4) + longer)
    return path


def jpeg_2000(path, width, height):
    Image.new("L", (width, height), 77).save(path, "JPEG2000", tile_size=(1024, 1024))
    return path


@pytest.mark.skipif(not STATUS.exists(), reason="the peak of the memory is read from Linux's /proc")
def test_memory_stays_bounded(checkpoints, tmp_path):
    turned = np.eye(4)[[2, 0, 1, 3]]  # the last axis of the file goes to the right
    Image.new("RGB", (4000, 3000), (90, 60, 30)).save(tmp_path / "large.jpg")
    files = {
        png(tmp_path / "bomb.png", 13300, 13300): ("13300 x 13300", 30),
        png(tmp_path / "large.png", 4000, 3000): ([4000, 3000], 16 * 12),
        tmp_path / "large.jpg": ([4000, 3000], 16 * 12),
        png(tmp_path / "narrow.png", 20000, 400): ("20000 x 20000", 16 * 8),
        nifti(tmp_path / "volume.nii.gz", (250, 250, 400)): ([250, 250], 25),
        nifti(tmp_path / "turned.nii.gz", (250, 250, 400), turned): ([400, 250], 25),
        dicom(tmp_path / "frames.dcm", 100, 512, 512): ([512, 512], 25),
        dicom(tmp_path / "large.dcm", 1, 3000, 4000): ([4000, 3000], 16 * 12),
        scaled(tmp_path / "scaled.nii.gz", (4000, 4000, 2)): ([4000, 4000], 16 * 5),
        scaled(tmp_path / "line.nii.gz", (2**24, 1, 2)): ([2**24, 1], 16 * 5),
        tiff(tmp_path / "tile.tiff", 64, 64, 9000): ("9000 x 9000", 30),
        large_tiff(tmp_path / "tiles.tiff", 12000, 12000, tile=256): ([6000, 6000], 4 * 36 + 60),
        large_tiff(tmp_path / "strips.tiff", 12000, 12000, rows=50): ([6000, 6000], 4 * 36 + 60),
        large_tiff(tmp_path / "very_large.tiff", 40000, 30000, tile=512): ([5000, 3750], 4 * 19 + 130),
        large_tiff(tmp_path / "strip.tiff", 12000, 12000, rows=12000): ("12000 x 12000", 30),
        jpeg_2000(tmp_path / "tiles.jp2", 9000, 9000): ([4500, 4500], 20 + 200),
        tmp_path / "icon.ico": ("icon", 30),
        compressed(tmp_path / "jpeg.dcm", JPEGBaseline8Bit, grey_image("JPEG", 8000)): ("16 x 16", 30),
        compressed(tmp_path / "jpeg2000.dcm", JPEG2000Lossless, grey_image("JPEG2000", 4000)): ("16 x 16", 30),
        compressed(tmp_path / "rle.dcm", RLELossless, run_lengths(2**26)): ("16 x 16", 30),
    }
    (tmp_path / "icon.ico").write_bytes(
        struct.pack("<HHH4BHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, os.path.getsize(tmp_path / "bomb.png"), 22)
        + (tmp_path / "bomb.png").read_bytes()
    )
    png(tmp_path / "first.png", 64, 64)
    command = [sys.executable, "-c", MEASURE, checkpoints("xl32").folder, tmp_path / "first.png", *files]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    for (file, (expected, most)), (size, rise) in zip(files.items(), lines, strict=True):
        refused = isinstance(expected, str)
        can_be_raised = file.name not in ("jpeg.dcm", "jpeg2000.dcm", "rle.dcm", "icon.ico")  # damaged, or never read
        assert (expected in size and (LIMIT in size) == can_be_raised) if refused else size == expected, (file, size)
        assert rise < most, f"{file.name} took {rise:.0f} MB"


def test_a_limit_that_can_be_raised_holds_for_every_format(tmp_path, monkeypatch):
    files = [
        png(tmp_path / "image.png", 60, 50),
        dicom(tmp_path / "image.dcm", 2, 50, 60),
        nifti(tmp_path / "slices.nii.gz", (60, 50, 4)),
        nifti(tmp_path / "slabs.nii", (60, 50, 4), np.eye(4)[[2, 0, 1, 3]]),
    ]
    monkeypatch.setenv(LIMIT, "2999")
    for file in files:
        with pytest.raises(HealthGPTError, match=f"{file.name}.* has 60 x 50 pixels, .*{LIMIT} is set to a higher"):
            open_picture(file)
    monkeypatch.setenv(LIMIT, "3000")
    for file in files:
        assert open_picture(file).size == ((4, 60) if file.name == "slabs.nii" else (60, 50))


def test_a_frame_is_read_from_its_place(tmp_path):
    path = dicom(tmp_path / "frames.dcm", 5, 30, 40)
    assert count_frames(path) == 5
    assert [open_picture(path, frame).getextrema() for frame in range(5)] == [(grey, grey) for grey in range(5)]


def test_deflated_files_are_bounded(tmp_path, monkeypatch):
    dataset = pydicom.dcmread(dicom(tmp_path / "frames.dcm", 5, 30, 40))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "deflated.dcm")
    assert open_picture(tmp_path / "deflated.dcm", 3).getextrema() == (3, 3)
    monkeypatch.setenv(LIMIT, "2000")  # 8000 bytes, and there are 12000 of pixels
    with pytest.raises(HealthGPTError, match=f"deflated DICOM file of more than 8000 bytes, .*{LIMIT} is set to a hi"):
        open_picture(tmp_path / "deflated.dcm")


def test_compressed_frames_are_no_larger_than_their_tags_say(tmp_path):
    path = tmp_path / "image.dcm"
    file = BytesIO()
    Image.new("L", (17, 16)).save(file, "JPEG2000")  # in the boxes of a file
    jpeg_ls = pydicom.dcmread(get_testdata_file("MR_small_jpeg_ls_lossless.dcm", download=False))
    frames = {
        (JPEGBaseline8Bit, "JPEG"): grey_image("JPEG", 17),
        (JPEG2000Lossless, "JPEG 2000"): grey_image("JPEG2000", 17),
        (JPEG2000Lossless, "boxes"): file.getvalue(),
        (RLELossless, "RLE"): run_lengths(1024),
        (jpeg_ls.file_meta.TransferSyntaxUID, "JPEG-LS"): get_frame(jpeg_ls.PixelData, 0),
    }
    for (syntax, _), frame in frames.items():
        with pytest.raises(HealthGPTError, match=r"image.dcm.* a compressed frame holds more than the 16 x 16 pixels"):
            open_picture(compressed(path, syntax, frame))
    for syntax, frame in (
        (JPEGBaseline8Bit, grey_image("JPEG", 16)),
        (JPEG2000Lossless, grey_image("JPEG2000", 16)),
        (RLELossless, run_lengths(256)),
        (RLELossless, run_lengths(384)),  # with padding
    ):
        assert open_picture(compressed(path, syntax, frame)).size == (16, 16)
        for length in (1, 40, 62):
            with pytest.raises(HealthGPTError, match="damaged"):
                open_picture(compressed(path, syntax, frame[:length]))


def test_a_tile_of_a_tiff_may_be_larger_than_the_image_but_not_than_the_limit(tmp_path, monkeypatch):
    path = tiff(tmp_path / "tile.tiff", 60, 50, 64)
    monkeypatch.setenv(LIMIT, "4096")
    assert open_picture(path).size == load_picture(str(path)).size == (60, 50)
    monkeypatch.setenv(LIMIT, "4095")
    for read, image in ((open_picture, path), (load_picture, str(path)), (load_picture, Image.open(path))):
        with pytest.raises(HealthGPTError, match=f"a tile of it has 64 x 64 pixels, .*{LIMIT} is set to a higher"):
            read(image)


def test_icons_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    for name in ("icon.ico", "icon.icns"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "__init__", lambda *_: pytest.fail("Pillow reads it"))
            with pytest.raises(HealthGPTError, match=f"{name}.* icon of Windows or macOS"):
                open_picture(tmp_path / name)
            with pytest.raises(HealthGPTError, match="icon of Windows or macOS"):
                load_picture((tmp_path / name).read_bytes())
        with pytest.raises(HealthGPTError, match="icon of Windows or macOS"):
            load_picture(Image.open(tmp_path / name))


def test_frames_before_the_wanted_one_are_bounded_too(tmp_path, monkeypatch):
    frames = [Image.new("L", (60, 50), grey) for grey in (10, 200, 90)]
    for name in ("frames.gif", "frames.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        monkeypatch.setenv(LIMIT, "3000")
        assert open_picture(tmp_path / name, 2).convert("L").getpixel((0, 0)) == 90
        monkeypatch.setenv(LIMIT, "2999")
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("a frame is decoded"))
            with pytest.raises(HealthGPTError, match=f"{name}.* has 60 x 50 pixels"):
                open_picture(tmp_path / name, 2)


def test_a_jpeg_over_the_limit_is_read_smaller(tmp_path, monkeypatch):
    Image.radial_gradient("L").save(tmp_path / "image.jpg")
    whole = open_picture(tmp_path / "image.jpg")
    monkeypatch.setenv(LIMIT, "20000")
    smaller = open_picture(tmp_path / "image.jpg")
    assert smaller.size == (128, 128)
    assert abs(np.asarray(whole.resize((128, 128)), float) - np.asarray(smaller)).mean() < 4


def noise(width, height, mode="RGB"):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    if mode == "F":
        return Image.fromarray(values[..., 0].astype(np.float32) * 10)
    return (
        Image.fromarray(values[..., 0].astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(values).convert(mode)
    )


@pytest.mark.parametrize("part", [2, 4, 8])
@pytest.mark.parametrize(
    ("mode", "compression", "tags"),
    [
        ("RGB", None, {278: 7}),
        ("RGB", None, {278: 530}),
        ("RGB", "tiff_lzw", {278: 5}),
        ("RGB", "tiff_adobe_deflate", {274: 6, 278: 7}),  # turned by 90 degrees
        ("L", "jpeg", {278: 8}),
        ("1", "group4", {278: 8}),
        ("P", "packbits", {278: 3}),
        ("RGBA", "tiff_lzw", {278: 1}),
        ("CMYK", None, {}),
        ("I;16", "tiff_adobe_deflate", {278: 6}),
        ("F", "tiff_adobe_deflate", {278: 6}),
    ],
)
def test_a_tiff_over_the_limit_is_the_mean_of_its_pixels(tmp_path, monkeypatch, mode, compression, tags, part):
    noise(701, 530, mode).save(tmp_path / "image.tiff", compression=compression, tiffinfo=tags)
    whole = Image.open(tmp_path / "image.tiff")
    whole = whole.convert({"I;16": "I", "F": "F"}.get(mode, "RGB"))
    turned = 274 in tags  # blocks begin where the file does
    whole = whole.transpose(Image.Transpose.ROTATE_90) if turned else whole
    expected = whole.reduce(part)
    expected = expected.transpose(Image.Transpose.ROTATE_270) if turned else expected
    monkeypatch.setenv(LIMIT, str(expected.width * expected.height))
    drawn = open_picture(tmp_path / "image.tiff")
    assert drawn.size == expected.size
    expected = np.asarray(expected)
    if mode == "F":
        expected = ((expected - expected.min()) / (expected.max() - expected.min()) * 255).round()
    elif mode == "I;16":
        expected = np.repeat(expected[..., None] // 256, 3, axis=2)
    np.testing.assert_array_equal(np.asarray(drawn), expected)
    if mode != "F":
        assert load_picture((tmp_path / "image.tiff").read_bytes()).tobytes() == drawn.tobytes()


def test_tiles_over_the_limit_are_the_mean_of_their_pixels(tmp_path, monkeypatch):
    large_tiff(tmp_path / "tiles.tiff", 701, 530, tile=16)
    whole = Image.open(tmp_path / "tiles.tiff").convert("RGB")
    for part in (2, 4, 8):
        monkeypatch.setenv(LIMIT, str(-(-701 // part) * -(-530 // part)))
        if part < 8:
            assert open_picture(tmp_path / "tiles.tiff").tobytes() == whole.reduce(part).tobytes()
    with pytest.raises(HealthGPTError, match="a strip or row of tiles of it has 701 x 16"):  # a row of tiles
        monkeypatch.setenv(LIMIT, "8000")
        open_picture(tmp_path / "tiles.tiff")


def test_a_damaged_tiff_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(LIMIT, "100000")
    path = large_tiff(tmp_path / "image.tiff", 701, 530, tile=64)
    content = path.read_bytes()
    (place,) = struct.unpack_from("<I", content, 4)
    entries = {
        struct.unpack_from("<H", content, place + 2 + 12 * index)[0]: place + 2 + 12 * index for index in range(10)
    }
    assert open_picture(path).size == (351, 265)
    for tag, count, value in (
        (322, 1, 0),
        (277, 1, 0),
        (324, 2, 5),  # too few places
        (325, 99, 2**20),  # sizes read from beyond the end
        (259, 1, 7),
        (323, 1, 2**31),
    ):
        damaged = bytearray(content)
        struct.pack_into("<II", damaged, entries[tag] + 4, count, value)
        path.write_bytes(damaged)
        with pytest.raises(HealthGPTError, match=r"image\.tiff"):
            open_picture(path)
    sizes = struct.unpack_from("<I", content, entries[325] + 8)[0]
    damaged = bytearray(content)
    struct.pack_into("<I", damaged, sizes, 2**31)
    path.write_bytes(damaged)
    with pytest.raises(HealthGPTError, match="more bytes than their pixels"):
        open_picture(path)


def test_a_jpeg_2000_over_the_limit_is_read_smaller(tmp_path, monkeypatch):
    image = Image.radial_gradient("L").resize((1001, 998))
    for name, options in (("a.jp2", {}), ("b.jp2", {"tile_size": (256, 256)}), ("c.j2k", {"no_jp2": True})):
        image.save(tmp_path / name, **options)
        for part, size in ((2, (501, 499)), (4, (251, 250)), (8, (126, 125))):
            monkeypatch.setenv(LIMIT, str(size[0] * size[1]))
            smaller = open_picture(tmp_path / name)
            assert smaller.size == load_picture((tmp_path / name).read_bytes()).size == size
            expected = np.asarray(image.reduce(part), float)
            assert abs(np.asarray(smaller.convert("L")) - expected).mean() < 3
    image.save(tmp_path / "d.jp2", num_resolutions=1)
    with pytest.raises(HealthGPTError, match=r"d.jp2.* 1001 x 998 pixels cannot be read at 1/8"):
        open_picture(tmp_path / "d.jp2")


def test_images_over_pillows_limit_are_read_smaller_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10000)
    monkeypatch.setenv(LIMIT, "10000")
    for name in ("image.jpg", "image.jp2", "image.tiff"):
        noise(300, 200).save(tmp_path / name, tiffinfo={278: 10})
        assert open_picture(tmp_path / name).size == (75, 50)
    noise(300, 200).save(tmp_path / "image.png")
    with pytest.raises(HealthGPTError, match=f"image.png.*{LIMIT} raises that limit"):
        open_picture(tmp_path / "image.png")


def test_smaller_copies_in_a_tiff_are_taken(tmp_path, monkeypatch):
    """The next pages that are called so and have the shape of the page: here another grey tells which one was read."""
    pages = [
        Image.new("L", size, grey)
        for size, grey in (((400, 300), 10), ((200, 150), 20), ((100, 75), 30), ((50, 50), 40))
    ]
    levels = [called_smaller(page, int(index > 0)) for index, page in enumerate(pages)]
    levels[0].save(tmp_path / "pyramid.tiff", save_all=True, append_images=levels[1:])
    for limit, size, grey in (
        (120000, (400, 300), 10),
        (30000, (200, 150), 20),
        (29999, (100, 75), 30),
        (2000, (50, 38), 30),  # the label is none of them
    ):
        monkeypatch.setenv(LIMIT, str(limit))
        drawn = open_picture(tmp_path / "pyramid.tiff")
        assert (drawn.size, drawn.getpixel((0, 0))) == (size, (grey, grey, grey))
    assert open_picture(tmp_path / "pyramid.tiff", 3).size == (25, 25)
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])  # not called so
    monkeypatch.setenv(LIMIT, "30000")
    assert open_picture(tmp_path / "pages.tiff").getpixel((0, 0)) == (10, 10, 10)


def spoil(monkeypatch, place):
    """A mistake of programming in a function of the package."""

    def mistaken(*args, **kwargs):
        raise TypeError("a mistake of programming")

    monkeypatch.setattr(place, mistaken)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("images_healthgpt.check_decoding", "image.png"),
        ("images_healthgpt._segments", "image.tiff"),
        ("images_healthgpt.fits", "image.png"),
        ("images_healthgpt.to_rgb_or_greys", "image.png"),
        ("medical.pictures.decode", "image.png"),
        ("medical.dicom.to_greys", "image.dcm"),
        ("medical.dicom.value_range", "open.dcm"),
        ("medical.dicom.fits", "jpeg.dcm"),
        ("medical.nifti.to_greys", "image.nii"),
        ("medical.nifti.check_extensions", "image.nii"),
    ],
)
def test_a_mistake_of_programming_is_not_shown_as_bad_input(tmp_path, monkeypatch, place, name):
    noise(30, 20).save(tmp_path / "image.png")
    noise(30, 20).save(tmp_path / "image.tiff")
    dicom(tmp_path / "image.dcm", 1, 20, 30)
    dataset = pydicom.dcmread(tmp_path / "image.dcm")
    del dataset.WindowCenter
    dataset.save_as(tmp_path / "open.dcm")
    compressed(tmp_path / "jpeg.dcm", JPEGBaseline8Bit, grey_image("JPEG", 16))
    nifti(tmp_path / "image.nii", (6, 5, 4))
    if name == "image.tiff":
        monkeypatch.setenv(LIMIT, "150")
    open_picture(tmp_path / name)
    spoil(monkeypatch, f"healthgpt.{place}")
    with pytest.raises(TypeError, match="a mistake of programming"):
        open_picture(tmp_path / name)
    if place.startswith("images"):
        with pytest.raises(TypeError, match="a mistake of programming"):
            load_picture(str(tmp_path / name))


def called_smaller(image, subfile):
    image = image.copy()
    image.encoderinfo = {"tiffinfo": {254: subfile, 278: 10}}
    return image


def test_large_extensions_of_a_volume_are_not_read(tmp_path):
    for name, image in (("1.nii", nibabel.Nifti1Image), ("2.nii.gz", nibabel.Nifti2Image)):
        volume = image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
        volume.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"seen"))
        nibabel.save(volume, tmp_path / name)
        assert open_picture(tmp_path / name).size == (3, 4)
        volume.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", bytes(2**25)))
        nibabel.save(volume, tmp_path / name)
        with pytest.raises(HealthGPTError, match=f"{name}.*its voxels begin after 16777216 bytes"):
            open_picture(tmp_path / name)
