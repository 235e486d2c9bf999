#!/usr/bin/env bash
# Times HealthGPT on this machine's GPU in at most 5 minutes; see benchmarks/gpu.py. `--tiny` tries it on the CPU.
# PYTHON names the interpreter that has torch and transformers.
set -euo pipefail
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
"$python" - "$@" <<'END'
import importlib.util, shutil, sys
names = {"PIL": "Pillow", "yaml": "PyYAML"}
needed = ("torch", "transformers", "PIL", "yaml", "filelock", "psutil", "wrapt", "sentencepiece")
missing = [names.get(name, name) for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"This needs {', '.join(missing)}: pip install {' '.join(missing)}.")
import transformers
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
    sys.exit(f"This needs transformers 5.24 or newer, and {transformers.__version__} is installed.")
if "--tiny" not in sys.argv:
    import torch
    if not torch.cuda.is_available():
        sys.exit("This needs a GPU that torch can use through CUDA; torch finds none. --tiny tries it on the CPU.")
    if importlib.util.find_spec("triton") is None or not any(map(shutil.which, ("cc", "gcc", "clang"))):
        sys.exit("Compiling needs Triton and a C compiler, for example gcc.")
END
# The repository is the package, whatever its folder is called.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
ln -s "$root" "$folder/healthgpt"
cd "$folder"
PYTHONPATH="$folder" "$python" -m healthgpt.benchmarks.gpu "$@"
