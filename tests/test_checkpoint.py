"""An exported folder as a stranger uses it: another process, another place, saved again, through the pipelines."""

import json
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import inputs_of, messages_of, weights_of
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from healthgpt import HealthGPTError
from healthgpt.modeling_healthgpt import HealthGPTModel


def run_elsewhere(script, folder, tmp_path):
    """Runs a script in a new process that sees neither this repository nor an installed healthgpt package."""
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text("import sys\nsys.modules['healthgpt'] = None\n")
    environment = {"PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment |= {key: value for key, value in __import__("os").environ.items() if key == "PATH"}
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)


def test_every_auto_class_loads_the_folder_in_a_fresh_process(checkpoints, tmp_path):
    folder = tmp_path / "elsewhere" / "checkpoint"
    shutil.copytree(checkpoints("m3").folder, folder)
    script = """
        import importlib.util, sys
        import transformers
        assert sys.modules["healthgpt"] is None
        assert importlib.util.find_spec("torchvision") is None
        folder = sys.argv[1]
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        print(type(config).__name__, type(processor).__name__)
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": "Describe the abnormality in the left lung."}]}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )
        for name in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
            model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
            sequences = model.generate(**inputs, max_new_tokens=24)
            print(type(model).__name__, sequences[0, inputs["input_ids"].shape[1]:].tolist())
    """
    result = run_elsewhere(script, folder, tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.strip().split("\n")
    assert lines[0] == "HealthGPTConfig HealthGPTProcessor"
    assert lines[1:] == ["HealthGPTForConditionalGeneration [135, 446, 307, 461]"] * 3


def test_saved_again_it_loads_again_bit_for_bit(m3, tmp_path):
    checkpoint, model, processor = m3
    folder = tmp_path / "again"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    before, after = weights_of(checkpoint.folder), weights_of(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    files = {path.name for path in checkpoint.folder.iterdir()}
    files = {name for name in files if name.endswith((".json", ".py", ".jinja"))} - {"healthgpt_export.json"}
    files.remove("model.safetensors.index.json")
    assert files <= {path.name for path in folder.iterdir()}
    configs = [json.loads((path / "config.json").read_text()) for path in (checkpoint.folder, folder)]
    assert configs[0]["auto_map"] == configs[1]["auto_map"]
    assert configs[0]["tasks"] == configs[1]["tasks"]

    again = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for case in checkpoint.cases:
        inputs = inputs_of(processor, case)
        sequences = again.generate(**inputs, task=case["task"], max_new_tokens=case["max_new_tokens"])
        assert sequences[0, inputs["input_ids"].shape[1] :].tolist() == case["generated_ids"]


def test_shards_and_another_dtype_round_trip(checkpoints, tmp_path):
    folder = checkpoints("xl32").folder
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "small", max_shard_size="100KB")
    assert (tmp_path / "small/model.safetensors.index.json").exists()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert again.dtype == torch.bfloat16
    for (name, left), right in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


def test_a_checkpoint_that_lacks_or_has_too_many_tensors_is_refused(checkpoints, tmp_path):
    from safetensors.torch import save_file

    source = checkpoints("l14").folder
    for change, message in (
        ("lack", "lacks tensors of the model"),
        ("extra", "has tensors that the model has no place for"),
        ("shape", "has tensors of another shape than its configuration says"),
    ):
        folder = tmp_path / change
        shutil.copytree(source, folder)
        tensors = weights_of(folder)
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
        if change == "lack":
            del tensors["model.projectors.comprehension.0.bias"]
        elif change == "extra":
            tensors["model.projectors.comprehension.4.bias"] = torch.zeros(3)
        else:
            tensors["model.projectors.comprehension.0.bias"] = torch.zeros(3)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"{message}, 1 in all: model\.projectors\.comprehension\."):
            AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)


def test_a_checkpoint_without_its_heads_loads_into_the_headless_model(m3):
    checkpoint, model, _ = m3
    headless = HealthGPTModel.from_pretrained(checkpoint.folder)
    assert headless.state_dict().keys() == model.model.state_dict().keys()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        hidden_states = headless(ids, task="generation").last_hidden_state
        logits = model.token_heads["generation"](hidden_states)
        assert torch.equal(logits, model(ids, task="generation").logits)


def test_image_text_to_text_pipeline_answers(m3):
    checkpoint, _, processor = m3
    pipe = pipeline("image-text-to-text", model=str(checkpoint.folder), trust_remote_code=True)
    cases = [case for case in checkpoint.cases if case["task"] == "comprehension"]
    for case in cases:
        [output] = pipe(text=messages_of(case), max_new_tokens=24, return_full_text=False)
        assert output["generated_text"] == processor.decode(case["generated_ids"], skip_special_tokens=True)
    cases = cases[:2]
    outputs = pipe(text=[messages_of(case) for case in cases], max_new_tokens=24, return_full_text=False, batch_size=2)
    for [output], case in zip(outputs, cases, strict=True):
        assert output["generated_text"] == processor.decode(case["generated_ids"], skip_special_tokens=True)


def test_any_to_any_pipeline_draws_and_answers_without_torchvision(m3):
    checkpoint, _, processor = m3
    pipe = pipeline("any-to-any", model=str(checkpoint.folder), trust_remote_code=True)
    for case in checkpoint.cases:
        if case["task"] == "generation":
            for options in ({}, {"processor_kwargs": {"task": "generation"}}):
                [output] = pipe(text=messages_of(case), generation_mode="image", **options)
                picture = output["generated_image"]
                published = Image.open(checkpoint.source / case["decoded_png"])
                differences = zip(picture.tobytes(), published.tobytes(), strict=True)
                assert max(abs(left - right) for left, right in differences) <= 1
        else:
            [output] = pipe(text=messages_of(case), max_new_tokens=24, return_full_text=False)
            assert output["generated_text"] == processor.decode(case["generated_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("damage", ["half", "nothing", "pointer"])
def test_the_file_over_which_loading_fails_is_named(checkpoints, tmp_path, damage):
    shutil.copytree(checkpoints("m3").folder, tmp_path / "damaged")
    file = tmp_path / "damaged/model-plugin_generation-00001-of-00001.safetensors"
    content = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    file.write_bytes({"half": content[: len(content) // 2], "nothing": b"", "pointer": pointer}[damage])
    with pytest.raises(HealthGPTError, match=re.escape(str(file))) as error:
        AutoModelForImageTextToText.from_pretrained(tmp_path / "damaged")
    assert ("git-lfs" in str(error.value)) == (damage == "pointer")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "..", 5, None])
def test_an_index_that_leads_out_of_the_folder_is_refused(checkpoints, tmp_path, name):
    shutil.copytree(checkpoints("m3").folder, tmp_path / "hostile")
    shutil.copy(
        tmp_path / "hostile/model-plugin_generation-00001-of-00001.safetensors", tmp_path / "outside.safetensors"
    )
    file = tmp_path / "hostile/model.safetensors.index.json"
    index = json.loads(file.read_text())
    for key in [key for key, shard in index["weight_map"].items() if "plugin_generation" in shard]:
        index["weight_map"][key] = name
    file.write_text(json.dumps(index))
    with pytest.raises(HealthGPTError, match=re.escape(repr(name))):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "hostile")
    file.write_text("[]")
    with pytest.raises(HealthGPTError, match="has no weight_map"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "hostile")
