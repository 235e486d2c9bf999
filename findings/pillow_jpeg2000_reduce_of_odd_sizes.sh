#!/usr/bin/env bash
# Pillow 12.3.0, seen on 2026-11-28.
#
# Jpeg2KImageFile.reduce reads a JPEG 2000 at 1/2, 1/4, 1/8 of its size. Pillow computes the reduced size by rounding to the
# nearest, OpenJPEG by rounding up as the standard does; where the two differ a sound file is refused as a "broken data stream",
# and the size is one pixel too small (after the call that reads it):
#
#   1000: 1/2 (500, 500) read, 1/4 (250, 250) read, 1/8 (125, 125) read
#   1001: 1/2 (501, 501) read, 1/4 (250, 250) OSError, 1/8 (125, 125) OSError
#   1002: 1/2 (501, 501) read, 1/4 (251, 251) read, 1/8 (125, 125) OSError
#   1003: 1/2 (502, 502) read, 1/4 (251, 251) read, 1/8 (125, 125) OSError
#
# Any side whose remainder is under a half of the divisor is hit, so every second or third scan of an odd size. Who reads large
# JPEG 2000 at a reduced size has to set the size to the rounded-up one before loading, or read it whole.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==12.3.0
cat > "$folder/try.py" <<'PYTHON'
import io

from PIL import Image

for side in (1000, 1001, 1002, 1003):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).save(file, "JPEG2000")
    seen = []
    for reduce in (1, 2, 3):
        image = Image.open(file)
        image.reduce = reduce
        try:
            image.load()
            result = "read"
        except OSError:
            result = "OSError"
        seen.append(f"1/{2**reduce} {image.size} {result}")
    print(f"{side}: {', '.join(seen)}")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
1000: 1/2 (500, 500) read, 1/4 (250, 250) read, 1/8 (125, 125) read
1001: 1/2 (501, 501) read, 1/4 (250, 250) OSError, 1/8 (125, 125) OSError
1002: 1/2 (501, 501) read, 1/4 (251, 251) read, 1/8 (125, 125) OSError
1003: 1/2 (502, 502) read, 1/4 (251, 251) read, 1/8 (125, 125) OSError
SEEN
