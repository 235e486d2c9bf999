#!/usr/bin/env bash
# pydicom 3.0.2, seen on 2026-11-28.
#
# pixel_array(path) is the documented way to decode one frame of a large file without reading the rest. It does not inflate
# files of the transfer syntax Deflated Explicit VR Little Endian: it looks for elements in the deflated bytes, warns of an
# unexpected VR, and raises an AttributeError that says that the file has no pixels. dcmread(path).pixel_array decodes the same
# file:
#
#   Explicit VR Little Endian: dcmread [0, 1, 2, 3], by path [0, 1, 2, 3]
#   Deflated Explicit VR Little Endian: dcmread [0, 1, 2, 3], by path AttributeError
#
# Who reads by path has to ask read_file_meta_info(path).TransferSyntaxUID.is_deflated first, and read such files whole.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pydicom==3.0.2 numpy==2.4.6
cat > "$folder/try.py" <<'PYTHON'
import sys

from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import pixel_array
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, SecondaryCaptureImageStorage


def make(path, syntax):
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.Rows = data.Columns = 2
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = bytes(range(4))
    data.save_as(path, enforce_file_format=True)


for syntax in (ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian):
    make(sys.argv[1], syntax)
    whole = dcmread(sys.argv[1]).pixel_array.flatten().tolist()
    try:
        by_path = pixel_array(sys.argv[1]).flatten().tolist()
    except AttributeError as error:
        assert "no pixel data to decode" in str(error)
        by_path = "AttributeError"
    print(f"{syntax.name}: dcmread {whole}, by path {by_path}")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder/image.dcm" 2> "$folder/log" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
Explicit VR Little Endian: dcmread [0, 1, 2, 3], by path [0, 1, 2, 3]
Deflated Explicit VR Little Endian: dcmread [0, 1, 2, 3], by path AttributeError
SEEN
