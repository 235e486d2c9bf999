#!/usr/bin/env bash
# Pillow 12.3.0 with files of tifffile 2026.3.3, seen on 2026-11-28.
#
# A TIFF of 32-bit floats in big-endian byte order is read right if it is not compressed. If it is (here by zlib), libtiff swaps
# the bytes while it inflates them, and Pillow swaps them once more: values come back byte-reversed, as tiny numbers, without an
# error or warning. tifffile reads all four:
#
#   little endian, none: Pillow 1.5, tifffile 1.5
#   little endian, zlib: Pillow 1.5, tifffile 1.5
#   big endian, none: Pillow 1.5, tifffile 1.5
#   big endian, zlib: Pillow 6.9e-41, tifffile 1.5
#
# Floats are what microscopes and parametric maps are exported as, and big endian is what ImageJ writes. An image that comes out
# black, with a maximum of about 1e-40, is this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==12.3.0 tifffile==2026.3.3 numpy==2.4.6
cat > "$folder/try.py" <<'PYTHON'
import io

import numpy as np
import tifffile
from PIL import Image

for name, order in (("little endian", "<"), ("big endian", ">")):
    for compression in (None, "zlib"):
        file = io.BytesIO()
        tifffile.imwrite(file, np.full((4, 4), 1.5, np.float32), byteorder=order, compression=compression)
        by_pillow = Image.open(file).getpixel((0, 0))
        file.seek(0)
        by_tifffile = tifffile.imread(file)[0, 0]
        print(f"{name}, {compression or 'none'}: Pillow {by_pillow:.2g}, tifffile {by_tifffile:.2g}")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
little endian, none: Pillow 1.5, tifffile 1.5
little endian, zlib: Pillow 1.5, tifffile 1.5
big endian, none: Pillow 1.5, tifffile 1.5
big endian, zlib: Pillow 6.9e-41, tifffile 1.5
SEEN
