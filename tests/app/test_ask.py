"""`healthgpt ask`: streamed answers, folders, runs that are stopped."""

import csv
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pydicom
import pytest
import torch
from conftest import GOLDEN, full_disk, sources_of
from pydicom.data import get_testdata_file
from transformers import AutoConfig, AutoProcessor
from typer.testing import CliRunner

from healthgpt.app.answers import AnswerTable, parse_csv
from healthgpt.app.ask import find_files
from healthgpt.app.cli import app
from healthgpt.app.streamers import AnswerStreamer
from healthgpt.errors_healthgpt import HealthGPTError
from healthgpt.hub_export import export
from healthgpt.locks import lock_of
from healthgpt.medical import open_picture

QUESTION = 'Which "modality",\nplease?'
SETTINGS = {"question": QUESTION, "task": "comprehension", "checkpoint": "x", "folder": "pictures"}
SETTINGS |= {"frame": "default", "max_new_tokens": "12"}
SCRIPT = "import sys; sys.argv[0] = 'healthgpt'; from healthgpt.app.cli import main; main()"


def ask(*arguments):
    return CliRunner().invoke(app, ["ask", *map(str, arguments)])


def start(*arguments, **options):
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("m3").folder


@pytest.fixture
def pictures(tmp_path):
    """
    A folder with a DICOM file without ending, pictures, one of them in a folder below, what is none, and a name that is not
    UTF-8.
    """
    pictures = tmp_path / "pictures"
    (pictures / "below").mkdir(parents=True)
    for name in ("ct", "mr", "retina", "cell"):
        shutil.copy(GOLDEN / f"images/{name}.png", pictures)
    shutil.copy(GOLDEN / "images/ihc.png", pictures / "below")
    shutil.copy(get_testdata_file("MR_small.dcm", download=False), pictures / "IM0001")
    shutil.copy(get_testdata_file("reportsi.dcm", download=False), pictures / "REPORT")
    (pictures / "notes.txt").write_text("no picture")
    shutil.copy(GOLDEN / "images/ct.png", pictures / os.fsdecode(b"caf\xe9.png"))
    return pictures


NAMES = ["IM0001", "below/ihc.png", "cell.png", "ct.png", "mr.png", "retina.png"]


@pytest.mark.parametrize("name", ["m3", "l14", "xl32"])
def test_streamed_text_is_the_decoded_text(name, checkpoints):
    folder = checkpoints(name).folder
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    rows = AutoConfig.from_pretrained(folder, trust_remote_code=True).text_config.vocab_size  # some have no token
    generator = torch.Generator().manual_seed(0)
    texts = ["A mass — 3 cm;\n\n- left, upper lobe.\n", "  日本語 ünïcödé 🫁🫀 \n", "it's n't ' .", "", "naïve 🫁🫀"]
    samples = [processor.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    samples += torch.randint(rows, (100, 40), generator=generator).tolist()
    most = 0
    for ids in samples:
        pieces = []
        streamer = AnswerStreamer(processor, pieces.append)
        streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
        for token in ids:
            streamer.put(torch.tensor([token]))
        most = max(most, len(pieces))
        streamer.end()
        assert "".join(pieces) == processor.decode(ids, skip_special_tokens=True).strip()
    assert most > 20


def test_answers_about_a_folder_are_those_about_each_picture(folder, pictures, tmp_path):
    options = ["-c", folder, "--max-new-tokens", 12]
    result = ask(pictures, QUESTION, "-o", tmp_path / "answers.csv", "--batch-size", 4, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'answers.csv'} (6 answers, 6 of them new)\n"
    assert re.findall("Left out (.*?):", result.stderr) == ["REPORT", "caf\\xe9.png", "notes.txt"]
    with open(tmp_path / "answers.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == NAMES
    for row in rows:
        alone = ask(pictures / row["file"], QUESTION, *options)
        assert alone.stdout == f"{row['answer']}\n"
        assert {name: row[name] for name in SETTINGS} == SETTINGS | {"checkpoint": str(folder)}
    assert any(row["answer"] for row in rows)
    result = ask(pictures, QUESTION, "-o", pictures / "answers.jsonl", "--json", *options)
    content = json.loads(result.stdout)
    assert (content["output"], content["rows"], content["new"]) == (str(pictures / "answers.jsonl"), 6, 6)
    assert list(content["left_out"]) == ["REPORT", "caf\\xe9.png", "notes.txt"]
    assert "without pixels" in content["left_out"]["REPORT"] and "not UTF-8" in content["left_out"]["caf\\xe9.png"]
    lines = (pictures / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [row | {"folder": "."} for row in rows]


def test_answers_about_two_patients_are_not_mixed(folder, tmp_path, monkeypatch):
    for patient in ("a", "b"):
        (tmp_path / patient).mkdir()
        shutil.copy(GOLDEN / "images/ct.png", tmp_path / patient / "IM0001")
    options = ["What?", "-c", folder, "--max-new-tokens", 4]
    monkeypatch.chdir(tmp_path / "a")
    assert ask(".", *options, "-o", "../answers.csv").stdout == "../answers.csv (1 answers, 1 of them new)\n"
    content = (tmp_path / "answers.csv").read_bytes()
    monkeypatch.chdir(tmp_path / "b")
    for arguments, message in (
        ([".", *options], "another folder, 'a'"),
        (["../b", *options], "another folder, 'a'"),
        (["../a", *options, "--frame", 0], "another frame, 'default'"),
        (["../a", *options, "--max-new-tokens", 5], "another max_new_tokens, '4'"),
    ):
        assert message in str(ask(*arguments, "-o", "../answers.csv").exception)
    assert ask("../a", *options, "-o", tmp_path / "answers.csv").stdout.endswith("(1 answers, 0 of them new)\n")
    assert (tmp_path / "answers.csv").read_bytes() == content


def test_frames_and_json(folder):
    path = get_testdata_file("examples_ybr_color.dcm", download=False)
    options = ["-c", folder, "--max-new-tokens", 20]
    answers = {frame: ask(path, "What?", "--frame", frame, *options).stdout for frame in (0, 15)}
    result = json.loads(ask(path, "What?", "--json", *options).stdout)
    assert result == {
        "files": [path],
        "frame": None,
        "question": "What?",
        "answer": answers[15].removesuffix("\n"),
        "task": "comprehension",
    }
    assert ask(path, "What?", "--frame", 30, *options).exception.args[0].endswith("numbered from 0 to 29.")


def many(pictures):
    for number in range(40):
        shutil.copy(pictures / "ct.png", pictures / f"many{number:02}.png")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_leaves_whole_rows_and_goes_on(number, code, folder, pictures, tmp_path):
    many(pictures)
    output = tmp_path / "answers.jsonl"
    arguments = ["ask", pictures, "What?", "-c", folder, "-o", output, "--max-new-tokens", 100]
    process = start(*arguments, "--batch-size", 1)
    while process.poll() is None and not (output.exists() and len(rows_of(output)) > 1):
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # which keeps its locks
    content = output.read_bytes()
    second = ask(*arguments[1:])
    assert f"Another command is changing {output}: " in str(second.exception) and output.read_bytes() == content
    process.send_signal(signal.SIGCONT)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code and "Traceback" not in errors
    before = rows_of(output)
    kept = f"{len(before)} answers are kept in {output}; the same command goes on from there."
    assert (kept in errors) == (number == signal.SIGINT)
    assert 1 < len(before) < 46 and output.read_bytes().endswith(b"\n")
    assert {path for path in tmp_path.iterdir() if path != pictures} - {lock_of(output)} == {output}
    result = ask(*arguments[1:])
    assert result.exit_code == 0, result.output
    assert {path for path in tmp_path.iterdir() if path != pictures} == {output}
    rows = rows_of(output)
    assert rows[: len(before)] == before
    assert [row["file"] for row in rows] == sorted([*NAMES, *(f"many{number:02}.png" for number in range(40))])


ANSWERS = {
    "a.png": 'Two\nlines, "quoted"\n\n',
    "ü,b.png": "\u2028 sí\n",
    "c.png": "",
    "d.png": "one\rtwo",
    "g\r.png": "one\r\ntwo\\",
    "e.png": 'says: "yes", or: ',
    'f": "".png': '"',
}


def test_other_programs_read_a_csv_table(tmp_path):
    settings = SETTINGS | {"question": 'a\rb\r\nc\n"d", e'}
    AnswerTable(tmp_path / "a.csv", settings).add(ANSWERS)
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert rows == [{"file": name, "answer": answer} | settings for name, answer in ANSWERS.items()]


RUN_BY_SPREADSHEETS = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "  =1",
    "\u3000=1",
    "\ttext",
    "\uff1d1",
    "- left",
    "'=1",
    "''+1",
]


def test_a_spreadsheet_runs_no_cell_and_every_cell_is_read_back(tmp_path):
    names = [f"{cell}.png" for cell in RUN_BY_SPREADSHEETS]
    answers = dict(
        zip([*names, "plain.png", "'quoted'.png"], [*RUN_BY_SPREADSHEETS, "a = b", "'quoted'"], strict=True)
    )
    settings = SETTINGS | {"question": "=cmd|' /C calc'!A0", "checkpoint": "@x", "folder": "-y"}
    AnswerTable(tmp_path / "a.csv", settings).add(answers)
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, strict=True))
    cells = [cell for row in rows for cell in row]
    assert not [
        cell
        for cell in cells
        if cell.lstrip()[:1] in tuple("=+-@\uff0b\uff0d\uff1d\uff20") or cell[:1] in tuple("\t\r\n")
    ]
    assert [row[2] for row in rows[-2:]] == ["a = b", "'quoted'"]
    table = AnswerTable(tmp_path / "a.csv", settings)
    assert table.done == set(answers)
    content = (tmp_path / "a.csv").read_bytes().decode()
    assert [(row["file"], row["answer"], row["question"]) for row in parse_csv(content)[0]] == [
        (name, answer, settings["question"]) for name, answer in answers.items()
    ]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_row_that_was_cut_off_is_taken_away(ending, tmp_path):
    path = tmp_path / f"answers.{ending}"
    wholes = [b""]
    for name, answer in ANSWERS.items():
        AnswerTable(path, SETTINGS).add({name: answer})
        wholes.append(path.read_bytes())
    for length in range(len(wholes[-1])):
        path.write_bytes(wholes[-1][:length])
        table = AnswerTable(path, SETTINGS)
        done = sum(len(whole) <= length for whole in wholes) - 1
        assert table.done == set(list(ANSWERS)[:done]) and path.read_bytes() == wholes[done], length
        table.add({name: answer for name, answer in ANSWERS.items() if name not in table.done})
        assert path.read_bytes() == wholes[-1]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_full_disk_is_told_and_the_next_run_goes_on(ending, tmp_path):
    path = tmp_path / f"answers.{ending}"
    answers = {f"{number}.png": "word " * 20 for number in range(10)}
    with full_disk(1000), pytest.raises(HealthGPTError, match="cannot be written: File too large"):
        AnswerTable(path, SETTINGS).add(answers)
    assert path.stat().st_size == 1000
    table = AnswerTable(path, SETTINGS)
    assert 0 < len(table.done) < 10
    table.add({name: answer for name, answer in answers.items() if name not in table.done})
    assert AnswerTable(path, SETTINGS).done == set(answers)


HEADER = "file,question,answer,task,checkpoint,folder,frame,max_new_tokens\n"


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "name,age"),
        ("a.csv", "name,age\nJane,40"),
        ("a.csv", '"name,age\nJane,40'),
        ("a.csv", '"file","question","answer","label"'),
        ("a.csv", f"{HEADER}a.png,What?\nb.png,What?"),
        ("a.csv", f'{HEADER}a.png,What?,"yes"or no,comprehension,x,pictures,default,12'),
        ("a.jsonl", "[1, 2]"),
        ("a.jsonl", "text"),
        ("a.jsonl", '{"file": "a.png"}'),
        ("a.jsonl", '{"file": "a.png", "label": 3'),
        ("a.jsonl", json.dumps({"file": "a.png", "answer": "no"} | SETTINGS)),
        ("a.jsonl", json.dumps({"file": "a.png", "question": QUESTION, "answer": None} | SETTINGS)),
    ],
)
def test_files_that_are_no_table_are_left_as_they_are(name, content, end, tmp_path):
    path = tmp_path / name
    path.write_text(content + end)
    with pytest.raises(ValueError, match="holds something else than answers about a folder"):
        AnswerTable(path, SETTINGS)
    assert path.read_text() == content + end


def test_a_link_to_a_table_that_is_to_come_stays_a_link(tmp_path):
    (tmp_path / "answers.csv").symlink_to(tmp_path / "table.csv")
    AnswerTable(tmp_path / "answers.csv", SETTINGS).add({"ct.png": "yes"})
    assert (tmp_path / "answers.csv").is_symlink() and AnswerTable(tmp_path / "table.csv", SETTINGS).done == {"ct.png"}


@pytest.mark.parametrize(
    "damage", [(b'"yes"', b'"y"es"'), (b'"yes"', b'"yes'), (b'"yes"', b'"yes","no"'), (b"yes", b"\xff")]
)
def test_a_damaged_table_is_left_as_it_is(damage, tmp_path):
    path = tmp_path / "a.csv"
    AnswerTable(path, SETTINGS).add({"a.png": "no", "b.png": "yes", "c.png": "no", "d.png": "no"})
    content = path.read_bytes().replace(*damage)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds something else"):
        AnswerTable(path, SETTINGS)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.txt", "another ending than .csv and .jsonl"),
        ("nowhere/a.csv", "The folder .*nowhere does not exist"),
        ("folder/a.csv", "a.csv cannot be written: Is a directory."),
        (f"{'a' * 300}.csv", "File name too long."),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_model_is_loaded(name, message, pictures, tmp_path):
    (tmp_path / "folder/a.csv").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    result = ask(pictures, "What?", "-c", "nowhere", "-o", tmp_path / name)
    assert re.search(message, str(result.exception)) and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_answers_to_something_else_are_not_mixed(setting, tmp_path):
    AnswerTable(tmp_path / "a.csv", SETTINGS).add({"a.png": "yes"})
    with pytest.raises(ValueError, match=f"has answers with another {setting}, "):
        AnswerTable(tmp_path / "a.csv", SETTINGS | {setting: "other"})


def test_a_folder_whose_name_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not UTF-8, as everything in a table"):
        AnswerTable(tmp_path / "a.csv", SETTINGS | {"folder": os.fsdecode(b"caf\xe9")})


def shown(monkeypatch, arguments, streams) -> str:
    """What a terminal shows of a question if these streams go to it."""
    monkeypatch.setenv("TERM", "xterm")
    terminal, end = pty.openpty()
    with open(end, "w") as file, monkeypatch.context() as patch:
        for stream in streams:
            patch.setattr(sys, stream, file)
        app(["ask", *map(str, arguments)], standalone_mode=False)
    content = b""
    while True:
        try:
            content += os.read(terminal, 4096)
        except OSError:  # all is read, and nobody is left to write
            os.close(terminal)
            return content.decode().replace("\r\n", "\n")


def test_a_terminal_shows_a_sign_until_the_answer_begins(folder, monkeypatch, capsys):
    arguments = [GOLDEN / "images/mr.png", QUESTION, "-c", folder, "--max-new-tokens", 30]
    answer = ask(*arguments).stdout
    assert len(answer.split()) > 3
    errors = shown(monkeypatch, arguments, ["stderr"])
    assert capsys.readouterr().out == answer
    sign, _, rest = errors.rpartition("Reading the question")
    assert sign and rest.endswith("\x1b[1A\x1b[2K")  # up to the sign's line, and away with it
    assert shown(monkeypatch, arguments, ["stdout", "stderr"]).endswith(f"\x1b[1A\x1b[2K{answer}")


def test_answers_are_greedy_whatever_the_checkpoint_says(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sampling")
    path = tmp_path / "sampling/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True, "temperature": 100.0}))
    arguments = [GOLDEN / "images/mr.png", QUESTION, "--max-new-tokens", 30]
    assert ask(*arguments, "-c", tmp_path / "sampling").stdout == ask(*arguments, "-c", folder).stdout


def test_a_quantised_checkpoint_answers_and_says_nothing_else(healthgpt, tmp_path):
    export(sources_of(GOLDEN / "m3"), tmp_path / "tiny", quantize="8bit", skip_forward=True)
    arguments = ("ask", "-c", tmp_path / "tiny", GOLDEN / "images/ct.png", "What is this?", "--max-new-tokens", 2)
    result = healthgpt(*arguments)
    assert (result.returncode, result.stderr) == (0, "")


def test_mistakes_with_folders(folder, pictures, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        ([pictures / "ct.png", " "], "The last argument, a question or instruction, is empty"),
        ([pictures, "What?"], "is a folder: name a file for the answers, -o answers.csv"),
        ([pictures, pictures / "ct.png", "What?", "-o", tmp_path / "a.csv"], "A folder is asked about alone"),
        ([pictures / "ct.png", "What?", "-o", tmp_path / "a.csv"], "--output is for the answers about a folder"),
        ([empty, "What?", "-o", tmp_path / "a.csv"], "has no picture that can be asked about"),
        (
            [tmp_path / "studdy", "What?", "-o", tmp_path / "a.csv"],
            "There is no picture file '.*studdy', and no folder",
        ),
        ([pictures], "The last argument is the text, but '.*pictures' is a folder"),
    ):
        result = ask(*arguments, "-c", folder)
        assert re.search(message, str(result.exception)) and not (tmp_path / "a.csv").exists()


def test_why_a_folder_has_nothing_to_ask_about_is_said(folder, tmp_path):
    shutil.copy(GOLDEN / "images/ct.png", tmp_path)
    result = ask(tmp_path, "What?", "--frame", 5, "-o", tmp_path / "a.csv", "-c", folder)
    assert result.stderr == f"Left out ct.png: {tmp_path}/ct.png has no frame 5: it has 1, numbered from 0 to 0.\n"
    assert str(result.exception) == f"{tmp_path} has no picture that can be asked about."


def test_folders_that_cannot_be_searched_are_left_out_and_named():
    with tempfile.TemporaryDirectory() as name:  # not below tmp_path, where nobody else may look
        study = Path(name)
        study.chmod(0o755)
        for part, mode in (("a", 0o755), ("b", 0o000), ("c", 0o444)):
            (study / part).mkdir()
            shutil.copy(GOLDEN / "images/ct.png", study / part)
            (study / part).chmod(mode)
        (study / "d").symlink_to(study / "a")
        user = os.geteuid()
        os.seteuid(65534 if user == 0 else user)  # root may read everything
        try:
            files, left_out = find_files(study)
            with pytest.raises(ValueError, match=r"c/ct\.png' cannot be read: Permission denied\.$"):
                open_picture(files["c/ct.png"])
        finally:
            os.seteuid(user)
    assert list(files) == ["a/ct.png", "c/ct.png"]
    assert left_out == {"b": "The folder cannot be read: Permission denied.", "d": "It is a link to a folder."}


def test_no_name_of_a_patient_is_said(folder, tmp_path):
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    for element in dataset.iterall():
        if element.VR in ("PN", "LO", "SH", "ST", "DA", "TM", "AS") and element.tag.group != 0x0028:
            element._value = pydicom.valuerep.PersonName("Doe^Jane") if element.VR == "PN" else "Doe^Jane"
    with pydicom.config.disable_value_validation():
        dataset.save_as(tmp_path / "scan")
        dataset.PixelData = dataset.PixelData[:99]
        dataset.save_as(tmp_path / "cut")
    environment = os.environ | {"PYTHONWARNINGS": "always", "TRANSFORMERS_VERBOSITY": "debug"}
    for name, code in (("scan", 0), ("cut", 1)):
        arguments = ["ask", tmp_path / name, "What?", "-c", folder, "--max-new-tokens", 4]
        process = start(*arguments, env=environment)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == code and (output or "it is damaged" in errors)
        assert b"Doe^Jane" in (tmp_path / name).read_bytes() and "Doe" not in output + errors
