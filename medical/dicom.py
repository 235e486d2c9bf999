"""DICOM: pixels through the Modality LUT and the VOI LUT of the file (PS3.3 C.11)."""

import copy
import logging
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.encaps import get_frame
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, get_decoder, pixel_array

from ..errors_healthgpt import HealthGPTError
from ..images_healthgpt import MAX_PIXELS_VARIABLE, check_pixels, max_pixels
from .codestreams import fits
from .greys import in_strips, strips, to_greys, value_range

PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
GREYS = ("MONOCHROME1", "MONOCHROME2")
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom decodes all of them to RGB
# Macros of enhanced multi-frame files that hold what other files have at the top (PS3.3 C.7.6.16.2).
FRAME_MACROS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
LUTS = ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "WindowCenter", "WindowWidth")
LUTS += ("VOILUTFunction",)
PALETTES = tuple(
    f"{segmented}{colour}PaletteColorLookupTable{part}"
    for colour in ("Red", "Green", "Blue")
    for segmented, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
)
# All that is read of a data set: no name, number or date of a patient is among it, but in sequences, which are read whole and
# may tell when a frame was taken. Of those only `FRAME_MACROS` and `LUTS` are looked at.
TAGS = (
    *PIXELS,
    *LUTS,
    *PALETTES,
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
LOGGER, LOCK = logging.getLogger("pydicom"), threading.Lock()


class DicomFile:
    """
    A DICOM file with pixels.

    Greys pass the Modality LUT or rescaling, then the VOI LUT or else the first window of the file (`LINEAR`, `LINEAR_EXACT` or
    `SIGMOID`), those of the frame itself in enhanced multi-frame files. Without either, black and white are the lowest and the
    highest value of the frame, pixel padding left out. `MONOCHROME1` is inverted after that. Colours are RGB, YBR or a palette;
    of more than 8 bits the upper 8 are kept. A pixel is taken as square. Overlays are not drawn. An empty element counts as absent,
    as does a window of a width that its function forbids.

    Args:
        path (`Path`): A file of PS3.10, compressed or not.

    Raises:
        HealthGPTError: if it has no pixels, too many in a frame, a compressed frame that is larger than its tags say, or pixels that
            cannot be decoded. No message quotes a value of a tag but the size of a frame that is too large.
    """

    def __init__(self, path: Path):
        self.path = path
        damaged = "it is damaged"
        with named(path), silence():
            with pydicom_says(damaged):
                self.syntax = read_file_meta_info(path).TransferSyntaxUID
                tags = [tag_for_keyword(keyword) for keyword in TAGS]
            if self.syntax.is_deflated:  # read whole, as nothing in it can be found otherwise
                self._check_deflated(damaged)
                with pydicom_says(damaged):
                    self.data = self.source = dcmread(path, specific_tags=tags)
            else:  # pixels stay in the file, of which a frame is read when it is wanted
                with pydicom_says(damaged):
                    self.data, self.source = dcmread(path, specific_tags=tags, defer_size=2**16), path
            with pydicom_says(damaged):
                self.photometric = self.data.get("PhotometricInterpretation")
                self.num_frames = int(self.data.get("NumberOfFrames") or 1)
                self.rows, self.columns = (int(self.data.get(keyword) or 0) for keyword in ("Rows", "Columns"))
        if not any(keyword in self.data for keyword in PIXELS):
            raise HealthGPTError(
                f"{str(path)!r} is a DICOM file without pixels: a report, a plan or a directory, say."
            )

    @property
    def default_frame(self) -> int:
        return self.num_frames // 2

    def picture(self, frame: int) -> Image.Image:
        if self.photometric not in (*GREYS, *COLOURS, "PALETTE COLOR"):
            raise HealthGPTError(
                f"{str(self.path)!r} is a DICOM file of a photometric interpretation that cannot be shown; those that can: "
                f"{', '.join((*GREYS, *COLOURS, 'PALETTE COLOR'))}."
            )
        missing = self._missing_decoders()
        check_pixels(self.columns, self.rows, f"{str(self.path)!r} is a DICOM file that cannot be read: a frame")
        reason = "it is damaged" + (f", or needs a decoder that is not installed: {missing}" if missing else "")
        damaged = f"its pixels cannot be decoded: {reason}"
        with named(self.path), silence():
            if self.syntax.is_encapsulated:
                self._check_compressed(frame, damaged)
            with pydicom_says(damaged):
                values = pixel_array(self.source, index=frame)
            if self.photometric in GREYS:
                return Image.fromarray(self._greys(values, frame, damaged))
            with pydicom_says(damaged):
                depth = self.data.BitsStored
                if self.photometric == "PALETTE COLOR":
                    values = apply_color_lut(values, self.data)
                    depth = self.data.RedPaletteColorLookupTableDescriptor[2]
                return Image.fromarray((values >> max(depth - 8, 0)).astype(np.uint8))

    def _check_compressed(self, frame: int, damaged: str) -> None:
        """Refuses a compressed frame that, as it says itself, has more pixels than the tags say."""
        with pydicom_says(damaged), open(self.path, "rb") as file:
            tables = [
                self.data.get(keyword) or b"" for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")
            ]
            if len(tables[0]) != len(tables[1]):  # as pydicom does
                tables = [b"", b""]
            file.seek(self.data.get_item("PixelData", keep_deferred=True).value_tell)
            content = get_frame(
                file, frame, number_of_frames=self.num_frames, extended_offsets=tables if tables[0] else None
            )
        try:
            is_bounded = fits(content, self.syntax, self.rows * self.columns, 3 if self.photometric in COLOURS else 1)
        except (IndexError, ValueError, struct.error):  # its structure
            raise HealthGPTError(f"{damaged}.") from None
        if not is_bounded:
            raise HealthGPTError(
                f"a compressed frame holds more than the {self.columns} x {self.rows} pixels that its tags say."
            )

    def _missing_decoders(self) -> str:
        """What could be installed for the file's compression; refuses one that nothing installed reads."""
        try:
            decoder = get_decoder(self.syntax)
        except NotImplementedError:  # pydicom's answer to a compression that it does not know
            raise HealthGPTError(
                f"{str(self.path)!r} is compressed as {self.syntax.name}, which pydicom does not read."
            ) from None
        missing = "; ".join(decoder.missing_dependencies) if self.syntax.is_encapsulated else ""
        if not decoder.is_available:
            raise HealthGPTError(
                f"{str(self.path)!r} is compressed as {self.syntax.name}, and no decoder for it is installed; one suffices: "
                f"{missing}."
            )
        return missing

    def _check_deflated(self, damaged: str) -> None:
        """Refuses a deflated file whose content is larger than an image may be."""
        inflater, limit, size = zlib.decompressobj(-zlib.MAX_WBITS), 4 * max_pixels(), 0
        with open(self.path, "rb") as file:
            with pydicom_says(damaged):
                file.seek(
                    144 + read_file_meta_info(self.path).FileMetaInformationGroupLength
                )  # preamble, group length
            while (data := inflater.unconsumed_tail or file.read(2**16)) and not inflater.eof:
                try:
                    size += len(inflater.decompress(data, 2**20))
                except zlib.error:
                    raise HealthGPTError(f"{damaged}.") from None
                if size > limit:
                    raise HealthGPTError(
                        f"it is a deflated DICOM file of more than {limit} bytes, which is not read unless the environment variable "
                        f"{MAX_PIXELS_VARIABLE} is set to a higher number than {max_pixels()}."
                    )

    def _greys(self, values: np.ndarray, frame: int, damaged: str) -> np.ndarray:
        with pydicom_says(damaged):
            tags, shown = self._tags_of(frame), self._tags_of(frame)
            # The output of a window has 8 bits, whatever the values before it (PS3.3 C.11.2.1.2).
            for keyword in ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"):
                shown.pop(keyword, None)
            shown.BitsStored, shown.PixelRepresentation = 8, 0
            padding = self._padding()
            low, high = 0, 255
            windowed = bool(tags.get("VOILUTSequence")) or has_window(tags)
            if tags.get("VOILUTSequence"):
                table = copy.deepcopy(tags.VOILUTSequence[0])
                entries, first, depth = table.LUTDescriptor
                table.LUTDescriptor = [entries, first, 16]  # pydicom counts into tables of 8 bits with 8 bits
                shown.VOILUTSequence, high = [table], 2**depth - 1

        def rescaled(strip):
            with pydicom_says(damaged):
                return apply_modality_lut(strip, tags)

        def convert(strip):
            strip = rescaled(strip)
            if windowed:
                with pydicom_says(damaged):
                    strip = apply_voi_lut(strip, shown)
            return to_greys(strip, low, high)

        if not windowed:
            low, high = value_range(map(rescaled, without(padding, values)))
        greys = in_strips(convert, values)
        return 255 - greys if self.photometric == "MONOCHROME1" else greys

    def _tags_of(self, frame: int) -> Dataset:
        """What the lookup tables need, with the functional groups of the frame, its own before the shared ones."""
        tags = Dataset()
        tags.set_original_encoding(*self.data.original_encoding)
        sources = [self.data]
        for sequence, index in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
            for macro in FRAME_MACROS if self.data.get(sequence) else ():
                sources += self.data[sequence][index].get(macro, [])
        for source in sources:
            for keyword in ("PhotometricInterpretation", *LUTS):
                if keyword in source and not source[keyword].is_empty:
                    tags[keyword] = source[keyword]
        return tags

    def _padding(self) -> tuple[float, float] | None:
        """From where to where stored values are no part of the picture (PS3.3 C.7.5.1.1.2)."""
        value, limit = self.data.get("PixelPaddingValue"), self.data.get("PixelPaddingRangeLimit")
        if value is None:
            return None
        ends = float(value), float(value if limit is None else limit)
        return min(ends), max(ends)


def without(padding: tuple[float, float] | None, values: np.ndarray) -> Iterator[np.ndarray]:
    """The strips of stored values without those that are padding, or whole if all are."""

    def shown(strip):
        return ~((padding[0] <= strip) & (strip <= padding[1]))

    if padding is None or not any(shown(strip).any() for strip in strips(values)):
        return strips(values)
    return (strip[shown(strip)] for strip in strips(values))


def has_window(tags: Dataset) -> bool:
    """Whether there is a window, of a width that its function allows (PS3.3 C.11.2.1.2.1 and C.11.2.1.3)."""
    if "WindowCenter" not in tags or "WindowWidth" not in tags:
        return False
    width = np.ravel(tags.WindowWidth)[0]  # of the first window, if there are several
    return width >= 1 if tags.get("VOILUTFunction", "LINEAR").upper() == "LINEAR" else width > 0


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Puts the file's name before what is wrong with it."""
    try:
        yield
    except HealthGPTError as error:
        raise HealthGPTError(f"{str(path)!r} is a DICOM file that cannot be read: {error}") from None


@contextmanager
def pydicom_says(damaged: str) -> Iterator[None]:
    """
    Calls of pydicom and its decoders, and the reading of its tags, whose values it converts then.

    Raises:
        HealthGPTError: `damaged`, for whatever they raise: it is not of one kind, and cut off, as it may quote a patient.
    """
    try:
        yield
    except Exception:  # only calls of pydicom stand inside, and no type is common to what they raise
        raise HealthGPTError(f"{damaged}.") from None


@contextmanager
def silence() -> Iterator[None]:
    """Keeps pydicom's warnings and log to itself: they quote values of the file. One thread at a time, as both are global."""
    with LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        propagate, LOGGER.propagate = LOGGER.propagate, False
        try:
            yield
        finally:
            LOGGER.propagate = propagate
