"""`healthgpt train` as a user runs it: a plugin for a new task, the fusion stage, and what is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from healthgpt.app.cli import app
from healthgpt.hub_export.plugins import add_plugin


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)], catch_exceptions=True)


@pytest.fixture
def pairs(data):
    """Samples that name no task."""
    lines = [json.loads(line) for line in (data / "generation.jsonl").read_text().splitlines()]
    for line in lines:
        del line["task"]
    (data / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data / "pairs.jsonl"


QUICK = ("--batch-size", 2, "--max-steps", 2, "--device", "cpu")


def test_a_plugin_for_a_new_task_that_the_checkpoint_then_takes(pairs, checkpoints, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints("m3").folder, folder)
    options = ("-c", folder, "-o", tmp_path / "run", "--task", "ct_to_mri", "--init-from", "generation", *QUICK)
    result = run(pairs, *options, "--eval-data", pairs, "--epochs", 1, "--learning-rate", 1e-2)
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "run/runs").rglob("events.out.tfevents*"))  # for TensorBoard
    add_plugin(folder, tmp_path / "run/ct_to_mri")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert list(model.config.tasks) == ["comprehension", "generation", "ct_to_mri"]
    picture = model.generate(torch.tensor([[1, 2, 3]]), task="ct_to_mri")
    assert model.decode_image_tokens(picture).shape == (1, 3, 32, 32)
    again = run(pairs, *options)
    assert "is not an empty folder; --resume goes on with the run in it" in str(again.exception)
    assert run(pairs, *options, "--resume").exit_code == 1  # the checkpoint has the task by now


def test_the_fusion_stage_gives_a_checkpoint_with_tables_for_all_tasks(data, checkpoints, tmp_path):
    result = run(
        data / "both.jsonl", "-c", checkpoints("m3").folder, "-o", tmp_path / "run", "--stage", "fusion", *QUICK
    )
    assert result.exit_code == 0, result.output
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/checkpoint", trust_remote_code=True)
    assert model.config.token_tables == ["fusion"]
    assert {task.token_tables for task in model.config.tasks.values()} == {"fusion"}


@pytest.mark.parametrize(
    "options, message",
    [
        (("--stage", "polish"), "no stage 'polish'; choose one of alignment, fusion, instruction"),
        (("--task", "new"), "Task 'new' is new: say its --kind"),
        (("--task", "new", "--kind", "sound"), "kind is 'text' or 'image', got 'sound'"),
        (("--task", "new", "--init-from", "old"), "a task of this checkpoint to --init-from"),
        (("--kind", "image"), "are for a --task that is new"),
        ((), "has tasks of both kinds, comprehension, generation; this stage trains one kind at a time"),
    ],
)
def test_what_cannot_be_trained_is_said_and_nothing_written(data, checkpoints, tmp_path, options, message):
    result = run(data / "both.jsonl", "-c", checkpoints("m3").folder, "-o", tmp_path / "run", *options)
    assert result.exit_code == 1 and message in str(result.exception)
    assert not (tmp_path / "run").exists()
