"""Answers about the pictures of a folder, as a table that a stopped run leaves with whole rows and goes on with."""

import codecs
import csv
import io
import json
import os
import re
from pathlib import Path

from ..errors_healthgpt import HealthGPTError
from ..refusals import files

FIELDS = ["file", "question", "answer", "task", "checkpoint", "folder", "frame", "max_new_tokens"]
# Also the wide forms of the four signs, which spreadsheets in East Asia take for them.
FORMULA = re.compile(r"'*(?:[\t\r\n]|[\s\0-\x20]*[=+\-@\uff0b\uff0d\uff1d\uff20])")


class AnswerTable:
    """
    A file with a row for every image: CSV, or JSON lines if its name ends in `.jsonl`.

    In CSV a cell that a spreadsheet would run as a formula has an apostrophe before it, see `as_text`.

    Args:
        path (`Path`): The file; rows that are there are kept, and a row that was cut off is taken away.
        settings (`dict[str, str]`): What all rows share, by the names of the fields: all but `file` and `answer`.

    Raises:
        HealthGPTError: if the file has another ending or folder, cannot be written, is no such table, or has rows of other
            settings, or if a setting is not UTF-8.
    """

    def __init__(self, path: Path, settings: dict[str, str]):
        if path.suffix.lower() not in (".csv", ".jsonl"):
            raise HealthGPTError(
                f"{path} has another ending than .csv and .jsonl, the forms of answers about a folder."
            )
        for value in settings.values():
            require_utf8(value)
        self.path, self.settings = path, settings
        self.is_csv = path.suffix.lower() == ".csv"
        with files(path, "written"):
            is_new = not os.path.lexists(path)
            with open(path, "ab+") as file:  # what cannot be written is refused before anything is answered
                file.seek(0)
                rows, nbytes = self._parse(file.read())
                for row in rows:
                    self._require_settings(row)
                file.truncate(nbytes)
            if is_new:
                path.unlink()
        self.done = {row["file"] for row in rows}

    def add(self, answers: dict[str, str]) -> None:
        """
        Writes answers by the names of their files, at once.

        Raises:
            HealthGPTError: if they cannot be written, for example on a full disk; rows that are whole stay.
        """
        rows = [{"file": file, "answer": answer} | self.settings for file, answer in answers.items()]
        if self.is_csv:
            values = [[row[name] for name in FIELDS] for row in rows]
            text = to_csv(values if self.done else [FIELDS, *values])
        else:
            lines = [json.dumps({name: row[name] for name in FIELDS}, ensure_ascii=False) for row in rows]
            text = "".join(f"{line}\n" for line in lines)
        with files(self.path, "written"), open(self.path, "ab") as file:
            file.write(text.encode())
        self.done |= set(answers)

    def _parse(self, content: bytes) -> tuple[list[dict[str, str]], int]:
        """Whole rows, and the bytes up to the end of the last one."""
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(content)  # but for a character that was cut off
            rows, length = (parse_csv if self.is_csv else parse_json_lines)(text)
        except (csv.Error, ValueError) as error:
            raise HealthGPTError(
                f"{self.path} holds something else than answers about a folder: choose another file."
            ) from error
        return rows, len(text[:length].encode())

    def _require_settings(self, row: dict[str, str]) -> None:
        for name, value in self.settings.items():
            if row[name] != value:
                raise HealthGPTError(
                    f"{self.path} has answers with another {name}, {row[name]!r}: choose another file, or remove it."
                )


def require_utf8(text: str) -> None:
    """Refuses a name whose bytes are not UTF-8, as names of files may be on Linux."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise HealthGPTError(f"{text!r} is not UTF-8, as everything in a table of answers is.") from error


def as_text(cell: str) -> str:
    """
    A cell that spreadsheets take for text: an apostrophe stands before what they would take for a formula.

    That is what begins with `=`, `+`, `-` or `@`, also after spaces, or with a tab or line break (OWASP, CSV injection). A cell
    that begins with apostrophes and then so gets one more, so that [`as_written`] gives every cell back.
    """
    return f"'{cell}" if FORMULA.match(cell) else cell


def as_written(cell: str) -> str:
    """What was given to [`as_text`]."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def to_csv(rows: list[list[str]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([as_text(cell) for cell in row] for row in rows)
    return text.getvalue()


def parse_csv(text: str) -> tuple[list[dict[str, str]], int]:
    """Whole rows, and the characters up to the end of the last one; what follows is a row that was cut off."""
    values, length = [], 0
    file = io.StringIO(text, newline="")
    try:
        for row in csv.reader(file, strict=True):
            if text[file.tell() - 1] == "\n":
                values.append(row)
                length = file.tell()
    except csv.Error as error:
        if str(error) != "unexpected end of data":
            raise
    if values[:1] != [FIELDS] and not to_csv([FIELDS]).startswith(text):
        raise HealthGPTError("The first row is another.")
    rows = [dict(zip(FIELDS, map(as_written, row), strict=True)) for row in values[1:]]
    return rows, length if rows else 0  # the header is written with the first row


def parse_json_lines(text: str) -> tuple[list[dict[str, str]], int]:
    """As `parse_csv`."""
    *lines, cut_off = text.split("\n")
    rows = [json.loads(line) for line in lines]
    for row in rows:
        is_row = isinstance(row, dict) and list(row) == FIELDS
        if not is_row or not all(isinstance(value, str) for value in row.values()):
            raise HealthGPTError("A line is no row.")
    without_values = re.sub(r'(": ")(?:[^"\\]|\\.?)*', r"\1", cut_off)
    if not json.dumps(dict.fromkeys(FIELDS, "")).startswith(without_values):
        raise HealthGPTError("The last line is not the beginning of a row.")
    return rows, len(text) - len(cut_off)
