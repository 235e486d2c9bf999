"""Answers about the pictures of a folder, as a table that a stopped run leaves with whole rows and goes on with."""

import csv
import io
import json
from pathlib import Path

FIELDS = ["file", "question", "answer", "task", "checkpoint"]


class AnswerTable:
    """
    A file with a row for every picture: CSV, or JSON lines if its name ends in `.jsonl`.

    Args:
        path (`Path`): The file; rows that are there are kept, and a row that a kill cut off is taken away.
        settings (`dict[str, str]`): The `question`, `task` and `checkpoint` that all rows share.

    Raises:
        ValueError: if the file has another ending or folder, is no such table, or has rows of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, str]):
        if path.suffix.lower() not in (".csv", ".jsonl"):
            raise ValueError(f"{path} has another ending than .csv and .jsonl, the forms of answers about a folder.")
        if not path.parent.is_dir():
            raise ValueError(f"The folder {path.parent} does not exist.")
        self.path, self.settings = path, settings
        self.is_csv = path.suffix.lower() == ".csv"
        text = path.read_bytes().decode("utf-8", errors="replace") if path.exists() else ""
        rows, is_whole = self._parse(text)
        for row in rows:
            other = [name for name, value in settings.items() if row[name] != value]
            if other:
                raise ValueError(
                    f"{path} has answers with another {other[0]}, {row[other[0]]!r}: choose another file, or remove it."
                )
        self.done = {row["file"] for row in rows}
        if not is_whole:
            unfinished = path.with_name(f"{path.name}.unfinished")
            unfinished.write_bytes(self._format(rows, with_header=True))
            unfinished.replace(path)

    def add(self, answers: dict[str, str]) -> None:
        """Writes answers by the names of their files, at once."""
        rows = [{"file": file, "answer": answer} | self.settings for file, answer in answers.items()]
        content = self._format(rows, with_header=not self.done)
        with open(self.path, "ab", buffering=0) as file:
            file.write(content)
        self.done |= set(answers)

    def _format(self, rows: list[dict], with_header: bool) -> bytes:
        if not self.is_csv:
            lines = [json.dumps({name: row[name] for name in FIELDS}, ensure_ascii=False) for row in rows]
            return "".join(f"{line}\n" for line in lines).encode()
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        if with_header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    def _parse(self, text: str) -> tuple[list[dict], bool]:
        """Whole rows, and whether there is nothing but them."""
        rows, is_whole = [], not text or text.endswith("\n")
        try:
            if self.is_csv:
                for row in csv.DictReader(io.StringIO(text, newline=""), strict=True):
                    rows.append(row)
                if not is_whole and rows:
                    rows.pop()
            else:
                rows = [json.loads(line) for line in text.split("\n")[:-1]]
        except csv.Error:  # a quote that is never closed
            is_whole = False
        except json.JSONDecodeError:
            rows = [None]
        if any(not isinstance(row, dict) or list(row) != FIELDS or None in row.values() for row in rows):
            raise ValueError(f"{self.path} holds something else than answers about a folder: choose another file.")
        return rows, is_whole
