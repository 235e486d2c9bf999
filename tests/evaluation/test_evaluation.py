"""Runs over a model: batches, resuming, tables; and the metrics of pictures against other libraries."""

import json
import math
import os
import re
import resource
from functools import partial

import numpy as np
import pytest
import torch
from conftest import GOLDEN, inputs_of
from PIL import Image
from torchmetrics.utilities.imports import _TORCHVISION_AVAILABLE
from typer.testing import CliRunner

from healthgpt.app.cli import app
from healthgpt.evaluation import (
    Item,
    Records,
    answer_items,
    compare_pictures,
    pair_folders,
    summarise_answers,
    summarise_pictures,
    write_report,
)


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_batches_give_the_golden_answers_and_a_killed_run_goes_on(m3, tmp_path, monkeypatch):
    checkpoint, model, processor = m3
    cases = [case for case in checkpoint.cases if case["task"] == "comprehension"]
    items = []
    for case in cases:
        names = case["image"] or []
        pictures = [GOLDEN / f"images/{name}.png" for name in ([names] if isinstance(names, str) else names)]
        items.append(Item(case["name"], case["question"], "yes", "closed", partial(list, pictures)))
    broken = Item("broken", "What?", "yes", "closed", lambda: [{"bytes": b""}])
    with pytest.raises(ValueError, match="Question broken: An object of type bytes is not a picture"):
        answer_items(model, processor, [broken], Records(tmp_path / "broken", {}))
    with pytest.raises(ValueError, match=f"Several questions have the name '{items[0].name}'"):
        answer_items(model, processor, [*items, items[0]], Records(tmp_path / "twice", {}))
    settings = {"checkpoint": "m3"}
    length = cases[0]["max_new_tokens"]
    records = Records(tmp_path / "run", settings)
    first = answer_items(model, processor, items[:1], records, batch_size=4, max_new_tokens=length)
    with open(tmp_path / "run/records.jsonl", "a") as file:
        file.write('{"name": "half')  # as a kill in the middle of a line leaves it
    records = Records(tmp_path / "run", settings)
    asked = []
    generate = type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda self, **kw: asked.append(len(kw["input_ids"])) or generate(self, **kw)
    )
    scored = answer_items(model, processor, items, records, batch_size=4, max_new_tokens=length)
    assert scored[0] == first[0] and sum(asked) == len(items) - 1
    for case, record in zip(cases, scored, strict=True):
        inputs = inputs_of(processor, case)
        alone = generate(model, **inputs, task="comprehension", max_new_tokens=length)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert record["answer"] == processor.decode(alone, skip_special_tokens=True).strip()
    assert len((tmp_path / "run/records.jsonl").read_text().splitlines()) == len(items)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        Records(tmp_path / "run", {"checkpoint": "other"})
    flat(0).save(tmp_path / "0.png")
    refused = run("pictures", tmp_path, tmp_path, "-o", tmp_path / "run")
    assert "holds a run with other settings" in str(refused.exception)
    assert not (tmp_path / "run/results.json").exists()
    with open(tmp_path / "run/records.jsonl", "a") as file:
        file.write("{]\n")
    with pytest.raises(ValueError, match=r"records.jsonl cannot be used: Expecting property name"):
        Records(tmp_path / "run", settings)


def test_accuracies_and_their_intervals():
    def record(kind, right, group=""):
        return {"kind": kind, "right": right, "group": group, "recall": 1.0 if right else 0.5}

    records = [record("closed", True)] * 8 + [record("closed", False)] * 2 + [record("open", False, "CT")] * 10
    summary = summarise_answers(records)
    assert summary["all"]["value"] == 40 and summary["closed"]["value"] == 80 and summary["CT"]["value"] == 0
    assert summary["open recall"]["value"] == 50
    # Wilson's interval of 8 of 10, by its formula
    n, p, z = 10, 0.8, 1.959964
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert summary["closed"]["low"] == pytest.approx(100 * (centre - half) / (1 + z * z / n), abs=1e-3)
    assert summary["closed"]["high"] == pytest.approx(100 * (centre + half) / (1 + z * z / n), abs=1e-3)


def flat(value, size=(20, 16)):
    return Image.new("RGB", size, (value, value, value))


@pytest.mark.parametrize("drawn, true", [(100, 120), (0, 255), (7, 250)])
def test_metrics_of_flat_pictures_have_a_closed_form(drawn, true):
    """Without variance SSIM is its term of luminance (Wang et al. 2004, equation 6)."""
    constant = (0.01 * 255) ** 2
    score = compare_pictures(flat(drawn), flat(true))
    assert score["SSIM"] == pytest.approx(100 * (2 * drawn * true + constant) / (drawn**2 + true**2 + constant))
    assert score["MSE"] == (drawn - true) ** 2
    assert score["PSNR"] == pytest.approx(10 * math.log10(255**2 / (drawn - true) ** 2), abs=1e-9)


def test_metrics_of_pictures_are_those_of_their_equations():
    """SSIM by its equation, the Gaussian window as a convolution, over the pixels that have a whole window."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    drawn = np.clip(true + rng.normal(0, 20, true.shape), 0, 255).astype(np.uint8)
    score = compare_pictures(Image.fromarray(drawn), Image.fromarray(true))
    x, y = (torch.tensor(picture).movedim(-1, 0)[:, None].double() for picture in (drawn, true))
    error = (x - y).square().mean().item()
    assert score["MSE"] == pytest.approx(error)
    assert score["PSNR"] == pytest.approx(10 * math.log10(255**2 / error))
    line = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def mean(picture):
        return torch.nn.functional.conv2d(picture, window)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    a, b = mean(x), mean(y)
    variances, covariance = mean(x * x) - a * a + mean(y * y) - b * b, mean(x * y) - a * b
    ssim = (2 * a * b + c1) * (2 * covariance + c2) / ((a * a + b * b + c1) * (variances + c2))
    assert score["SSIM"] == pytest.approx(100 * ssim.mean().item(), abs=1e-6)
    same = compare_pictures(Image.fromarray(true), Image.fromarray(true))
    assert same == {"SSIM": pytest.approx(100.0), "PSNR": 100.0, "MSE": 0.0}
    summary = summarise_pictures([score, same] * 50)
    assert summary["MSE"]["value"] == pytest.approx(error / 2)
    assert summary["MSE"]["low"] < error / 2 < summary["MSE"]["high"] and summary["MSE"]["high"] < 0.65 * error
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_pictures(Image.fromarray(drawn), Image.fromarray(true[:30]))
    with pytest.raises(ValueError, match="windows of 11 x 11 pixels, and the pictures have 20 x 10"):
        compare_pictures(flat(0, (20, 10)), flat(0, (20, 10)))


def test_the_table_stands_beside_the_published_figures(tmp_path):
    result = {"value": 70.0, "low": 60.0, "high": 80.0, "count": 50}
    table = write_report(tmp_path, "vqa_rad", {"closed": result, "open recall": result}, {"checkpoint": "x"})
    assert table.splitlines() == [
        "| vqa_rad | here | 95 % interval | number | HealthGPT-M3 | HealthGPT-L14 |",
        "|---|---|---|---|---|---|",
        "| closed | 70.00 | 60.00 to 80.00 | 50 | 73.7 | 77.7 |",
        "| open recall | 70.00 | 60.00 to 80.00 | 50 |  |  |",
    ]
    assert json.loads((tmp_path / "results.json").read_text())["results"]["closed"] == result
    assert write_report(tmp_path, "mine", {"all": result}, {}).startswith("| mine | here | 95 % interval | number |\n")


def test_the_command_line(data, checkpoints, tmp_path):
    folder = checkpoints("m3").folder
    asked = run(
        "answers", "samples", data / "comprehension.jsonl", "-c", folder, "-o", tmp_path / "a", "--max-new-tokens", 4
    )
    assert asked.exit_code == 0 and "| all |" in asked.output, asked.output
    drawn = run("draw", data / "generation.jsonl", "-c", folder, "-o", tmp_path / "d", "--name", "reconstruction")
    assert drawn.exit_code == 0 and "| SSIM |" in drawn.output and "91.73" in drawn.output
    assert Image.open(tmp_path / "d/drawn/1.png").size == (32, 32)
    before = (tmp_path / "d/drawn/1.png").stat().st_mtime_ns
    again = run("draw", data / "generation.jsonl", "-c", folder, "-o", tmp_path / "d", "--name", "reconstruction")
    assert again.output.splitlines()[-5:] == drawn.output.splitlines()[-5:]
    assert (tmp_path / "d/drawn/1.png").stat().st_mtime_ns == before
    drawing = np.asarray(Image.open(tmp_path / "d/drawn/0.png"), dtype=int)
    (tmp_path / "d/drawn/0.png").unlink()
    run("draw", data / "generation.jsonl", "-c", folder, "-o", tmp_path / "d", "--name", "reconstruction")
    redrawn = np.asarray(Image.open(tmp_path / "d/drawn/0.png"), dtype=int)
    assert abs(redrawn - drawing).max() <= 1  # alone, not in a batch
    assert (tmp_path / "d/drawn/1.png").stat().st_mtime_ns == before
    mixed = run("draw", data / "both.jsonl", "-c", folder, "-o", tmp_path / "a")
    assert 'settings: benchmark was "samples" and is null' in str(mixed.exception)
    inside = run("pictures", tmp_path / "d/drawn", tmp_path / "d/drawn", "-o", tmp_path / "d/drawn")
    assert "d/drawn holds the pictures: name another folder for the tables" in str(inside.exception)
    compared = run("pictures", tmp_path / "d/drawn", tmp_path / "d/drawn", "-o", tmp_path / "p")
    assert compared.exit_code == 0 and "| SSIM | 100.00 |" in compared.output
    assert len(list((tmp_path / "a").iterdir())) == 4
    os.utime(data / "mr.png", (0, 0))
    for command, kind, output in (("answers", "comprehension", "a"), ("draw", "generation", "d")):
        words = [command, *(["samples"] if command == "answers" else []), data / f"{kind}.jsonl", "-c", folder]
        options = ["--max-new-tokens", 4] if command == "answers" else ["--name", "reconstruction"]
        stale = run(*words, "-o", tmp_path / output, *options)
        assert "settings: pictures has changed. Go on" in str(stale.exception)
    os.utime(folder / "config.json")
    stale = run("answers", "samples", data / "comprehension.jsonl", "-c", folder, "-o", tmp_path / "a")
    assert "holds a run with other settings" in str(stale.exception)
    (tmp_path / "none.jsonl").touch()
    empty = run("answers", "samples", tmp_path / "none.jsonl", "-c", folder, "-o", tmp_path / "x")
    assert "has no samples" in str(empty.exception)
    drawings = run("answers", "samples", data / "generation.jsonl", "-c", folder, "-o", tmp_path / "x")
    assert "has no questions" in str(drawings.exception)
    split = run("answers", "samples", data / "both.jsonl", "-c", folder, "-o", tmp_path / "x", "--split", "test")
    assert "--split is for benchmarks" in str(split.exception)
    for command in (("answers", "samples"), ("draw",)):
        for options, message in (
            ((data / "nothing.jsonl",), "There is no file .*nothing.jsonl"),
            ((data / "both.jsonl", "--task", "nothing"), "no task 'nothing' that"),
        ):
            wrong = run(*command, *options, "-c", folder, "-o", tmp_path / "x")
            assert re.search(message, str(wrong.exception)), wrong.exception
    refused = run("draw", data / "comprehension.jsonl", "-c", folder, "-o", tmp_path / "x")
    assert "has no samples with a target_image" in str(refused.exception) and not (tmp_path / "x").exists()


def test_folders_that_are_no_pairs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="a has no pictures"):
        pair_folders(tmp_path / "a", tmp_path / "b")
    Image.new("RGB", (8, 8)).save(tmp_path / "a/1.png")
    with pytest.raises(ValueError, match="b has no pictures"):
        pair_folders(tmp_path / "a", tmp_path / "b")
    Image.new("RGB", (8, 8)).save(tmp_path / "b/2.png")
    with pytest.raises(ValueError, match="'1' lies in only one of them"):
        pair_folders(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/2.png").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "b/1.bmp")
    assert pair_folders(tmp_path / "a", tmp_path / "b") == [(tmp_path / "a/1.png", tmp_path / "b/1.bmp")]
    Image.new("RGB", (8, 8)).save(tmp_path / "a/2.PNG", format="png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b/2.png")
    assert len(pair_folders(tmp_path / "a", tmp_path / "b")) == 2
    Image.new("RGB", (8, 8)).save(tmp_path / "b/2.bmp")
    with pytest.raises(ValueError, match="two pictures are named '2'"):
        pair_folders(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/2.bmp").unlink()
    (tmp_path / "a/.hidden").touch()
    (tmp_path / "a/3.dcm").touch()
    with pytest.raises(ValueError, match="'3' lies in only one of them"):
        pair_folders(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/3.nii.gz").touch()
    for name in ("a", "b"):
        for number in (1, 2):
            (tmp_path / f"{name}/0.2.840.{number}").touch()  # DICOM
    assert pair_folders(tmp_path / "a", tmp_path / "b")[-1] == (tmp_path / "a/3.dcm", tmp_path / "b/3.nii.gz")
    with pytest.raises(ValueError, match="is no folder"):
        pair_folders(tmp_path / "a/1.png", tmp_path / "b")


def test_pictures_of_16_bits_and_more_than_files_may_be_open(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    grey = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(grey * 16).save(tmp_path / "a/0.png")
    Image.fromarray((grey // 16).astype(np.uint8)).save(tmp_path / "b/0.png")
    for number in range(1, 40):
        for name in ("a", "b"):
            os.link(tmp_path / name / "0.png", tmp_path / name / f"{number}.png")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        compared = run("pictures", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "| MSE | 0.00 | 0.00 to 0.00 | 40 |" in compared.output, compared.exception


@pytest.mark.skipif(_TORCHVISION_AVAILABLE, reason="torchvision is here, and what is said without it is not")
def test_lpips_says_what_it_needs(tmp_path):
    flat(0).save(tmp_path / "1.png")
    result = run("pictures", tmp_path, tmp_path, "-o", tmp_path / "out", "--lpips")
    assert "LPIPS needs torchvision" in str(result.exception)
