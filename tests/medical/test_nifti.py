"""NIfTI volumes whose orientation is known."""

import itertools
import math
import struct

import nibabel
import numpy as np
import pytest

from healthgpt.medical import count_frames, open_picture

SHAPE = (6, 8, 5)  # voxels to the right, the front and the head


@pytest.fixture
def volume():
    """Values from 0 to 255, all different along every axis."""
    return (np.random.default_rng(0).permutation(240).reshape(SHAPE) * 255 // 239).astype(np.int16)


def write(path, values, affine, **header):
    image = nibabel.Nifti1Image(values, affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def rotation(degrees):
    """Oblique: turned about all three axes."""
    turned = np.eye(3)
    for axis in range(3):
        cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        step, others = np.eye(3), [other for other in range(3) if other != axis]
        step[np.ix_(others, others)] = [[cosine, -sine], [sine, cosine]]
        turned = turned @ step
    return turned


@pytest.mark.parametrize("degrees", [0, 12])
def test_every_storage_order_shows_the_same_slices(degrees, volume, tmp_path):
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            stored = volume.transpose(order)
            stored = stored[tuple(slice(None, None, sign) for sign in signs)]
            affine = np.eye(4)
            directions = np.eye(3)[:, order] * signs  # column by column: where an axis of the file leads
            affine[:3, :3] = rotation(degrees) @ directions * 2.5
            path = write(tmp_path / "volume.nii.gz", stored, affine)
            assert count_frames(path) == 5
            for frame in (None, 0, 4):
                picture = np.asarray(open_picture(path, frame))
                index = 2 if frame is None else frame
                # rows from front to back, columns from the patient's right to the left
                expected = [[volume[x, y, index] for x in reversed(range(6))] for y in reversed(range(8))]
                np.testing.assert_array_equal(picture, expected)


def test_the_right_front_corner_is_shown_at_the_top_left(tmp_path):
    affine = np.diag([-1.0, -1.0, 3.0, 1.0])  # LPS, as scanners write it
    affine[:3, 3] = [50, 60, -10]
    values = np.zeros((100, 120, 4), np.float32)
    right, front, up, _ = np.linalg.inv(affine) @ [45, 50, -10, 1]  # millimetres from the origin
    values[int(right), int(front), int(up)] = 1
    picture = open_picture(write(tmp_path / "a.nii", values, affine), 0)
    assert picture.size == (100, 120) and np.argwhere(np.asarray(picture)).tolist() == [[10, 5]]


def test_greys_span_the_volume_or_the_display_range_of_the_header(volume, tmp_path):
    values = volume.astype(np.float32) - 1000
    values[0, 0, 0], values[0, 1, 0] = np.nan, np.inf
    low, high = np.nanmin(values), values[np.isfinite(values)].max()
    drawn = np.asarray(open_picture(write(tmp_path / "a.nii", values, np.eye(4)), 0))
    expected = np.nan_to_num((values[::-1, ::-1, 0].T - low) / (high - low) * 255, nan=0, posinf=255)
    np.testing.assert_array_equal(drawn, expected.round())
    path = write(tmp_path / "b.nii", volume, np.eye(4), cal_min=50, cal_max=100)
    expected = ((volume[::-1, ::-1, 2].T - 50.0) / 50 * 255).clip(0, 255).round()
    np.testing.assert_array_equal(np.asarray(open_picture(path)), expected)
    series = np.stack([volume, 255 - volume], axis=-1)
    np.testing.assert_array_equal(
        np.asarray(open_picture(write(tmp_path / "c.nii", series, np.eye(4)))), volume[::-1, ::-1, 2].T
    )


def test_volumes_that_cannot_be_shown(volume, tmp_path):
    whole = write(tmp_path / "whole.nii.gz", volume, np.eye(4)).read_bytes()
    plain = write(tmp_path / "plain.nii", volume, np.eye(4)).read_bytes()
    files = {"cut.nii.gz": whole[:-60], "cut.nii": plain[:-60], "header.nii": plain[:100], "text.nii": b"text" * 200}
    # dim[1:5] is far more than there is; vox_offset is infinite
    files["huge.nii"] = plain[:40] + struct.pack("<5h", 4, *[2**15 - 1] * 4) + plain[50:]
    files["infinite.nii"] = plain[:108] + struct.pack("<f", math.inf) + plain[112:]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    write(tmp_path / "flat.nii", volume[:, :, 0], np.eye(4))
    write(tmp_path / "complex.nii", volume.astype(np.complex64), np.eye(4))
    write(tmp_path / "nan.nii", np.full(SHAPE, np.nan, np.float32), np.eye(4))
    write(tmp_path / "affine.nii", volume, None, sform_code=1)  # its affine is np.diag([0, 0, 0, 1])
    for name, message in (
        *((name, "is not a NIfTI volume that can be read: ") for name in files),
        ("flat.nii", r"its shape is \(6, 8\), and three or four dimensions are needed"),
        ("complex.nii", "its voxels are colours or complex numbers"),
        ("nan.nii", "none of its values is a finite number"),
        ("affine.nii", "its affine gives one of its axes no direction"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_picture(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="has no frame 5: it has 5, numbered from 0 to 4"):
        open_picture(tmp_path / "whole.nii.gz", 5)
