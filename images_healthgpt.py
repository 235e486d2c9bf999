# Copyright 2026 The HealthGPT package authors.
# Licensed under the Apache License, Version 2.0 (see the file LICENSE).
"""Images of every kind that a user may give, as 8-bit RGB of Pillow, in bounded memory."""

import base64
import binascii
import os
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from io import BytesIO, UnsupportedOperation
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname, urlopen

import torch
from PIL import Image, UnidentifiedImageError
from PIL.BmpImagePlugin import DibImageFile
from PIL.IcoImagePlugin import IcoFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.PngImagePlugin import PngImageFile
from transformers.image_transforms import to_pil_image
from transformers.image_utils import infer_channel_dimension_format, to_numpy_array
from transformers.utils import is_numpy_array

from .errors_healthgpt import HealthGPTError

MAX_PIXELS = 2**26  # of one image, by default: 8192 x 8192
MAX_PIXELS_VARIABLE = "HEALTHGPT_MAX_IMAGE_PIXELS"
TILE_TAGS = (322, 323)  # width and height of a TIFF file's tiles
ACCEPTED = (
    "an image is a PIL image, an array or tensor of two dimensions or of three with 1, 3 or 4 channels (more of them at once have "
    "four dimensions), a path, an address (file, http, https or data), base64 text, bytes, a binary file, or a dictionary with "
    "'bytes' or 'path'"
)


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


def open_image(file) -> Image.Image:
    """
    Opens a file of a format that Pillow knows, for `load`, small enough to be read: see [`fit`].

    Args:
        file (`str`, `Path` or binary file): What `PIL.Image.open` takes.

    Raises:
        HealthGPTError: if the image has too many pixels.
        Exception: What Pillow's readers raise, of a dozen types.
    """
    max_pixels()  # raises Pillow's limit
    if isinstance(file, (str, Path)):
        check_icon(file)
        return fit(Image.open(file))
    try:
        file.seek(0)
    except (AttributeError, UnsupportedOperation):
        file = BytesIO(file.read())
    _check_icon(file)
    return fit(Image.open(file))


def check_icon(path: str | Path) -> None:
    """
    Refuses a Windows icon that holds an image with too many pixels, whatever its directory says: Pillow decodes it on opening.

    Raises:
        HealthGPTError: if it has more than `max_pixels()` pixels.
    """
    with open(path, "rb") as file:
        _check_icon(file)


def _check_icon(file):
    if file.read(4) == b"\0\0\1\0":
        file.seek(0)
        _check_inside(file, IcoFile(file).entry[0].offset, PngImageFile, DibImageFile)


def _check_inside(file, place, *readers):
    """Refuses an image inside an icon, of the first of Pillow's formats that it is in."""
    for reader in readers:
        file.seek(place)
        with suppress(SyntaxError):  # Pillow's word for another format
            check_pixels(*reader(file).size, "an image in it")
            return


def fit(picture: Image.Image) -> Image.Image:
    """
    Has an open file that is not read yet read at a size of at most `max_pixels()`: a JPEG that is larger at a half, a quarter or an
    eighth of its height and width, the largest that fits. Only progressive ones cannot be read in part.

    Raises:
        HealthGPTError: if the image has too many pixels nevertheless.
    """
    limit, (width, height) = max_pixels(), picture.size
    if width * height > limit and picture.format == "JPEG" and not picture.info.get("progressive"):
        fitting = [part for part in (2, 4, 8) if -(-width // part) * -(-height // part) <= limit]
        if fitting:
            picture.draft(picture.mode, (width // fitting[0], height // fitting[0]))
    check_decoding(picture)
    return picture


def check_decoding(picture: Image.Image) -> None:
    """
    Refuses an image that would take too much memory, itself or what is decoded for it: the tiles of a TIFF file and the images in an
    icon may be far larger than the file says that it is.

    Raises:
        HealthGPTError: if one of them has more than `max_pixels()` pixels.
    """
    check_pixels(*picture.size)
    if picture.format == "TIFF":
        tile = [picture.tag_v2.get(tag) for tag in TILE_TAGS]
        if all(isinstance(side, int) for side in tile):
            check_pixels(*tile, "a tile of it")
    elif picture.format == "ICNS" and picture.fp is not None:
        for code, _ in picture.icns.SIZES[picture.best_size]:
            if code in picture.icns.dct:
                _check_inside(picture.fp, picture.icns.dct[code][0], PngImageFile, Jpeg2KImageFile)


def reason_of(error: Exception) -> str:
    """The first line of what a reader of images says, without a full stop."""
    reason = (str(error) or type(error).__name__).split("\n")[0].rstrip(".")
    if isinstance(error, Image.DecompressionBombError):
        reason += f"; the environment variable {MAX_PIXELS_VARIABLE} raises that limit"
    return reason


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
    if image.mode in ("I", "F"):
        return _rescale_grey(image)
    if image.mode.startswith("I;16"):
        return _rescale_grey(image.convert("I"))
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
        if isinstance(image, (str, Path)):
            picture = open_image(_file_of(str(image)))
        elif isinstance(image, (bytes, bytearray, memoryview)):
            picture = open_image(BytesIO(image))
        elif isinstance(image, Image.Image):
            picture = image
        elif hasattr(image, "read"):
            picture = open_image(image)
        elif is_array(image):
            picture = _from_array(image, input_data_format)
        else:
            raise HealthGPTError(ACCEPTED)
        check_decoding(picture)
        picture.load()
        return picture


@contextmanager
def reading(image):
    """What goes wrong meanwhile becomes one sentence about the image."""
    try:
        yield
    except Exception as error:  # Pillow's readers and urllib raise a dozen types for what they cannot read
        is_name = isinstance(image, (str, Path))
        reason = reason_of(error)
        name = repr(str(image)[:200]) if is_name else f"An object of type {type(image).__name__}"
        if isinstance(error, (binascii.Error, UnidentifiedImageError)):
            reason = "it is no file, URL or base64 data of a picture format that Pillow knows"
        raise HealthGPTError(f"{name} is not a picture that can be read: {reason}.") from error


def _file_of(name):
    """What `open_image` reads for a path, URL or base64 string: not transformers' `load_image`, which clips 16 bits to 8."""
    if name.startswith("file:"):
        address = urlsplit(name)
        if address.netloc.lower() not in ("", "localhost"):
            raise HealthGPTError(
                f"an address of a file on this machine has no host or localhost, but {address.netloc!r:.100}"
            )
        return url2pathname(address.path)
    if name.startswith(("http://", "https://", "data:")):
        limit = 8 * max_pixels()  # bytes of so many pixels of four colours of 16 bits
        with urlopen(name, timeout=60) as response:
            content = response.read(limit + 1)
        if len(content) > limit:
            raise HealthGPTError(
                f"it has more than {limit} bytes, 8 for each pixel that the environment variable {MAX_PIXELS_VARIABLE} allows"
            )
        return BytesIO(content)
    return name if os.path.isfile(name) else BytesIO(base64.b64decode(name, validate=True))


def is_array(image) -> bool:
    """Whether it is an array or a tensor."""
    return isinstance(image, torch.Tensor) or is_numpy_array(image)


def is_floats(image) -> bool:
    """Whether it is an array or tensor of floating-point numbers."""
    if isinstance(image, torch.Tensor):
        return image.is_floating_point()
    return is_numpy_array(image) and image.dtype.kind == "f"


def channels_last(image, input_data_format):
    """An array or tensor as an array `(height, width, channels)` of 1 or 3 channels."""
    if isinstance(image, torch.Tensor):
        image = image.detach()
        image = to_numpy_array(image.float() if image.is_floating_point() else image)  # NumPy has no bfloat16
    if image.ndim == 2:
        return image[..., None]
    if image.ndim != 3 or not {image.shape[0], image.shape[-1]} & {1, 3, 4}:
        raise HealthGPTError(f"its shape is {tuple(image.shape)}; {ACCEPTED}")
    counts = 4 if image.shape[-1] == 4 or not {image.shape[0], image.shape[-1]} & {1, 3} else (1, 3)
    layout = input_data_format or infer_channel_dimension_format(image, num_channels=counts)
    image = image.transpose(1, 2, 0) if layout == "channels_first" else image
    return image[..., :3]


def _from_array(image, input_data_format):
    array = channels_last(image, input_data_format)
    check_pixels(array.shape[1], array.shape[0])
    if array.shape[-1] == 1 and array.dtype.name in ("uint8", "uint16", "int32", "bool"):
        return Image.fromarray(array[..., 0].copy())  # also of 16 bits
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
