"""`healthgpt draw`: sizes, sheets, and files that are whole or not there."""

import json

import pytest
import torch
from conftest import GOLDEN, full_disk
from PIL import Image, ImageChops
from pydicom.data import get_testdata_file
from typer.testing import CliRunner

from healthgpt import precision_healthgpt
from healthgpt.app import common
from healthgpt.app.cli import app
from healthgpt.app.draw import LABEL, MARGIN, SHEET_HEIGHT


def draw(*arguments):
    return CliRunner().invoke(app, ["draw", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("m3").folder


RETINA = GOLDEN / "images/retina.png"  # 180 x 140 pixels


def test_the_size_of_the_input_and_a_sheet(folder, tmp_path):
    square, wide, sheet = (tmp_path / f"{name}.png" for name in ("square", "wide", "sheet"))
    result = draw(RETINA, "Reconstruct the image.", "-c", folder, "-o", square, "--sheet", sheet)
    assert result.stdout == f"{square} (32 x 32 pixels)\n{sheet}\n", result.output
    options = ["--keep-aspect-ratio", "--sheet", sheet, "--json"]
    result = draw(RETINA, "Reconstruct the image.", "-c", folder, "-o", wide, *options)
    assert json.loads(result.stdout) == {
        "output": str(wide),
        "width": 180,
        "height": 140,
        "task": "generation",
        "sheet": str(sheet),
    }
    drawn = Image.open(square).resize((180, 140), Image.Resampling.LANCZOS)
    assert Image.open(wide).tobytes() == drawn.tobytes()
    width = round(180 * SHEET_HEIGHT / 140)
    assert Image.open(sheet).size == (2 * width + 3 * MARGIN, SHEET_HEIGHT + LABEL + 2 * MARGIN)
    left, top = MARGIN, MARGIN + LABEL
    for picture in (Image.open(RETINA).convert("RGB"), drawn):
        part = Image.open(sheet).crop((left, top, left + width, top + SHEET_HEIGHT))
        shown = picture.resize((width, SHEET_HEIGHT), Image.Resampling.LANCZOS)
        assert ImageChops.difference(part, shown).getbbox() is None
        assert Image.open(sheet).crop((left, 0, left + width, top)).convert("L").getextrema()[0] < 128  # a label
        left += width + MARGIN


def test_frames_of_volumes(folder, tmp_path):
    path = get_testdata_file("examples_ybr_color.dcm", download=False)
    for name, options in (("middle", []), ("15", ["--frame", 15]), ("0", ["--frame", 0])):
        result = draw(path, "Reconstruct.", "-c", folder, "-o", tmp_path / f"{name}.png", *options)
        assert result.exit_code == 0, result.output
    middle, same, first = ((tmp_path / f"{name}.png").read_bytes() for name in ("middle", "15", "0"))
    assert middle == same and middle != first
    assert b"eXIf" not in middle and b"tEXt" not in middle


def test_a_full_disk_leaves_nothing_and_an_old_picture_stays(folder, tmp_path):
    output = tmp_path / "out.bmp"
    output.write_bytes(b"old")
    with full_disk(100):
        result = draw("Draw.", "-c", folder, "-o", output)
    assert str(result.exception) == f"{output} cannot be written: File too large."
    assert output.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["out.bmp"]


@pytest.mark.parametrize("option", ["--output", "--sheet"])
def test_what_cannot_be_written_is_refused_before_the_model_is_loaded(option, tmp_path):
    longest = tmp_path / f"{'a' * 251}.png"
    longest.touch()  # a name that a file may have, but not with what stands behind it until it is whole
    paths = {"--output": tmp_path / "out.png", "--sheet": tmp_path / "sheet.png"} | {option: longest}
    result = draw("Draw.", "-c", "nowhere", *[word for pair in paths.items() for word in pair])
    assert str(result.exception) == f"{longest} cannot be written: File name too long."
    assert list(tmp_path.iterdir()) == [longest]


@pytest.mark.parametrize(
    ("size", "options"),
    [((20000, 5), ["--keep-aspect-ratio", "-o", "out.webp"]), ((2000, 50), ["-o", "out.png", "--sheet", "out.webp"])],
)
def test_a_size_that_the_format_cannot_hold_is_refused_before_the_model_is_loaded(
    size, options, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Image.new("L", size).save("wide.png")
    result = draw("wide.png", "Reconstruct the image.", "-c", "nowhere", *options)
    assert str(result.exception).startswith(
        "out.webp has no ending of a picture format that Pillow writes in this size"
    )


def test_mistakes(folder, tmp_path, tmp_path_factory):
    given = tmp_path_factory.mktemp("given") / "retina.png"
    given.write_bytes(RETINA.read_bytes())
    output = ["-c", folder, "-o", tmp_path / "out.png"]
    for arguments, message in (
        (["Draw.", "--keep-aspect-ratio", *output], "needs one picture whose size to take, and 0 are given"),
        ([RETINA, RETINA, "Draw.", "--keep-aspect-ratio", *output], "and 2 are given"),
        (["Draw.", "--sheet", tmp_path / "sheet.txt", *output], "sheet.txt has no ending of a picture format"),
        (["Draw.", "--sheet", tmp_path / "nowhere/sheet.png", *output], "nowhere does not exist"),
        ([tmp_path, "Draw.", *output], "is a folder, and not a picture file"),
        ([given, "Draw.", "-o", given], "is one of the pictures given, which would be lost"),
        ([given, "Draw.", "--sheet", given, *output], "is one of the pictures given, which would be lost"),
        ([RETINA, "Draw.", "--frame", 1, *output], "has no frame 1: it has 1, numbered from 0 to 0"),
        (["Draw.", "--sheet", tmp_path / "../" / tmp_path.name / "out.png", *output], "are the same file"),
    ):
        result = draw(*arguments)
        assert message in str(result.exception) and not list(tmp_path.iterdir())


def test_openvino_draws_and_is_recommended_where_it_is_faster(tmp_path, monkeypatch):
    monkeypatch.setattr(precision_healthgpt, "CPU_DTYPES", frozenset({torch.float32}))
    assert "--openvino" not in draw("Draw a chest X-ray.", "-o", tmp_path / "small.png", "--dtype", "bfloat16").stderr
    monkeypatch.setattr(common, "LARGE", 10**5)
    for index, options in enumerate((["--dtype", "bfloat16"], ["--dtype", "float32"], ["--openvino"])):
        result = draw("Draw a chest X-ray.", "-o", tmp_path / f"{index}.png", *options)
        assert result.exit_code == 0 and Image.open(tmp_path / f"{index}.png").size == (64, 64)
        assert ("--openvino" in result.stderr) == (index == 0)
