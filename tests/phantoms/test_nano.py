"""The small model: how it is built, and what the one that comes with the package can do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from healthgpt.app.cli import app
from healthgpt.conversations import conversation, prepare
from healthgpt.drafting_healthgpt import DraftedPasses
from healthgpt.evaluation import compare_pictures
from healthgpt.hub_export.merge import HUB_FILES
from healthgpt.phantoms import demo, drawing_sample, nano
from healthgpt.phantoms.parts import around_picture
from healthgpt.phantoms.report import draw_tasks, report_answers, report_findings, report_pictures
from healthgpt.phantoms.samples import INSTRUCTIONS, comprehension_sample

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def small():
    folder = ROOT / "nano"
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        ("reconstruction", 6.5),
        ("super_resolution", 6.5),
        ("ct_to_mri", 8.5),
        ("mri_to_ct", 8.5),
        ("report_to_xray", 45),
    ],
)
def test_drawings_take_a_tenth_of_the_passes(small, monkeypatch, kind, passes):
    model, processor = small
    taken = []
    finish = DraftedPasses.finish
    monkeypatch.setattr(DraftedPasses, "finish", lambda self: (taken.append(self.num_passes), finish(self)))
    for number in range(3):
        sample = drawing_sample("test", number, kind)
        images = [] if sample["input_image"] is None else [sample["input_image"]]
        inputs = prepare(processor, conversation(images, sample["instruction"]), "generation")
        drawn = model.generate(**inputs, task="generation", codes_per_pass=model.config.num_image_codes)
        assert torch.equal(drawn, model.generate(**inputs, task="generation", codes_per_pass=1))
    assert len(taken) == 3 and sum(taken) <= 3 * passes


def test_it_is_small_and_carries_the_code_of_this_package():
    files = [path for path in (ROOT / "nano").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16e6
    for name in HUB_FILES:
        assert (ROOT / "nano" / name).read_bytes() == (ROOT / name).read_bytes(), f"make nano, or copy {name} to nano/"
    card = ModelCard.load(ROOT / "nano/README.md")
    assert "worthless for medicine" in card.text and "| modality | " in card.text and "| ct_to_mri | " in card.text


def test_its_base_is_taught_the_places_of_a_drawing(small):
    model, processor = small
    orders = [text.format(report="No finding.") for text in INSTRUCTIONS.values()]
    before, *after = around_picture(processor.tokenizer, orders)
    picture = [processor.image_token_id] * processor.num_image_patches
    for order, end in zip(orders, after, strict=True):
        prompt = prepare(processor, conversation([Image.new("RGB", (64, 64))], order), "generation")["input_ids"][0]
        assert prompt.tolist() == [*before, *picture, *end, model.config.image_start_token_id]


def test_it_knows_modalities_and_findings_of_the_test_split(small):
    answers = report_answers(*small, 200)
    assert answers["modality"]["value"] >= 95
    assert answers["closed"]["value"] >= 85 and answers["closed"]["trivial"] < 65


def test_it_denies_a_finding_although_there_is_another(small):
    model, processor = small
    samples = [comprehension_sample("test", number, "closed") for number in range(150)]
    samples = [s for s in samples if s["response"] == "no" and "No finding" not in s["report"]]
    questions = [conversation([sample["input_image"]], sample["instruction"]) for sample in samples]
    inputs = prepare(processor, questions, "comprehension")
    sequences = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    answers = processor.batch_decode(sequences, skip_special_tokens=True)
    assert len(answers) > 30 and answers.count("no") > 0.85 * len(answers)


def test_it_draws_better_than_trivial_pictures(small):
    drawings = draw_tasks(*small, 16)
    pictures = report_pictures(drawings)
    assert pictures.keys() == INSTRUCTIONS.keys()
    for task, ways in pictures.items():
        for metric, margin, lost in (("SSIM", 15, 6), ("PSNR", 3, 3.5)):
            drawn, ceiling = (ways[way][metric]["value"] for way in ("drawn", "ceiling"))
            trivial = [ways[way][metric]["value"] for way in ("input", "mean") if way in ways]
            if task == "reconstruction":  # whose input is the truth
                trivial = [ways["mean"][metric]["value"]]
            assert drawn > max(trivial) + margin, (task, metric)
            assert ceiling - lost < drawn <= ceiling + 1, (task, metric)
    findings = report_findings(*small, drawings)
    for task, ways in findings.items():
        shown = sum(sample["finding"] != "no finding" for sample in drawings[task][0])
        assert {result["count"] for result in ways.values()} == {shown} and ways["truth"]["value"] >= 70


def test_the_commands_use_it_where_no_checkpoint_is_named(tmp_path):
    drawing_sample("test", 0, "ct_to_mri")["input_image"].save(tmp_path / "ct.png")
    asked = CliRunner().invoke(app, ["ask", str(tmp_path / "ct.png"), "What imaging modality is this?"])
    assert asked.stdout == "CT\n" and "small demonstration model, worthless for medicine" in asked.stderr
    drawn = CliRunner().invoke(
        app, ["draw", str(tmp_path / "ct.png"), "Turn this CT into an MRI.", "-o", str(tmp_path / "mri.png")]
    )
    assert drawn.exit_code == 0 and Image.open(tmp_path / "mri.png").size == (64, 64)


def test_the_sheet_shows_input_output_and_truth(small, tmp_path):
    samples = [drawing_sample("test", 1, task) for task in ("mri_to_ct", "report_to_xray")]
    truths = [sample["target_image"] for sample in samples]
    sheet = demo.contact_sheet(samples, truths)
    step = demo.SCALE * 64 + demo.MARGIN
    for row, sample in enumerate(samples):
        top = demo.TITLE + row * (demo.SCALE * 64 + demo.TITLE + demo.MARGIN) + demo.TITLE
        for column, picture in enumerate((sample["input_image"], truths[row], truths[row])):
            left = demo.MARGIN + column * step
            shown = sheet.crop((left, top, left + demo.SCALE * 64, top + demo.SCALE * 64)).resize(
                (64, 64), Image.Resampling.NEAREST
            )
            assert shown == (picture or Image.new("RGB", (64, 64), "white"))


def test_the_demonstration_answers_five_questions_and_draws_five_pictures(tmp_path):
    command = [sys.executable, "-m", "healthgpt.phantoms.demo", ROOT / "nano", tmp_path / "demo"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    answered = re.findall(r"^    answer: (.+)    \(true: (.+)\)$", shown, flags=re.MULTILINE)
    assert len(answered) == 5 and all(answer == truth for answer, truth in answered)
    for number, task in enumerate(INSTRUCTIONS):
        truth = drawing_sample("test", 0, task)["target_image"]
        drawn = Image.open(tmp_path / f"demo/{task}.png")
        assert f"{task}: {tmp_path / 'demo' / task}.png" in shown
        assert compare_pictures(drawn, truth)["SSIM"] > 60
        sheet = Image.open(tmp_path / "demo/sheet.png")
        left, top = 2 * demo.MARGIN + demo.SCALE * 64, 2 * demo.TITLE
        top += number * (demo.SCALE * 64 + demo.TITLE + demo.MARGIN)
        part = sheet.crop((left, top, left + demo.SCALE * 64, top + demo.SCALE * 64))
        assert part.resize((64, 64), Image.Resampling.NEAREST).tobytes() == drawn.tobytes()


def test_it_is_built_from_nothing_and_a_second_run_has_nothing_to_train(tmp_path, monkeypatch, capsys):
    """At 0.3 % of its steps and samples, which teach nothing."""
    monkeypatch.setattr(nano, "REAL", GOLDEN / "images")
    nano.build(tmp_path / "work", tmp_path / "small", scale=0.003)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert {task: settings.kind for task, settings in model.config.tasks.items()} == nano.KINDS
    assert [model.config.tasks[task].token_tables for task in nano.KINDS] == [None, "generation"]
    card = (tmp_path / "small/README.md").read_text()
    assert "| retina | " in card and json.loads((tmp_path / "work/report.json").read_text())["answers"]
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "work/stages").rglob("trained.safetensors")}
    assert len(trained) == len(nano.STAGES)
    monkeypatch.setattr(nano, "WAYS", {"stage 1 alone": nano.STAGES[:1]})
    nano.build(tmp_path / "work", tmp_path / "small", scale=0.003, compare=True)
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "work/stages").rglob("trained.safetensors")
    } == trained
    assert "| stage 1 alone | " in (tmp_path / "small/README.md").read_text()
    monkeypatch.setattr(nano, "REAL", tmp_path / "not in a wheel")
    monkeypatch.setattr(sys, "argv", ["nano", str(tmp_path / "work"), str(tmp_path / "small"), "--scale", "0.003"])
    nano.main()
    card = (tmp_path / "small/README.md").read_text()
    assert "On the test split" in card and "On real pictures" not in card
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "work/stages").rglob("trained.safetensors")
    } == trained
    monkeypatch.setattr(nano, "build", interrupt)
    with pytest.raises(SystemExit) as stop:
        nano.main()
    assert stop.value.code == 130 and f"kept in {tmp_path / 'work'}; the same command" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["nano", str(tmp_path / "work"), str(tmp_path / "small"), "--scale", "0.004"])
    with pytest.raises(SystemExit, match=r"other settings: scale was 0.003 and is 0.004\."):
        nano.main()


def interrupt(*_):
    raise KeyboardInterrupt
