#!/usr/bin/env bash
# pydicom 3.0.2, seen on 2026-11-28.
#
# copy.copy of a Dataset is not a shallow copy as of a dict, with a container of its own: copy and original share the container
# too. What is deleted from, added to or set in the copy is deleted, added or set in the original:
#
#   deleted in the copy: gone from the original
#   added to the copy: in the original
#   set in the copy: 7 in the original
#
# Hurt is code that takes an element out of "a copy" for one purpose, say the window before the modality table is applied, and
# then reads the original. copy.deepcopy, or Dataset(original), which makes a container of its own, does what is meant.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pydicom==3.0.2
cat > "$folder/try.py" <<'PYTHON'
import copy

from pydicom import Dataset


def dataset():
    made = Dataset()
    made.Rows, made.WindowCenter = 4, 5
    return made


original = dataset()
del copy.copy(original).WindowCenter
print("deleted in the copy:", "kept in the original" if "WindowCenter" in original else "gone from the original")
original = dataset()
copy.copy(original).WindowWidth = 6
print("added to the copy:", "in the original" if "WindowWidth" in original else "not in the original")
original = dataset()
copy.copy(original).WindowCenter = 7
print(f"set in the copy: {original.WindowCenter:g} in the original")
original = dataset()
del Dataset(original).WindowCenter
assert "WindowCenter" not in original
original = dataset()
del copy.deepcopy(original).WindowCenter
assert "WindowCenter" in original
PYTHON
"$folder/venv/bin/python" "$folder/try.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
deleted in the copy: gone from the original
added to the copy: in the original
set in the copy: 7 in the original
SEEN
