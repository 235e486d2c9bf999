# Copyright 2026 The HealthGPT package authors.
# Licensed under the Apache License, Version 2.0 (see the file LICENSE).
"""Images of every kind that a user may give, as 8-bit RGB of Pillow, in bounded memory."""

import base64
import binascii
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO, UnsupportedOperation
from itertools import accumulate
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname, urlopen

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base as Tag
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from .errors_healthgpt import HealthGPTError

MAX_PIXELS = 2**26  # of one image, by default: 8192 x 8192
MAX_PIXELS_VARIABLE = "HEALTHGPT_MAX_IMAGE_PIXELS"
ICONS = (b"\0\0\1\0", b"icns")  # how files of Windows and macOS begin
NO_ICONS = "it is an icon of Windows or macOS; save the image that you want of it as a PNG file."
# How the pixels of a strip or tile of TIFF are stored.
STORED = (Tag.BitsPerSample, Tag.Compression, Tag.PhotometricInterpretation, Tag.FillOrder, Tag.SamplesPerPixel)
STORED += (
    Tag.PlanarConfiguration,
    Tag.T4Options,
    Tag.T6Options,
    Tag.Predictor,
    Tag.ColorMap,
    Tag.TileWidth,
    Tag.TileLength,
)
STORED += (Tag.InkSet, Tag.ExtraSamples, Tag.SampleFormat, Tag.JPEGTables, Tag.YCbCrSubSampling)
NOT_ZERO = (Tag.ImageWidth, Tag.ImageLength, Tag.SamplesPerPixel, Tag.RowsPerStrip, Tag.TileWidth, Tag.TileLength)
BAND = 256  # rows that are read of a TIFF at once, if its strips or tiles have no more
ACCEPTED = (
    "an image is a PIL image, an array or tensor of two dimensions or of three with 1, 3 or 4 channels (more of them at once have "
    "four dimensions), a path, an address (file, http, https or data), base64 text, bytes, a binary file, or a dictionary with "
    "'bytes' or 'path'"
)
UNKNOWN = "it is no file, URL or base64 data of a picture format that Pillow knows"


def max_pixels() -> int:
    """
    The most pixels that an image may have: `MAX_PIXELS`, or what the environment variable `HEALTHGPT_MAX_IMAGE_PIXELS` says. Pillow's
    own limit, `PIL.Image.MAX_IMAGE_PIXELS`, is raised with the variable.

    Raises:
        HealthGPTError: if the variable is no number of pixels.
    """
    text = os.environ.get(MAX_PIXELS_VARIABLE)
    if text is None:
        return MAX_PIXELS
    if not (text.isascii() and text.isdigit() and int(text)):
        raise HealthGPTError(f"{MAX_PIXELS_VARIABLE} is a number of pixels of at least 1, got {text[:200]!r}.")
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, int(text))
    return int(text)


def check_pixels(width: int, height: int, what: str = "it") -> None:
    """
    Refuses an image that would take too much memory.

    Raises:
        HealthGPTError: if it has more than `max_pixels()` pixels; the sentence begins with `what`.
    """
    if width * height > max_pixels():
        raise HealthGPTError(
            f"{what} has {width} x {height} pixels, and more than {max_pixels()} are not taken unless the environment variable "
            f"{MAX_PIXELS_VARIABLE} is set to a higher number."
        )


@contextmanager
def library() -> Iterator[None]:
    """
    Calls of Pillow, transformers, urllib or base64 with what a user gave, and nothing else: they raise a dozen types for it.

    Raises:
        HealthGPTError: for all of them, with the first line of what they say.
    """
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).split("\n")[0].rstrip(".")
        if isinstance(error, Image.DecompressionBombError):
            reason += f"; the environment variable {MAX_PIXELS_VARIABLE} raises that limit"
        raise HealthGPTError(f"{reason}.") from error


@contextmanager
def reading(image, unknown: str = UNKNOWN) -> Iterator[None]:
    """
    The reading of an image, which what goes wrong meanwhile names.

    Args:
        image: What is read, of any type.
        unknown (`str`, *optional*): What to say of a file that no reader knows.

    Raises:
        HealthGPTError: in place of one that does not name the image.
    """
    try:
        yield
    except HealthGPTError as error:
        is_unknown = isinstance(error.__cause__, (binascii.Error, UnidentifiedImageError))
        reason = unknown if is_unknown else str(error).rstrip(".")
        name = (
            repr(str(image)[:200]) if isinstance(image, (str, Path)) else f"An object of type {type(image).__name__}"
        )
        raise HealthGPTError(f"{name} is not a picture that can be read: {reason}.") from error


def open_image(file) -> Image.Image:
    """
    Opens a file of a format that Pillow knows, but for icons, for [`decode`].

    Args:
        file (`str`, `Path` or binary file): What `PIL.Image.open` takes.

    Raises:
        HealthGPTError: if it cannot be read, or is an icon.
    """
    max_pixels()  # raises Pillow's limit
    if isinstance(file, (str, Path)):
        with library(), open(file, "rb") as opened:
            start = opened.read(4)
    else:
        with library():
            try:
                file.seek(0)
            except (AttributeError, UnsupportedOperation):
                file = BytesIO(file.read())
            start = file.read(4)
            file.seek(0)
    if start in ICONS:  # Pillow decodes them on opening, whatever their size
        raise HealthGPTError(NO_ICONS)
    with library():
        try:
            return Image.open(file)
        except Image.DecompressionBombError:
            for reader in (JpegImageFile, Jpeg2KImageFile, TiffImageFile):  # which may be read smaller
                with suppress(SyntaxError):  # Pillow's word for another format
                    if not isinstance(file, (str, Path)):
                        file.seek(0)
                    picture = reader(file)
                    if not fits(picture.size):
                        return picture
            raise


def decode(picture: Image.Image) -> Image.Image:
    """
    Reads an open file. If it has more than `max_pixels()` pixels, it is read at a half, a quarter or an eighth of its height and
    width, the largest that fits: JPEG but for progressive ones, JPEG 2000, and TIFF, of which a smaller copy in the file is taken
    if it has some. All others are only decoded whole.

    Args:
        picture (`PIL.Image.Image`): From `open_image`.

    Returns:
        `PIL.Image.Image`: Loaded; the same one, unless it is a TIFF file that is read smaller.

    Raises:
        HealthGPTError: if the image has too many pixels, or is damaged.
    """
    if picture.format == "TIFF" and not fits(picture.size):
        _seek_smaller(picture)
    width, height = picture.size
    part = next((part for part in (1, 2, 4, 8) if fits(picture.size, part)), 1)
    if part > 1 and picture.format == "TIFF":
        return _decode_bands(picture, part)
    if part > 1 and picture.format == "JPEG" and not picture.info.get("progressive"):
        with library():
            picture.draft(picture.mode, (width // part, height // part))
    if part > 1 and picture.format == "JPEG2000":
        picture.reduce = part.bit_length() - 1
        # Pillow rounds to the nearest where OpenJPEG rounds up, and then refuses the file.
        picture._size = tuple(-(-side // part) * part for side in picture.size)
        try:
            with library():
                picture.load()
        except HealthGPTError as error:
            raise HealthGPTError(
                f"its {width} x {height} pixels cannot be read at 1/{part} of their size: {error}"
            ) from error
    check_decoding(picture)
    with library():
        picture.load()
    return picture


def fits(size: tuple[int, int], part: int = 1) -> bool:
    """Whether an image of a width and height, read at `1 / part` of them, has at most `max_pixels()` pixels."""
    width, height = size
    return -(-width // part) * -(-height // part) <= max_pixels()


def check_decoding(picture: Image.Image) -> None:
    """
    Refuses an image that would take too much memory, itself or a tile of a TIFF file, which may be far larger than the image.

    Raises:
        HealthGPTError: if one of them has more than `max_pixels()` pixels, or the image is an icon, in which there may be larger ones.
    """
    check_pixels(*picture.size)
    if picture.format in ("ICO", "ICNS"):
        raise HealthGPTError(NO_ICONS)
    if picture.format == "TIFF":
        tile = [picture.tag_v2.get(tag) for tag in (Tag.TileWidth, Tag.TileLength)]
        if all(isinstance(side, int) for side in tile):
            check_pixels(*tile, "a tile of it")


def _seek_smaller(picture):
    """Of a TIFF page that is too large, turns to the largest of its smaller copies that fits, else to the smallest: the next pages."""
    chosen, (width, height) = picture.tell(), picture.size
    while not fits(picture.size):
        try:
            picture.seek(picture.tell() + 1)
        except Exception:  # no further page, or none that Pillow knows, of a dozen types
            break
        # Also labels and other images are called smaller copies: they have another shape.
        off = abs(picture.width * height - picture.height * width)
        if not picture.tag_v2.get(Tag.NewSubfileType, 0) & 1 or off > max(width, height) or picture.width >= width:
            break
        chosen = picture.tell()
    with library():
        picture.seek(chosen)


def _decode_bands(picture, part):
    """A TIFF page at `1 / part` of its size, each pixel the mean of `part` times `part`: a band of rows after the other."""
    tags = picture.tag_v2
    width, height = (_numbers(tags, tag)[0] for tag in (Tag.ImageWidth, Tag.ImageLength))  # before it is turned
    unit, segments = _segments(tags, width, height)
    fields = {tag: tags[tag] for tag in STORED if tag in tags}
    fields = {tag: value if isinstance(value, bytes) else _numbers(tags, tag) for tag, value in fields.items()}
    fields |= {Tag.ImageWidth: (width,)} | ({Tag.RowsPerStrip: (unit,)} if Tag.TileOffsets not in tags else {})
    check_pixels(width, min(unit, height), "a strip or row of tiles of it")
    step = max(part, min(max(BAND, unit), max_pixels() // width) // part * part)
    reduced = None
    for top in range(0, height, step):
        bottom = min(top + step, height)
        first, last = top // unit, -(-bottom // unit)
        rows = min(last * unit, height) - first * unit
        places = segments(first, last)
        if sum(size for _, size in places) > 8 * width * rows + 2**20:
            raise HealthGPTError("its strips or tiles have more bytes than their pixels.")
        with library():
            contents = [picture.fp.read(size) for place, size in places if picture.fp.seek(place) >= 0]
        band = _tiff(contents, fields | {Tag.ImageLength: (rows,)}, "<" if tags.prefix == b"II" else ">")
        with library():
            band = TiffImageFile(BytesIO(band))
            band.load()
        band = to_rgb_or_greys(band).reduce(part, (0, top - first * unit, width, bottom - first * unit))
        if reduced is None:
            reduced = Image.new(band.mode, (-(-width // part), -(-height // part)))
        reduced.paste(band, (0, top // part))
    reduced.getexif()[Tag.Orientation] = tags.get(Tag.Orientation, 1)
    ImageOps.exif_transpose(reduced, in_place=True)
    return reduced


def _segments(tags, width, height):
    """
    The strips or tiles of a TIFF page: how many rows of pixels one has, and a function that gives places in the file and numbers of
    bytes of those from one row of them to before another. Of strips that are not compressed, every row of pixels counts as one.
    """
    tiled = Tag.TileOffsets in tags
    rows = _numbers(tags, Tag.TileLength)[0] if tiled else min(_numbers(tags, Tag.RowsPerStrip, height)[0], height)
    across, down = -(-width // _numbers(tags, Tag.TileWidth)[0]) if tiled else 1, -(-height // rows)
    samples = _numbers(tags, Tag.SamplesPerPixel, 1)[0]
    planes = samples if _numbers(tags, Tag.PlanarConfiguration, 1)[0] == 2 else 1
    is_raw = not tiled and _numbers(tags, Tag.Compression, 1)[0] == 1
    places = _numbers(tags, Tag.TileOffsets if tiled else Tag.StripOffsets)
    sizes = places if is_raw else _numbers(tags, Tag.TileByteCounts if tiled else Tag.StripByteCounts)
    if min(len(places), len(sizes)) < planes * down * across:
        raise HealthGPTError("some of its strips or tiles are missing.")
    if is_raw:
        row = -(-width * _numbers(tags, Tag.BitsPerSample, 1)[0] * (samples // planes) // 8)
        return 1, lambda first, last: [
            (places[plane * down + number // rows] + number % rows * row, row)
            for plane in range(planes)
            for number in range(first, last)
        ]
    return rows, lambda first, last: [
        (places[number], sizes[number])
        for plane in range(planes)
        for number in range((plane * down + first) * across, (plane * down + last) * across)
    ]


def _numbers(tags, tag, *default):
    """The values of a TIFF tag."""
    values = tags.get(tag, default)
    values = values if isinstance(values, tuple) else (values,)
    least, bits = tag in NOT_ZERO, 64 if tag in (Tag.StripOffsets, Tag.TileOffsets) else 32
    if not values or not all(isinstance(value, int) and least <= value < 2**bits for value in values):
        raise HealthGPTError(f"its TIFF tag {tag} is missing or damaged.")
    return values


def _tiff(contents, fields, order):
    """A TIFF file of strips or tiles: their contents, then the tags, numbers of 32 bits or bytes, then what takes more than 4 bytes."""
    sizes = [len(content) for content in contents]
    places = list(accumulate(sizes[:-1], initial=8))
    body = b"".join(contents)
    body += bytes(len(body) % 2)
    if Tag.TileWidth in fields:
        fields = fields | {Tag.TileOffsets: places, Tag.TileByteCounts: sizes}
    else:
        fields = fields | {Tag.StripOffsets: places, Tag.StripByteCounts: sizes}
    directory, longer = struct.pack(f"{order}H", len(fields)), b""
    start = 8 + len(body)
    for tag, values in sorted(fields.items()):
        data = values if isinstance(values, bytes) else struct.pack(f"{order}{len(values)}I", *values)
        directory += struct.pack(f"{order}HHI", tag, 7 if isinstance(values, bytes) else 4, len(values))
        if len(data) > 4:
            directory += struct.pack(f"{order}I", start + 2 + 12 * len(fields) + 4 + len(longer))
            longer += data + bytes(len(data) % 2)
        else:
            directory += data.ljust(4, b"\0")
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, start)
    return head + body + directory + bytes(4) + longer


def load_picture(image, image_size: int | None = None, input_data_format=None) -> Image.Image:
    """
    Reads an image of any kind as 8-bit RGB.

    Alpha is dropped as in the published scripts, palettes are resolved, and 16-bit greys keep their upper 8 bits. Floats go from 0
    to 1, or are whole numbers from 0 to 255.

    Args:
        image: PIL image, array or tensor (two dimensions, or three with 1, 3 or 4 channels), path, URL (also `file:` and `data:`),
            base64 text, bytes, binary file, or `{"bytes": ..., "path": ...}` as the `datasets` library has it.
        image_size (`int`, *optional*): Pixels per side that the vision tower sees, which limits how narrow an image may be;
            by default it may be of any shape.
        input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, of an array or tensor; by default told from
            its shape.

    Raises:
        HealthGPTError: if it is no image, is empty, has too many pixels, or has a side that would vanish.
    """
    image = _open_picture(image, input_data_format)
    check_size(*image.size, image_size)
    image = to_rgb_or_greys(image)
    return image if image.mode == "RGB" else _rescale_grey(image)


def to_rgb_or_greys(image: Image.Image) -> Image.Image:
    """A loaded image in mode `RGB`, without alpha; greys of more than 8 bits in mode `I` or `F`."""
    if image.mode in ("I", "F"):
        return image
    if image.mode.startswith("I;16"):
        return image.convert("I")
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha, from which Pillow finds no way to RGB
        image = image.convert(image.mode.upper())
    return image if type(image) is Image.Image and image.mode == "RGB" else image.convert("RGB")


def check_size(width: int, height: int, image_size: int | None) -> None:
    """
    Raises:
        HealthGPTError: if an image is empty, or has a side that would vanish at `image_size` pixels for the longer one.
    """
    if width == 0 or height == 0:
        raise HealthGPTError(f"The picture is empty: it has {width} x {height} pixels.")
    if image_size is not None and max(width, height) > image_size * min(width, height):
        raise HealthGPTError(
            f"The picture is too narrow: of its {width} x {height} pixels the shorter side would vanish when the longer "
            f"one is brought to {image_size}."
        )


def _open_picture(image, input_data_format):
    """A PIL image, read whole, of whatever `load_picture` takes."""
    if isinstance(image, Mapping) and not {"bytes", "path"}.isdisjoint(image):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    with reading(image):
        if isinstance(image, Image.Image):
            check_decoding(image)
            with library():
                image.load()
            return image
        if is_array(image):
            return _from_array(image, input_data_format)
        if isinstance(image, (str, Path)):
            file = _file_of(str(image))
        elif isinstance(image, (bytes, bytearray, memoryview)):
            file = BytesIO(image)
        elif hasattr(image, "read"):
            file = image
        else:
            raise HealthGPTError(ACCEPTED)
        with open_image(file) as picture:
            return decode(picture)


def _file_of(name):
    """What `open_image` reads for a path, URL or base64 string: not transformers' `load_image`, which clips 16 bits to 8."""
    if name.startswith("file:"):
        with library():
            address = urlsplit(name)
            path = url2pathname(address.path)
        if address.netloc.lower() not in ("", "localhost"):
            raise HealthGPTError(
                f"an address of a file on this machine has no host or localhost, but {address.netloc!r:.100}."
            )
        return path
    if not name.startswith(("http://", "https://", "data:")):
        with library():
            return name if os.path.isfile(name) else BytesIO(base64.b64decode(name, validate=True))
    limit = 8 * max_pixels()  # bytes of so many pixels of four colours of 16 bits
    with library(), urlopen(name, timeout=60) as response:
        content = response.read(limit + 1)
    if len(content) > limit:
        raise HealthGPTError(
            f"it has more than {limit} bytes, 8 for each pixel that the environment variable {MAX_PIXELS_VARIABLE} allows."
        )
    return BytesIO(content)


def is_array(image) -> bool:
    """Whether it is an array or a tensor."""
    return is_tensor(image) or is_of(image, "numpy", "ndarray")


def is_tensor(image) -> bool:
    """Whether it is a tensor."""
    return is_of(image, "torch", "Tensor")


def is_of(image, library: str, name: str) -> bool:
    """Whether it is of a class of a library, which is imported where there is one: opening a file imports neither."""
    module = sys.modules.get(library)
    return module is not None and isinstance(image, getattr(module, name))


def is_floats(image) -> bool:
    """Whether it is an array or tensor of floating-point numbers."""
    if is_tensor(image):
        return image.is_floating_point()
    return is_array(image) and image.dtype.kind == "f"


def channels_last(image, input_data_format):
    """An array or tensor as an array `(height, width, channels)` of 1 or 3 channels."""
    from transformers.image_utils import infer_channel_dimension_format, to_numpy_array

    if is_tensor(image):
        image = image.detach()
        with library():  # there are tensors without values, and kinds that NumPy does not know
            image = to_numpy_array(image.float() if image.is_floating_point() else image)  # NumPy has no bfloat16
    if image.ndim == 2:
        return image[..., None]
    if image.ndim != 3 or not {image.shape[0], image.shape[-1]} & {1, 3, 4}:
        raise HealthGPTError(f"its shape is {tuple(image.shape)}; {ACCEPTED}")
    counts = 4 if image.shape[-1] == 4 or not {image.shape[0], image.shape[-1]} & {1, 3} else (1, 3)
    with library():
        layout = input_data_format or infer_channel_dimension_format(image, num_channels=counts)
    image = image.transpose(1, 2, 0) if layout == "channels_first" else image
    return image[..., :3]


def _from_array(image, input_data_format):
    from transformers.image_transforms import to_pil_image

    array = channels_last(image, input_data_format)
    check_pixels(array.shape[1], array.shape[0])
    if array.shape[-1] == 1 and array.dtype.name in ("uint8", "uint16", "int32", "bool"):
        return Image.fromarray(array[..., 0].copy())  # also of 16 bits
    with library():
        return to_pil_image(array, input_data_format="channels_last")


def _rescale_grey(image):
    """A picture of 16-bit greys, which Pillow keeps as 32-bit integers, as RGB."""
    low, high = image.getextrema()
    if image.mode == "F" or low < 0 or high > 65535:
        raise HealthGPTError(
            f"The picture's values go from {low} to {high} in Pillow mode {image.mode}; scale them to 8 or 16 bits first."
        )
    return image.point(lambda value: value * (1 / 256) + 0).convert("L").convert("RGB")


def flatten(images) -> list:
    """The images of a nested list, of which an array or tensor of four dimensions holds several; none of `None`."""
    if images is None:
        return []
    is_batch = is_array(images) and images.ndim == 4
    if is_batch or isinstance(images, (list, tuple)):
        return [picture for item in images for picture in flatten(item)]
    return [images]


__all__ = ["load_picture"]
