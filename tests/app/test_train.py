"""`healthgpt train` as a user runs it: a plugin for a new task, the fusion stage, and what is refused."""

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import sources_of, weights_of
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from healthgpt.app.cli import app
from healthgpt.hub_export import export
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
    more = run(pairs, *options, "--eval-data", pairs, "--epochs", 1, "--learning-rate", 1e-2, "--resume")
    assert "settings: checkpoint has changed. Go on" in str(more.exception)  # which has the task by now


def test_a_run_goes_on_with_its_own_settings_only(data, checkpoints, tmp_path):
    """It may be longer; one that is at its end takes no step more."""
    file, output = data / "comprehension.jsonl", tmp_path / "run"
    command = (file, "-c", checkpoints("m3").folder, "-o", output, *QUICK, "--save-steps", 1, "--resume")
    assert f"{output} holds no run that could go on: start one without --resume" in str(run(*command).exception)
    assert not output.exists()
    output.touch()
    assert f"{output} holds no run that could go on" in str(run(*command).exception)
    output.unlink()
    assert run(*command[:-1], "--save-total-limit", 1).exit_code == 0
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    for changed, differs in (
        (("--learning-rate", 1e-3), "learning_rate was null and is 0.001"),
        (("--seed", 7), "seed was 0 and is 7"),
        (("--save-steps", 2), "save_steps was 1 and is 2"),
        (("--batch-size", 1), "batch_size was 2 and is 1"),
        (("--eval-data", file), f'eval_data was null and is "{file}"; eval_data has changed'),
        (("--stage", "alignment"), 'stage was "instruction" and is "alignment"'),
    ):
        refused = run(*command, *changed)
        expected = f"{output} holds a run with other settings: {differs}. Go on with those in its run.json, or choose another folder."
        assert str(refused.exception) == expected
    finished = (output / "comprehension/plugin.safetensors").read_bytes()
    (output / "comprehension/plugin.safetensors").unlink()
    assert run(*command).exit_code == 0 and not (output / "checkpoint-3").exists()
    assert (output / "comprehension/plugin.safetensors").read_bytes() == finished
    assert run(*command, "--max-steps", 3).exit_code == 0
    assert (output / "checkpoint-3").exists() and (output / "checkpoint-2").exists()
    with open(file, "a") as lines:
        lines.write(file.read_text().splitlines()[0] + "\n")
    assert "settings: data has changed. Go on" in str(run(*command).exception)


def test_a_run_goes_on_after_a_whole_pass_with_its_evaluation(data, checkpoints, tmp_path, monkeypatch):
    file = data / "comprehension.jsonl"
    command = (file, "-c", checkpoints("m3").folder, "--batch-size", 1, "--max-steps", 6, "--save-steps", 2)
    command = (*command, "--eval-data", file, "--dropout", 0.5, "--device", "cpu")
    steps = len(file.read_text().splitlines())
    assert steps == 2 and run(*command, "-o", tmp_path / "whole").exit_code == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for left in ("checkpoint-4", "checkpoint-6", "comprehension"):
        shutil.rmtree(tmp_path / "killed" / left)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = run(*command, "-o", tmp_path / "killed", "--resume")
    assert "settings: processes was 1 and is 2. Go on" in str(refused.exception)
    monkeypatch.delenv("WORLD_SIZE")
    assert run(*command, "-o", tmp_path / "killed", "--resume").exit_code == 0
    losses = []
    for name in ("whole", "killed"):
        history = json.loads((tmp_path / name / "checkpoint-6/trainer_state.json").read_text())["log_history"]
        losses.append([(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry])
    assert [step for step, _ in losses[0]] == [2, 4, 6] and losses[0] == losses[1]
    whole, killed = (load_file(tmp_path / name / "comprehension/plugin.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    os.utime(data / "ct.png", (0, 0))
    refused = run(*command, "-o", tmp_path / "killed", "--resume")
    assert "settings: pictures has changed. Go on" in str(refused.exception)


def test_the_three_stages_one_after_the_other(data, checkpoints, tmp_path):
    """Every stage starts from the checkpoint that has taken what the one before it trained."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints("m3").folder, folder)
    before = weights_of(folder)
    for stage, file, tasks in (
        ("alignment", "comprehension", ["comprehension"]),
        ("alignment", "generation", ["generation"]),
        ("fusion", "both", ["generation"]),
        ("instruction", "comprehension", ["comprehension"]),
        ("instruction", "generation", ["generation"]),
    ):
        output = tmp_path / f"{stage}-{file}"
        result = run(data / f"{file}.jsonl", "-c", folder, "-o", output, "--stage", stage, *QUICK)
        assert result.exit_code == 0, result.output
        assert sorted(path.parent.name for path in output.glob("*/plugin.safetensors")) == tasks
        for task in tasks:
            add_plugin(folder, output / task, replace=True)
    after = weights_of(folder)
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    tables = {"model.token_embeddings.generation.weight", "token_heads.generation.weight"}
    assert tables < changed and all("generation" in name or "comprehension" in name for name in changed)
    # The fused tables went on from the published ones, not from the base's.
    for name in tables:
        assert (after[name] - before[name]).abs().max() < 1e-2
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert model.config.tasks["comprehension"].token_tables is None
    assert model.config.tasks["generation"].token_tables == "generation"


def test_fusion_where_another_task_shares_the_tables(data, pairs, checkpoints, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints("m3").folder, folder)
    options = ("-c", folder, *QUICK)
    run(pairs, *options, "-o", tmp_path / "new", "--task", "ct_to_mri", "--init-from", "generation")
    add_plugin(folder, tmp_path / "new/ct_to_mri")
    shared = weights_of(folder)["token_heads.generation.weight"]
    assert run(data / "both.jsonl", *options, "-o", tmp_path / "fused", "--stage", "fusion").exit_code == 0
    add_plugin(folder, tmp_path / "fused/generation", replace=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    tables = {name: task.token_tables for name, task in model.config.tasks.items()}
    assert tables == {"comprehension": None, "generation": "generation_own", "ct_to_mri": "generation"}
    assert torch.equal(model.token_heads["generation"].weight, shared)
    assert not torch.equal(model.token_heads["generation_own"].weight, shared)


def test_fusion_of_a_4_bit_checkpoint_that_has_no_tables_of_its_own(data, checkpoints, tmp_path):
    sources = sources_of(checkpoints("made_wide").source)
    export(replace(sources, fusion=None), tmp_path / "checkpoint", "bfloat16", "4bit", skip_forward=True)
    options = ("-c", tmp_path / "checkpoint", "-o", tmp_path / "run", "--stage", "fusion", *QUICK)
    result = run(data / "both.jsonl", *options)
    assert result.exit_code == 0, (result.output, result.exception)
    saved = load_file(tmp_path / "run/generation/plugin.safetensors")
    assert saved["token_heads.generation.weight"].dtype == torch.bfloat16
    add_plugin(tmp_path / "checkpoint", tmp_path / "run/generation", replace=True)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint", trust_remote_code=True)
    assert torch.equal(model.token_heads["generation"].weight, saved["token_heads.generation.weight"])


def test_a_progress_bar_is_shown(healthgpt, pairs, checkpoints, tmp_path):
    options = ("--task", "ct_to_mri", "--init-from", "generation", *QUICK)
    shown = healthgpt("train", pairs, "-c", checkpoints("m3").folder, "-o", tmp_path / "run", *options)
    assert shown.returncode == 0, shown.stderr
    assert "2/2 [" in shown.stderr and "Warning" not in shown.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        (("--epochs", "0"), "--epochs is a number above 0, not 0.0"),
        (("--epochs", "inf"), "--epochs is a number above 0, not inf"),
        (("--task", "new", "--kind", "image", "--alpha", "nan"), "A task's alpha must be a positive number, got nan"),
        (
            ("--dtype", "float16", "--device", "cpu", "--stage", "fusion"),
            "float16 is trained on a GPU only: on the CPU choose bfloat16",
        ),
        (("--stage", "polish"), "no stage 'polish'; choose one of alignment, fusion, instruction"),
        (("--task", "new"), "Task 'new' is new: say its --kind"),
        (("--task", "new", "--kind", "sound"), "kind is 'text' or 'image', got 'sound'"),
        (("--task", "new", "--init-from", "old"), "no task 'old' to start from; there are comprehension, generation"),
        (("--eval-data", "nothing.jsonl"), "There is no file nothing.jsonl"),
        (("--kind", "image"), "are for a --task that is new"),
        (
            ("--task", "new", "--kind", "image", "--init-from", "comprehension"),
            "A task of the kind image cannot start from 'comprehension', which is of the kind text",
        ),
        (
            ("--task", "new", "--init-from", "generation"),
            "No line of .*both.jsonl has the task 'new': name it there, or leave the field task out",
        ),
        (
            ("--stage", "fusion", "--max-length", 20),
            r"Line 1 of .*both.jsonl cannot be trained on: The sample .* may have 20",
        ),
        ((), "has tasks of both kinds, comprehension, generation; this stage trains one kind at a time"),
    ],
)
def test_what_cannot_be_trained_is_said_and_nothing_written(data, checkpoints, tmp_path, options, message):
    result = run(data / "both.jsonl", "-c", checkpoints("m3").folder, "-o", tmp_path / "run", *options)
    assert result.exit_code == 1 and re.search(message, str(result.exception)), result.exception
    assert not (tmp_path / "run").exists()
