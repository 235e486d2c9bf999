"""Samples and batches: the prompts of inference, labels on the answer only, codes computed once."""

import copy
import json

import pytest
import torch
from conftest import CHECKPOINTS, GOLDEN
from datasets import Dataset
from PIL import Image

from healthgpt.samples import read_samples
from healthgpt.training import TrainingCollator, add_codes, typical_codes


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_prompts_are_those_of_inference_and_labels_the_answer(load, name):
    model, processor = load(name)
    collate = TrainingCollator(processor)
    draws = "generation" in model.config.tasks
    answers = [" A head CT.", "No <b>lesion</b>,\nbut 2 cysts.", "The <image> is dark."]
    samples = [{"task": "comprehension", "response": answer, "target_codes": None} for answer in answers]
    samples[0] |= {"instruction": "What is this?", "input_image": [GOLDEN / "images/ct.png"]}
    samples[1] |= {"instruction": "And the two others?", "input_image": [GOLDEN / "images/mr.png"] * 2}
    samples[2] |= {"instruction": "Is <image> dark?", "input_image": []}
    if draws:
        codes = [code % model.config.vqgan_config.num_codes for code in range(model.config.num_image_codes)]
        samples.append(
            {"task": "generation", "instruction": "Draw a chest.", "input_image": [], "target_codes": codes}
        )
    batch = collate(samples)
    stop = torch.tensor(model.generation_config.eos_token_id)
    for row, sample in enumerate(samples):
        pictures = [{"type": "image", "image": path} for path in sample["input_image"]]
        content = [*pictures, {"type": "text", "text": sample["instruction"]}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            task=sample["task"],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"][0]
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        labels = batch["labels"][row][batch["attention_mask"][row].bool()]
        assert torch.equal(ids[: len(prompt)], prompt) and (labels[: len(prompt)] == -100).all()
        assert torch.equal(labels[len(prompt) :], ids[len(prompt) :])
        assert torch.isin(ids[-1], stop)
        if sample["target_codes"] is None:
            text = processor.decode(ids[len(prompt) :], skip_special_tokens=True)
            assert text.strip() == sample["response"].strip()
            number = len(sample["input_image"]) * processor.num_image_patches
            assert (ids == processor.image_token_id).sum() == number
        else:
            written = ids[len(prompt) : -2] - model.config.image_code_offset
            assert written.tolist() == sample["target_codes"]
            assert processor.tokenizer.convert_ids_to_tokens(int(ids[-2])) == "<end_index>"
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    with torch.no_grad():
        assert model(**batch).loss.isfinite()


def test_the_loss_of_a_batch_is_that_of_the_published_computation(m3):
    """The golden cases give the loss of a prompt and the ids that follow it, without the end of the turn."""
    checkpoint, model, processor = m3
    collate = TrainingCollator(processor)
    cases = [case for case in checkpoint.cases if "loss" in case]
    assert {case["task"] for case in cases} == {"comprehension", "generation"}
    for case in cases:
        ids = torch.tensor(case["generated_ids"])
        codes = (ids - model.config.image_code_offset).tolist() if case["task"] == "generation" else None
        paths = [GOLDEN / f"images/{name}.png" for name in ([case["image"]] if case["image"] else [])]
        sample = {"task": case["task"], "instruction": case["question"], "input_image": paths, "target_codes": codes}
        batch = collate([sample | {"response": "x"}])
        prompt = batch["input_ids"][batch["labels"] == -100]
        answer = batch["labels"][batch["labels"] != -100]
        assert codes is None or torch.equal(answer[:-2], ids)  # a golden answer in words is no text to tokenise again
        batch["input_ids"] = torch.cat([prompt, ids])[None]
        batch["labels"] = torch.cat([torch.full_like(prompt, -100), ids])[None]
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        with torch.no_grad():
            assert abs(model(**batch).loss.item() - case["loss"]) < 1e-4


def test_codes_are_those_of_the_encoder_and_computed_once(data, load, monkeypatch):
    model, processor = load()
    samples = read_samples(data / "both.jsonl", model.config, processor)
    codes = add_codes(samples, model, processor)["target_codes"]
    expected = model.encode_image(processor.process_target_images([data / "mr.png"]))
    assert codes[0] is None and codes[2] == expected[0].tolist()
    half, _ = load(dtype=torch.bfloat16)
    half.model.vqgan.load_state_dict(model.model.vqgan.state_dict())
    rounded = copy.deepcopy(model)
    rounded.model.vqgan.bfloat16().float()
    assert list(add_codes(samples, half, processor)["target_codes"]) == list(
        add_codes(samples, rounded, processor)["target_codes"]
    )
    monkeypatch.setattr(type(model.model.vqgan), "encode", None)
    assert list(add_codes(samples, model, processor)["target_codes"]) == list(codes)
    other = samples.map(lambda row: {"instruction": f"{row['instruction']} Again."})
    assert list(add_codes(other, model, processor)["target_codes"]) == list(codes)
    (data / "link").symlink_to(data)
    linked = read_samples(data / "link/both.jsonl", model.config, processor)
    assert list(add_codes(linked, model, processor)["target_codes"]) == list(codes)
    Image.open(data / "ct.png").save(data / "mr.png")
    with pytest.raises(TypeError):
        add_codes(read_samples(data / "both.jsonl", model.config, processor), model, processor)


def test_typical_codes_are_those_that_most_targets_without_an_input_have():
    rows = [
        {"task": "xray", "input_image": [], "target_codes": [1, 2, 3, 4]},
        {"task": "xray", "input_image": ["a.png"], "target_codes": [9, 9, 9, 9]},
        {"task": "xray", "input_image": [], "target_codes": [1, 5, 3, 6]},
        {"task": "other", "input_image": [], "target_codes": [7, 7, 7, 7]},
        {"task": "xray", "input_image": [], "target_codes": [8, 5, 3, 4]},
        {"task": "answer", "input_image": [], "target_codes": None},
        {"task": "ct", "input_image": ["a.png"], "target_codes": [1, 1, 1, 1]},
    ]
    samples = Dataset.from_list(rows)
    assert typical_codes(samples, "xray") == [1, 5, 3, 4]
    assert typical_codes(samples, "other") == [7, 7, 7, 7]
    assert typical_codes(samples, "ct") is None


def test_too_long_samples(m3):
    _, _, processor = m3
    sample = {
        "task": "comprehension",
        "instruction": "Why?",
        "response": "x " * 300,
        "input_image": [],
        "target_codes": None,
    }
    whole = TrainingCollator(processor)([sample])["input_ids"].shape[1]
    cut = TrainingCollator(processor, max_length=100)([sample])
    assert whole > 300 and cut["input_ids"].shape[1] == 100 and cut["labels"][0, -1] != -100
    with pytest.raises(ValueError, match=r"prompt of .* tokens and needs 1 more, but samples may have 5"):
        TrainingCollator(processor, max_length=5)([sample])
    with pytest.raises(ValueError, match="needs 66 more, but samples may have 80"):
        TrainingCollator(processor, max_length=80)([sample | {"task": "generation", "target_codes": [0] * 64}])


def test_every_sample_is_tried_before_training(data, m3):
    _, model, processor = m3
    samples = add_codes(read_samples(data / "both.jsonl", model.config, processor), model, processor)
    collate = TrainingCollator(processor)
    collate.check(samples, "both.jsonl", needs_pictures=False)
    longest = max(collate([sample])["input_ids"].shape[1] for sample in samples.to_list())
    TrainingCollator(processor, longest).check(samples, "both.jsonl")
    number = 1 + next(i for i, sample in enumerate(samples) if sample["target_codes"] is not None)
    with pytest.raises(
        ValueError, match=rf"Line {number} of both.jsonl cannot be trained on: The sample .* may have {longest - 1}"
    ):
        TrainingCollator(processor, longest - 1).check(samples, "both.jsonl")
    without = samples.map(lambda row: {"input_image": []})
    with pytest.raises(ValueError, match=r"Line 1 of both.jsonl cannot be trained on: only the projector"):
        collate.check(without, "both.jsonl", needs_pictures=True)


def test_codes_may_stand_in_place_of_a_picture(data, m3):
    _, model, processor = m3
    codes = model.encode_image(processor.process_target_images([data / "mr.png"]))[0].tolist()
    lines = [json.loads(line) for line in (data / "both.jsonl").read_text().splitlines()]
    assert lines[2].pop("target_image") == "mr.png"
    lines[2]["target_codes"] = codes
    (data / "codes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given, encoded = (
        add_codes(read_samples(data / f"{name}.jsonl", model.config, processor), model, processor)["target_codes"]
        for name in ("codes", "both")
    )
    assert list(given) == list(encoded) and given[2] == codes
