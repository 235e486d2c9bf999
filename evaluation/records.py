"""Results of a long run, a JSON line each, so that a killed run goes on where it was."""

import hashlib
import json
from pathlib import Path

from ..hub_export.families import read_json
from ..hub_export.sources import reading
from ..hub_export.write import write_json


def state_of(path: str | Path) -> str | None:
    """A hash of the names, sizes and times of a file or of all files of a folder; `None` for what is not on this disk."""
    path = Path(path)
    if not path.exists():
        return None
    files = sorted(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    stats = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


class Records:
    """
    What a run has done so far.

    Args:
        folder (`Path`): Folder of the run; made if it does not exist.
        settings (`dict`): What makes this run differ from others.

    Raises:
        ValueError: if the folder holds a run of other settings, or its files are damaged.
    """

    def __init__(self, folder: Path, settings: dict):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, run = folder / "records.jsonl", folder / "run.json"
        if not run.exists():
            write_json(run, settings)
        elif read_json(run) != settings:
            raise ValueError(f"{folder} holds a run with other settings (its run.json): choose another folder.")
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        if lines and not lines[-1].endswith("\n"):  # a kill left half a line
            lines = lines[:-1]
            self.path.write_text("".join(lines), encoding="utf-8")
        with reading(self.path):
            self.done = {record["name"]: record for record in map(json.loads, lines)}

    def add(self, records: list[dict]) -> None:
        """Keeps what one batch gave; every record has a `name` of its own."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        self.done |= {record["name"]: record for record in records}
