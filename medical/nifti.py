"""NIfTI: axial slices as radiologists see them."""

import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError
from PIL import Image

from ..errors_healthgpt import HealthGPTError
from ..images_healthgpt import check_pixels
from .greys import STRIP, to_greys, value_range

MAX_EXTENSIONS = 2**24  # bytes before the voxels
# What reading raises for a header or values that are damaged.
UNREADABLE = (ImageFileError, HeaderDataError, EOFError, MemoryError, OSError, OverflowError, ValueError, zlib.error)


class NiftiFile:
    """
    A NIfTI volume, as slices along the axis from the patient's feet to the head.

    The volume is turned to the closest RAS+ orientation by swapping and flipping axes, without resampling, also if its affine
    is oblique; slice 0 is the lowest. A slice is shown in the radiological convention: the patient's front is up and the
    patient's right is on the left of the picture. A voxel is taken as square.

    Black and white are `cal_min` and `cal_max` of the header if it sets them, else the lowest and the highest value of the whole
    volume, so that slices compare. Of a series of volumes (four dimensions) the first is taken.

    Args:
        path (`Path`): A `.nii` or `.nii.gz` file.

    The file is read a strip after the other, as its voxels lie in it, so that no more than the slice and a strip are in memory.

    Raises:
        HealthGPTError: if it cannot be read, has neither three nor four dimensions, its affine gives an axis no direction, its
            values are no plain numbers, or a slice or slab has too many voxels.
    """

    def __init__(self, path: Path):
        self.path = path
        with named(path):
            check_extensions(path)
            with nibabel_says():
                # The file stays open, as one that is compressed can only be read from its start.
                self.image = nibabel.load(path, keep_file_open=True)
                shape, directions = self.image.shape, io_orientation(self.image.affine)
            if len(shape) not in (3, 4) or 0 in shape:
                raise HealthGPTError(f"its shape is {shape}, and three or four dimensions are needed.")
            if self.image.get_data_dtype().kind not in "iuf":
                raise HealthGPTError("its voxels are colours or complex numbers.")
            if np.isnan(directions).any():
                raise HealthGPTError("its affine gives one of its axes no direction.")
            # Which axis of the file goes to the right, to the front and to the head, and whether it does so backwards.
            self.axes = np.argsort(directions[:, 0]).tolist()
            self.backwards = [directions[axis, 1] < 0 for axis in self.axes]
            right, front, head = self.axes
            check_pixels(shape[right], shape[front], "a slice")
            check_pixels(shape[0], shape[1], "a slab")
        self.num_frames = shape[head]
        self.default_frame = self.num_frames // 2

    def picture(self, frame: int) -> Image.Image:
        right, front, head = self.axes
        index = self.num_frames - 1 - frame if self.backwards[2] else frame
        shape = self.image.shape
        greys = np.empty([size for axis, size in enumerate(shape[:3]) if axis != head], np.uint8)
        with named(self.path):
            low, high = (float(self.image.header[name]) for name in ("cal_min", "cal_max"))
            if not low < high:
                low, high = value_range(piece for _, piece in self._pieces(range(shape[2])))
            for place, piece in self._pieces([index] if head == 2 else range(shape[2])):
                at = place.pop(head)
                if at.start <= index < at.stop:
                    greys[tuple(place)] = to_greys(piece.take(index - at.start, head), low, high)
        values = greys.T if right > front else greys
        values = values[:: -1 if self.backwards[0] else 1, :: -1 if self.backwards[1] else 1]
        # (right, front) -> rows from front to back, columns from right to left
        return Image.fromarray(np.ascontiguousarray(values[::-1, ::-1].T))

    def _pieces(self, slabs: Iterable[int]) -> Iterator[tuple[list[slice], np.ndarray]]:
        """
        The voxels of some slabs in the order of the file, a strip after the other, as scaling makes eight bytes of each: where they
        lie in the volume and their values, of three dimensions.
        """
        width, height = self.image.shape[:2]
        rows = max(1, STRIP // width)
        for slab in slabs:
            for top in range(0, height, rows):
                for left in range(0, width, STRIP):
                    place = [
                        slice(left, min(left + STRIP, width)),
                        slice(top, min(top + rows, height)),
                        slice(slab, slab + 1),
                    ]
                    with nibabel_says():
                        piece = np.asanyarray(self.image.dataobj[(*place, 0)[: self.image.ndim]])
                    yield place, piece


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Puts the file's name before what is wrong with it."""
    try:
        yield
    except HealthGPTError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise HealthGPTError(f"{str(path)!r} is not a NIfTI volume that can be read: {reason}.") from error


@contextmanager
def nibabel_says() -> Iterator[None]:
    """Calls of nibabel: a header or values that are damaged are a HealthGPTError."""
    try:
        yield
    except UNREADABLE as error:
        raise HealthGPTError(str(error)) from error


def check_extensions(path: Path) -> None:
    """
    Refuses a file with very large extensions of its header, which nibabel would read whole.

    Raises:
        HealthGPTError: if its voxels begin far from its start.
    """
    with nibabel_says(), ImageOpener(path) as file:
        header = file.read(540)
    for order in "<>":
        for size, place, kind in ((348, 108, "f"), (540, 168, "q")):  # NIfTI-1 and NIfTI-2
            if header[:4] == struct.pack(f"{order}i", size) and len(header) >= size:
                (offset,) = struct.unpack_from(order + kind, header, place)
                if offset > MAX_EXTENSIONS:
                    raise HealthGPTError(f"its voxels begin after {MAX_EXTENSIONS} bytes.")
