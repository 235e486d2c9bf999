"""How much a compressed frame of DICOM decodes to, read from the frame itself before a decoder allocates it."""

import struct
from itertools import pairwise

from pydicom.uid import UID, RLELossless

# Start of frame: JPEG's (ISO/IEC 10918-1, table B.1, without DHT, JPG and DAC, which lie between) and JPEG-LS's (ISO/IEC 14495-1).
START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xDA), 0xFF}  # stuffing, TEM, RST, SOI, EOI and fill bytes


def fits(frame: bytes, syntax: UID, pixels: int, samples: int) -> bool:
    """
    Whether a frame decodes to no more than it should. A segment of RLE may have padding, up to its size.

    Args:
        frame (`bytes`): Compressed with JPEG, JPEG-LS, JPEG 2000 or RLE.
        syntax (`UID`): Its transfer syntax. Decoders tell JPEG from JPEG 2000 by the content.
        pixels (`int`): Rows times columns.
        samples (`int`): Values of a pixel.

    Raises:
        IndexError, ValueError, struct.error: if its structure is damaged.
    """
    if syntax == RLELossless:
        (segments,) = struct.unpack_from("<L", frame)
        places = [*struct.unpack_from(f"<{segments}L", frame, 4), len(frame)]
        return all(_unpacks_to_at_most(2 * pixels, frame[start:end]) for start, end in pairwise(places))
    width, height, components = (_size_of_jpeg if frame.startswith(b"\xff\xd8") else _size_of_jpeg_2000)(frame)
    return width * height * components <= pixels * samples


def _unpacks_to_at_most(limit: int, segment: bytes) -> bool:
    """Whether the runs of a segment of RLE (PS3.5 G.3.1) have at most so many bytes together."""
    place = size = 0
    while place < len(segment) and size <= limit:
        head = segment[place]
        place += 2 if head > 128 else 1 if head == 128 else head + 2
        size += 257 - head if head > 128 else 0 if head == 128 else head + 1
    return size <= limit


def _size_of_jpeg(frame: bytes) -> tuple[int, int, int]:
    """Width, height and components of a frame of JPEG or JPEG-LS."""
    place = 2
    while True:
        place = frame.index(0xFF, place)
        marker = frame[place + 1]
        if marker in START_OF_FRAME:
            height, width, components = struct.unpack_from(">HHB", frame, place + 5)
            return width, height, components
        place += 1 if marker in WITHOUT_LENGTH else 2 + struct.unpack_from(">H", frame, place + 2)[0]


def _size_of_jpeg_2000(frame: bytes) -> tuple[int, int, int]:
    """Width, height and components of a codestream of JPEG 2000 (ISO/IEC 15444-1, A.5.1), bare or in the boxes of a file."""
    place = 0
    while not frame.startswith(b"\xff\x4f\xff\x51", place):
        length, kind = struct.unpack_from(">L4s", frame, place)
        head = 8
        if length == 1:  # 64 bits of it follow
            head, (length,) = 16, struct.unpack_from(">Q", frame, place + 8)
        place += head if kind == b"jp2c" else max(length, head)
    right, bottom, left, top = struct.unpack_from(">4L", frame, place + 8)
    (components,) = struct.unpack_from(">H", frame, place + 40)
    return right - left, bottom - top, components
