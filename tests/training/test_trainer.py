"""What is trained and with what, resuming, precisions, quantised bases and several processes."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from healthgpt.hub_export.plugins import add_plugin
from healthgpt.samples import read_samples
from healthgpt.training import (
    RECIPES,
    HealthGPTTrainer,
    TrainingCollator,
    add_codes,
    add_task,
    last_checkpoint,
    save_plugin,
    training_arguments,
)
from healthgpt.training.trainer import TRAINED_NAME


def trainer_of(data, model, processor, stage, name, output, batch_size=2, changes=None, **options):
    kinds = {task: settings.kind for task, settings in model.config.tasks.items()}
    samples = add_codes(read_samples(data / f"{name}.jsonl", model.config, processor), model, processor)
    tasks = sorted(set(samples["task"]))
    recipe = replace(RECIPES[stage, kinds[tasks[0]]], batch_size=batch_size, **changes or {})
    options = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True} | options
    arguments = training_arguments(recipe, model, output, **options)
    return HealthGPTTrainer(
        model, recipe, tasks, args=arguments, train_dataset=samples, data_collator=TrainingCollator(processor)
    )


@pytest.mark.parametrize(
    "stage, name, trained",
    [
        ("alignment", "comprehension", {"model.projectors.comprehension.": 1e-3}),
        ("alignment", "generation", {"model.projectors.generation.": 2e-5, ".plugins.generation.": 2e-4}),
        ("fusion", "both", {"model.token_embeddings.fusion.": 2e-4, "token_heads.fusion.": 2e-4}),
        ("instruction", "comprehension", {"model.projectors.comprehension.": 2e-5, ".plugins.comprehension.": 2e-4}),
        ("instruction", "generation", {"model.projectors.generation.": 2e-5, ".plugins.generation.": 2e-4}),
    ],
)
def test_a_stage_changes_its_parts_with_their_rates_and_nothing_else(data, load, tmp_path, stage, name, trained):
    model, processor = load()
    if stage == "fusion":
        model.use_token_tables("fusion", ["comprehension", "generation"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = trainer_of(data, model, processor, stage, name, tmp_path / "run", warmup_steps=0)
    trainer.train()
    rates = {parameter: group["lr"] for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert all(group["weight_decay"] == 0 for group in trainer.optimizer.param_groups)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    for key, value in model.named_parameters():
        rate = next((rate for part, rate in trained.items() if part in key), None)
        assert rates.get(value) == rate, key
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if any(part in key for part in trained)}


@pytest.mark.parametrize(
    "stage, name",
    [
        ("alignment", "comprehension"),
        ("alignment", "generation"),
        ("fusion", "both"),
        ("instruction", "comprehension"),
        ("instruction", "generation"),
    ],
)
def test_the_loss_falls_on_a_fixed_batch(data, load, tmp_path, stage, name):
    model, processor = load()
    if stage == "fusion":
        model.use_token_tables("fusion", ["comprehension", "generation"])
    count = len((data / f"{name}.jsonl").read_text().splitlines())
    options = {"batch_size": count, "per_device_batch_size": count, "max_steps": 8, "logging_steps": 1}
    trainer = trainer_of(data, model, processor, stage, name, tmp_path / "run", warmup_steps=0, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0]


def test_a_plugin_saved_alone_gives_the_same_logits_elsewhere(data, load, checkpoints, tmp_path):
    model, processor = load()
    trainer = trainer_of(data, model, processor, "instruction", "generation", tmp_path / "run", warmup_steps=0)
    trainer.train()
    save_plugin(model, "generation", tmp_path / "plugin")
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints("m3").folder, folder)
    add_plugin(folder, tmp_path / "plugin", "trained")
    elsewhere = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    inputs = TrainingCollator(processor)(trainer.train_dataset.to_list())
    del inputs["task"]
    with torch.no_grad():
        expected = model.eval()(**inputs, task="generation").logits
        assert torch.equal(elsewhere(**inputs, task="trained").logits, expected)
        assert not torch.equal(elsewhere(**inputs, task="generation").logits, expected)


def test_a_training_that_diverged_is_not_saved(load, tmp_path):
    model, _ = load()
    model.model.projectors["generation"][0].weight.data[0, 0] = torch.inf
    with pytest.raises(
        ValueError, match="training of 'generation' diverged, and nothing was saved: lower the learning rate"
    ):
        save_plugin(model, "generation", tmp_path / "plugin")
    assert not (tmp_path / "plugin").exists()


def test_a_killed_run_goes_on_as_if_it_had_not_been(data, checkpoints, tmp_path):
    """Killed in the middle of the first pass over five samples, whose order and dropout then go on where they were."""
    lines = (data / "generation.jsonl").read_text().splitlines()
    (data / "five.jsonl").write_text("\n".join([*lines, *lines, lines[0]]).replace("Draw a", "Paint a", 1) + "\n")
    command = [sys.executable, "-m", "healthgpt", "train", data / "five.jsonl", "-c", checkpoints("m3").folder]
    command += ["--batch-size", 1, "--max-steps", 8, "--save-steps", 2, "--device", "cpu", "--dropout", 0.5]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name, *options):
        return subprocess.Popen(
            list(map(str, [*command, "-o", tmp_path / name, *options])),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    whole = start("whole")
    assert whole.wait(200) == 0, whole.stdout.read()
    killed = start("killed")
    while not list((tmp_path / "killed").glob("checkpoint-2/trainer_state.json")):
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    reached = last_checkpoint(tmp_path / "killed")
    assert reached.endswith(("checkpoint-2", "checkpoint-4")) and not (tmp_path / "killed/generation").exists()
    resumed = start("killed", "--resume")
    assert resumed.wait(200) == 0, resumed.stdout.read()
    whole, killed = (load_file(tmp_path / name / "generation/plugin.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_a_checkpoint_that_a_kill_cut_off_is_passed_over(tmp_path, monkeypatch):
    for number in (2, 10, 12, 14, 16):
        (tmp_path / f"checkpoint-{number}").mkdir()
    assert last_checkpoint(tmp_path) is None
    for number in (2, 10, 14):
        (tmp_path / f"checkpoint-{number}/trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-16/trainer_state.json").write_text("{")
    for number in (2, 10, 16):
        (tmp_path / f"checkpoint-{number}/rng_state.pth").touch()
    assert last_checkpoint(tmp_path).endswith("checkpoint-10")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert last_checkpoint(tmp_path) is None
    for number, process in ((10, 0), (2, 0), (2, 1)):
        (tmp_path / f"checkpoint-{number}/rng_state_{process}.pth").touch()
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")


@pytest.mark.parametrize("name", [TRAINED_NAME, "optimizer.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named(data, load, tmp_path, name):
    model, processor = load("m3")
    trainer = trainer_of(data, model, processor, "instruction", "comprehension", tmp_path, save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-1" / name).write_bytes((tmp_path / "checkpoint-1" / name).read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"checkpoint-1.* cannot be used: "):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_of_another_rank_is_refused(data, load, tmp_path):
    model, processor = load("m3")
    trainer = trainer_of(data, model, processor, "instruction", "comprehension", tmp_path, save_steps=1)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-1" / TRAINED_NAME)
    save_file({key: value[:1].clone() for key, value in saved.items()}, tmp_path / "checkpoint-1" / TRAINED_NAME)
    with pytest.raises(ValueError, match="checkpoint-1 is of a training of other parts, or of other sizes"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_gradient_checkpointing_and_accumulation_change_nothing(data, load, tmp_path):
    """Plain gradient descent without dropout, on answers of different lengths: what moved is the sum of the gradients."""
    changes = {"dropout": 0.0, "learning_rates": {"projector": 1.0, "plugin": 1.0}}
    plain = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1, "warmup_steps": 0}
    results = []
    for options in ({}, {"gradient_checkpointing": True}, {"per_device_batch_size": 2}, {"seed": 7}):
        model, processor = load()
        output = tmp_path / "run"
        trainer = trainer_of(
            data, model, processor, "instruction", "comprehension", output, changes=changes, **plain, **options
        )
        before = {key: value.detach().clone() for key, value in trainer.trained_state().items()}
        trainer.train()
        moved = {key: value.detach() - before[key] for key, value in trainer.trained_state().items()}
        results.append(torch.cat([value.flatten() for value in moved.values()]))
    assert results[0].norm() > 0
    for result in results[1:]:
        assert (result - results[0]).norm() < 1e-4 * results[0].norm()


def test_dropout_is_that_of_the_recipe_and_off_at_inference(data, load, tmp_path):
    model, processor = load()
    inputs = processor(text="A word.", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs, task="generation").logits
        trainer_of(data, model, processor, "instruction", "generation", tmp_path / "run")
        plugin = model.model.language_model.layers[0].mlp.down_proj.plugins["generation"]
        assert plugin.dropout.p == model.config.tasks["generation"].dropout == 0.05
        assert torch.equal(model.eval()(**inputs, task="generation").logits, expected)
        assert not torch.equal(model.train()(**inputs, task="generation").logits, expected)


def test_a_half_precision_base_trains_in_mixed_precision(data, load, tmp_path):
    model, processor = load(dtype=torch.bfloat16)
    trainer = trainer_of(data, model, processor, "instruction", "generation", tmp_path / "run")
    trainer.train()
    assert trainer.args.bf16 and {value.dtype for value in trainer.trained_state().values()} == {torch.float32}
    frozen = {value.dtype for value in model.parameters() if not value.requires_grad}
    assert frozen == {torch.bfloat16}


def test_a_plugin_trains_on_a_4_bit_base(data, load, tmp_path):
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model, processor = load("made_wide", quantization_config=settings, dtype=torch.bfloat16)
    settings = {"kind": "image", "rank": 8, "alpha": 16, "num_experts": 4, "vision_layer": 1}
    add_task(model, processor, "ct_to_mri", settings)
    text = (data / "generation.jsonl").read_text().replace('"generation"', '"ct_to_mri"')
    (data / "pairs.jsonl").write_text(text)
    trainer = trainer_of(data, model, processor, "instruction", "pairs", tmp_path / "run", max_steps=1, warmup_steps=0)
    base = model.model.language_model.layers[0].mlp.down_proj.base_layer
    assert type(base).__name__ == "Linear4bit"
    before = {key: value.detach().clone() for key, value in trainer.trained_state().items()}
    trainer.train()
    assert {value.dtype for value in trainer.trained_state().values()} == {torch.float32}
    moved = {key for key, value in trainer.trained_state().items() if not torch.equal(value, before[key])}
    # lora_B starts at zero, where neither of the other two has a gradient
    assert moved == {key for key in before if "lora_B" in key or "projectors" in key}
    save_plugin(model, "ct_to_mri", tmp_path / "plugin")
    saved = load_file(tmp_path / "plugin/plugin.safetensors")
    assert saved.keys() == before.keys() and {value.dtype for value in saved.values()} == {torch.bfloat16}


def test_a_batch_that_cannot_be_made_is_refused(load, tmp_path):
    model, _ = load()
    with pytest.raises(ValueError, match="A batch of 64 samples cannot be made of 3 at once"):
        training_arguments(RECIPES["instruction", "image"], model, tmp_path, per_device_batch_size=3)


def test_two_processes_learn_what_one_does(data, checkpoints, tmp_path):
    """Of the same two batches of two samples with answers of different lengths; needs two processes that reach each other on loopback."""
    program = ["-m", "healthgpt"]
    options = ["train", str(data / "comprehension.jsonl"), "-c", str(checkpoints("m3").folder), "--device", "cpu"]
    options += ["--batch-size", "2", "--max-steps", "2", "--dropout", "0", "--learning-rate", "1e-3"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, command in (("two", launch + program), ("one", program)):
        each = "1" if name == "two" else "2"
        subprocess.run(
            [sys.executable, *command, *options, "-o", str(tmp_path / name), "--per-device-batch-size", each],
            check=True,
            env=environment,
            timeout=200,
            capture_output=True,
        )
    one, two = (load_file(tmp_path / name / "comprehension/plugin.safetensors") for name in ("one", "two"))
    assert one
    for key in one:
        difference = (two[key] - one[key]).abs()  # Adam makes much of the rounding of a gradient that is almost zero
        assert difference.max() < 2e-4 and difference.mean() < 1e-6, key
