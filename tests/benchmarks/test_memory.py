"""What `healthgpt bench` prints, against plain restatements in this process."""

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from conftest import weights_of
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from typer.testing import CliRunner

from healthgpt import HealthGPTConfig
from healthgpt.app.cli import app
from healthgpt.benchmarks import memory
from healthgpt.errors_healthgpt import HealthGPTError
from healthgpt.phantoms import drawing_sample

SAMPLE = drawing_sample("test", 0, "reconstruction")


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("made_wide").folder


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def load(folder, **settings):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **settings)


def inputs_of(folder, text, task):
    content = [{"type": "image", "image": SAMPLE["input_image"]}, {"type": "text", "text": text}]
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True).apply_chat_template(
        [{"role": "user", "content": content}],
        task=task,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def restate(folder, model, length, answer):
    """Ids of the answer, probabilities of the next token over the one to compare with, codes and pixels of a picture."""
    inputs = inputs_of(folder, "Describe this picture.", "comprehension")
    prompt = inputs["input_ids"].shape[1]
    sequence = model.generate(**inputs, task="comprehension", min_new_tokens=length, max_new_tokens=length)
    own = sequence[:, prompt:]
    ids = torch.cat([inputs["input_ids"], own if answer is None else answer], dim=1)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits = model(**whole, task="comprehension").logits[0, prompt - 1 : -1]
    inputs = inputs_of(folder, "Reconstruct the image.", "generation")
    codes = model.generate(**inputs, task="generation", codes_per_pass=memory.CODES_PER_PASS)[
        :, inputs["input_ids"].shape[1] :
    ]
    pixels = model.decode_image_tokens(codes)[0]
    pixels = ((pixels.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).double()
    return own, logits.double().softmax(dim=-1), codes, pixels


def test_two_precisions_of_a_tiny_checkpoint(folder, capfd):
    # Some of the float32 weights lie on the disk, which changes no number.
    result = bench("-c", folder, "--precisions", "float32,8bit", "--tokens", "4", "--cpu-memory", "1MB", "--json")
    assert result.exit_code == 0 and capfd.readouterr().err == result.stderr == "", result.output
    content = json.loads(result.stdout)
    first, second = content["precisions"]
    assert content["checkpoint"] == str(folder)
    assert [row.pop("precision") for row in (first, second)] == ["float32", "8bit"]
    costs = {"expected", "file", "resident", "peak", "load", "first token", "tokens/s"}
    assert first.keys() == costs and second.keys() == costs | {"KL", "top-1", "codes", "PSNR"}
    assert all(value > 0 for row in (first, second) for name, value in row.items() if name in costs)
    assert first["peak"] > first["resident"] and second["peak"] > second["resident"]

    answer, p, codes, pixels = restate(folder, load(folder, dtype=torch.float32), 4, None)
    settings = BitsAndBytesConfig(load_in_8bit=True)
    quantised = load(folder, dtype=torch.bfloat16, quantization_config=settings)
    _, q, other_codes, other_pixels = restate(folder, quantised, 4, answer)
    assert second["KL"] == pytest.approx((p * (p / q).log()).sum(dim=-1).mean().item(), rel=1e-3) and second["KL"] > 0
    assert second["top-1"] == sum(a.argmax() == b.argmax() for a, b in zip(p, q, strict=True)) / 4
    assert second["codes"] == (codes == other_codes).double().mean() < 1
    error = (pixels - other_pixels).square().mean().item()
    assert second["PSNR"] == pytest.approx(10 * math.log10(255**2 / error), abs=1e-6)

    weights = weights_of(folder)
    assert first["file"] == sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    assert first["expected"] == pytest.approx(4 * sum(weight.numel() for weight in weights.values()) / 1e9)
    assert second["file"] == pytest.approx(second["expected"], rel=0.1)


def test_the_expected_gigabytes_of_every_precision(folder):
    expected = memory.expected_gigabytes(HealthGPTConfig.from_pretrained(folder))
    assert list(expected) == list(memory.PRECISIONS)
    # NF4 has a scale of 4 bytes for each 64 weights; double quantisation makes it one byte.
    bits = {"8bit": 1, "4bit": 0.5 + 4 / 64, "4bit-double": 0.5 + 1 / 64}
    for name, gigabytes in expected.items():
        other = 4 if name == "float32" else 2
        sizes = (
            weight.numel() * (bits.get(name, other) if key.endswith(".base_layer.weight") else other)
            for key, weight in weights_of(folder).items()
        )
        assert gigabytes == pytest.approx(sum(sizes) / 1e9), name


def test_codes_after_the_true_ones(folder):
    """Code by code, each after those of the picture itself."""
    found = memory.run(folder, "float32", {"dtype": "float32"}, 2, True, None)
    model = load(folder, dtype=torch.float32)
    inputs = inputs_of(folder, "Reconstruct the image.", "generation")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    offset, number = model.config.image_code_offset, model.config.vqgan_config.num_codes
    true = model.encode_image(processor.process_target_images([SAMPLE["target_image"]])) + offset
    expected = []
    for length in range(true.shape[1]):
        ids = torch.cat([inputs["input_ids"], true[:, :length]], dim=1)
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, task="generation")
        expected.append(offset + logits.logits[0, -1, offset : offset + number].argmax().item())
    assert found.codes == expected
    [drawn] = processor.post_process_multimodal_output(
        model.decode_image_tokens(torch.tensor([expected])), generation_mode="image"
    )
    assert found.picture.tobytes() == drawn.tobytes()


def test_a_precision_beside_itself_is_the_same(folder):
    found = memory.run(folder, "float32", {"dtype": "float32"}, 3, True, None)
    again = memory.run(folder, "float32", {"dtype": "float32"}, 3, True, found.answer)
    same = {"KL": 0, "top-1": 1, "codes": 1, "PSNR": 100}
    assert memory.compare(found, again) == pytest.approx(same, abs=1e-6)


def test_a_table_for_a_checkpoint_that_does_not_draw(checkpoints, monkeypatch):
    """The expected gigabytes, then a row for each precision; in this process, to save its start."""
    monkeypatch.setattr(memory, "in_own_process", lambda function, *arguments: function(*arguments))
    result = bench("-c", checkpoints("l14").folder, "--precisions", "float32,bfloat16", "--tokens", "2")
    assert result.exit_code == 0, result.output
    expected, empty, *table = result.stdout.splitlines()
    assert expected.startswith("Expected gigabytes of weights of ") and empty == ""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0] == ["precision", *memory.COLUMNS] and set(rows[1]) == {"---"}
    assert [row[0] for row in rows[2:]] == ["float32", "bfloat16"]
    assert [cell != "" for cell in rows[2]] == [True] * 7 + [False] * 4
    assert [cell != "" for cell in rows[3]] == [True] * 9 + [False] * 2


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_mistakes_are_answered_in_one_sentence_before_anything_is_measured(folder, tmp_path, monkeypatch):
    for name in ("quantised", "silent"):
        shutil.copytree(folder, tmp_path / name)
    change_config(tmp_path / "quantised", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    tasks = HealthGPTConfig.from_pretrained(folder).to_dict()["tasks"]
    change_config(tmp_path / "silent", tasks={"generation": tasks["generation"]})
    monkeypatch.delattr(memory, "in_own_process")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    for arguments, message in (
        (
            ["--precisions", "float32,int3"],
            "There is no precision 'int3'; choose from float32, bfloat16, float16, 8bit, ",
        ),
        (["--cpu-memory", "much"], "--cpu-memory is a size such as 12GB or 500MB, not 'much'."),
        (["--precisions", "float32,8bit"], "This needs accelerate: pip install healthgpt[train]."),
        (["-c", "nowhere"], "There is no folder nowhere, "),
        (["-c", tmp_path / "quantised"], "quantised is quantised already: name the checkpoint that it was made from."),
        (["-c", tmp_path / "silent"], "silent has no task that answers in words"),
    ):
        result = bench(*arguments)
        assert isinstance(result.exception, HealthGPTError) and message in str(result.exception) and not result.stdout
        assert "\n" not in str(result.exception)
    assert bench("--tokens", "1").exit_code == 2


def test_damaged_weights_are_told_in_a_sentence_that_reaches_the_other_process(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "damaged")
    path = next((tmp_path / "damaged").glob("model-0*.safetensors"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged cannot be used: ") as error:
        memory.load(tmp_path / "damaged")
    assert "\n" not in str(error.value) and str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_a_process_that_is_killed_is_told(folder, monkeypatch):
    in_own_process = memory.in_own_process
    monkeypatch.setattr(memory, "in_own_process", lambda *_: in_own_process(os.abort))
    with pytest.raises(ValueError, match="measured float32 was killed, as happens when there is too little memory"):
        memory.measure(folder, "float32")
    with pytest.raises(BrokenProcessPool):  # an interrupt ends it at once, without a traceback
        in_own_process(signal.raise_signal, signal.SIGINT)
    # In a process of its own, since the signal is for the whole process.
    script = "import time; from healthgpt.benchmarks.memory import in_own_process; print(1, flush=True); in_own_process(time.sleep, 600)"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "1\n"
    start = time.monotonic()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=300)[1].rstrip().endswith("KeyboardInterrupt") and process.returncode != 0
    assert time.monotonic() - start < 300
