"""Results of a long run, a JSON line each, so that a killed run goes on where it was."""

import json
from pathlib import Path

from ..hub_export.confine import reading
from ..refusals import files
from ..runs import begin

RECORDS_NAME = "records.jsonl"


class Records:
    """
    What a run has done so far.

    Args:
        folder (`Path`): Folder of the run; made if it does not exist.
        settings (`dict`): What makes this run differ from others.

    Raises:
        HealthGPTError: if the folder holds a run of other settings, or its files are damaged.
    """

    def __init__(self, folder: Path, settings: dict):
        begin(folder, settings)
        self.path = folder / RECORDS_NAME
        with reading(self.path):
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        if lines and not lines[-1].endswith("\n"):  # a kill left half a line
            lines = lines[:-1]
            with files(self.path, "written"):
                self.path.write_text("".join(lines), encoding="utf-8")
        with reading(self.path):
            self.done = {record["name"]: record for record in map(json.loads, lines)}

    def add(self, records: list[dict]) -> None:
        """Keeps what one batch gave; every record has a `name` of its own. Raises a `HealthGPTError` on a full disk."""
        with files(self.path, "written"), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        self.done |= {record["name"]: record for record in records}
