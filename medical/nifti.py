"""NIfTI: axial slices as radiologists see them."""

import zlib
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import OrientationError
from nibabel.spatialimages import HeaderDataError
from PIL import Image

from ..errors_healthgpt import HealthGPTError
from .greys import to_greys, value_range

# What reading raises for a header or values that are damaged.
UNREADABLE = (EOFError, MemoryError, OSError, OverflowError, ValueError, zlib.error)


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

    Raises:
        HealthGPTError: if it cannot be read, has neither three nor four dimensions, its affine gives an axis no direction, or its
            values are no plain numbers.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            image = nibabel.load(path)
            if len(image.shape) not in (3, 4) or 0 in image.shape:
                raise HealthGPTError(f"its shape is {image.shape}, and three or four dimensions are needed.")
            if image.get_data_dtype().kind not in "iuf":
                raise HealthGPTError("its voxels are colours or complex numbers.")
            self.volume = nibabel.as_closest_canonical(image.slicer[..., 0] if len(image.shape) == 4 else image)
        except (ImageFileError, HeaderDataError, *UNREADABLE) as error:
            raise self._unreadable(str(error)) from error
        except OrientationError as error:
            raise self._unreadable("its affine gives one of its axes no direction") from error
        self.num_frames = self.volume.shape[2]
        self.default_frame = self.num_frames // 2

    def picture(self, frame: int) -> Image.Image:
        try:
            values = np.asanyarray(self.volume.dataobj)
            low, high = (float(self.volume.header[name]) for name in ("cal_min", "cal_max"))
            if not low < high:
                low, high = value_range(values)
        except UNREADABLE as error:
            raise self._unreadable(str(error)) from error
        # (right, front) -> rows from front to back, columns from right to left
        return Image.fromarray(to_greys(values[::-1, ::-1, frame].T, low, high))

    def _unreadable(self, reason: str) -> HealthGPTError:
        reason = " ".join(reason.split()).rstrip(".")
        return HealthGPTError(f"{str(self.path)!r} is not a NIfTI volume that can be read: {reason}.")
