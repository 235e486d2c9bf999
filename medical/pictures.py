"""The one way from a file to a picture, whatever its format, and plain pictures."""

from pathlib import Path

import numpy as np
from PIL import Image

from ..errors_healthgpt import HealthGPTError
from ..images_healthgpt import check_decoding, decode, library, load_picture, open_image, reading
from ..refusals import extras
from .greys import in_strips, strips, to_greys, value_range

UNKNOWN = "it is neither DICOM nor NIfTI nor of a format that Pillow knows"
DRAWN_OVER = ("FLI", "GIF", "PNG")  # formats of which Pillow decodes all frames before the wanted one


def open_picture(path: str | Path, frame: int | None = None) -> Image.Image:
    """
    Reads a picture, or one picture of several in a file.

    | file | known by | greys | frame by default |
    |---|---|---|---|
    | DICOM | `DICM` at byte 128, whatever its name | its window, see [`DicomFile`] | the middle one |
    | NIfTI | `.nii`, `.nii.gz` | its display range, see [`NiftiFile`] | the middle axial slice |
    | all that Pillow reads | its content | the processor's; wider ones: the range of the values | the first one |

    The middle of a volume shows most of it, while the first page of a plain file is what other programs show. No more of a file is
    held in memory than one frame or one slice of a volume, neither of which may have more pixels than the processor takes of an image
    (67 million, or what the environment variable `HEALTHGPT_MAX_IMAGE_PIXELS` says); a larger JPEG, JPEG 2000
    or TIFF is read at a reduced size.

    Args:
        path (`str` or `Path`): A file.
        frame (`int`, *optional*): Number of the frame, slice or page, from 0.

    Returns:
        `PIL.Image.Image`: Of mode `L` or `RGB`, without metadata.

    Raises:
        HealthGPTError: if there is no such file or frame, it is not an image that can be read or has too many pixels, or it
            needs the extra `dicom`, which is not installed.
    """
    file = _open(Path(path))
    if frame is None:
        frame = file.default_frame
    elif not 0 <= frame < file.num_frames:
        raise HealthGPTError(
            f"{path} has no frame {frame}: it has {file.num_frames}, numbered from 0 to {file.num_frames - 1}."
        )
    return file.picture(frame)


def count_frames(path: str | Path) -> int:
    """
    Number of frames, slices or pages of a file.

    Raises:
        HealthGPTError: As [`open_picture`].
    """
    return _open(Path(path)).num_frames


def _open(path: Path):
    try:
        if path.is_dir():
            raise HealthGPTError(f"{str(path)!r} is a folder, and not a picture file.")
        if not path.is_file():
            raise HealthGPTError(f"There is no picture file {str(path)!r}.")
        with open(path, "rb") as file:
            preamble = file.read(132)
    except OSError as error:
        raise HealthGPTError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    if path.name.lower().endswith((".nii", ".nii.gz")):
        with extras():
            from .nifti import NiftiFile

        return NiftiFile(path)
    if preamble.endswith(b"DICM") and len(preamble) == 132:
        with extras():
            from .dicom import DicomFile

        return DicomFile(path)
    return PlainFile(path)


class PlainFile:
    """
    A picture of a format that Pillow reads. Modes are the processor's affair, but for greys of a wider range than 16 bits (modes
    `F` and `I`), which it refuses: they are stretched over the range of their values.
    """

    default_frame = 0

    def __init__(self, path: Path):
        self.path = path
        with reading(path, UNKNOWN), open_image(path) as image, library():
            self.num_frames = getattr(image, "n_frames", 1)

    def picture(self, frame: int) -> Image.Image:
        with reading(self.path, UNKNOWN), open_image(self.path) as image:
            for number in range(frame) if image.format in DRAWN_OVER else ():
                with library():
                    image.seek(number)
                check_decoding(image)
            with library():
                image.seek(frame)
            image = decode(image)
            low, high = image.getextrema() if image.mode == "I" else (0, 0)
            if image.mode == "F" or low < 0 or high > 65535:
                values = np.asarray(image)
                low, high = value_range(strips(values))
                return Image.fromarray(in_strips(lambda strip: to_greys(strip, low, high), values))
        picture = load_picture(image)
        picture.info.clear()
        return picture
