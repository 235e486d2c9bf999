"""The package lies flat in the repository: for the reference its files are linked into a folder of its name."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "build/reference/healthgpt"  # `paths` of mkdocs.yml


def on_startup(command, dirty):
    shutil.rmtree(PACKAGE, ignore_errors=True)
    folders = [ROOT, *(path.parent for path in ROOT.glob("*/__init__.py"))]
    for source in (path for folder in folders for path in folder.glob("*.py")):
        link = PACKAGE / source.relative_to(ROOT)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source)
