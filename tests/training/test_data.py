"""Samples and batches: the prompts of inference, labels on the answer only, codes computed once."""

import copy
import json

import pytest
import torch
from conftest import CHECKPOINTS, GOLDEN
from PIL import Image

from healthgpt.training import TrainingCollator, add_codes, read_samples


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_prompts_are_those_of_inference_and_labels_the_answer(load, name):
    model, processor = load(name)
    collate = TrainingCollator(processor)
    draws = "generation" in model.config.tasks
    answers = [" A head CT.", "No <b>lesion</b>,\nbut 2 cysts."]
    samples = [{"task": "comprehension", "response": answer, "target_codes": None} for answer in answers]
    samples[0] |= {"instruction": "What is this?", "input_image": [GOLDEN / "images/ct.png"]}
    samples[1] |= {"instruction": "And the two others?", "input_image": [GOLDEN / "images/mr.png"] * 2}
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
    for case in (case for case in checkpoint.cases if "loss" in case):
        ids = torch.tensor(case["generated_ids"])
        codes = (ids - model.config.image_code_offset).tolist() if case["task"] == "generation" else None
        paths = [GOLDEN / f"images/{name}.png" for name in ([case["image"]] if case["image"] else [])]
        sample = {"task": case["task"], "instruction": case["question"], "input_image": paths, "target_codes": codes}
        batch = collate([sample | {"response": "x"}])
        if codes is None:  # the golden answer is no text that can be tokenised again
            continue
        batch["labels"][:, -2:] = -100
        with torch.no_grad():
            assert abs(model(**batch).loss.item() - case["loss"]) < 1e-4


def test_codes_are_those_of_the_encoder_and_computed_once(data, load, monkeypatch):
    model, processor = load()
    samples = read_samples(data / "both.jsonl", model.config)
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
    linked = read_samples(data / "link/both.jsonl", model.config)
    assert list(add_codes(linked, model, processor)["target_codes"]) == list(codes)
    Image.open(data / "ct.png").save(data / "mr.png")
    with pytest.raises(TypeError):
        add_codes(read_samples(data / "both.jsonl", model.config), model, processor)


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
    samples = add_codes(read_samples(data / "both.jsonl", model.config), model, processor)
    collate = TrainingCollator(processor)
    collate.check(samples, needs_pictures=False)
    longest = max(collate([sample])["input_ids"].shape[1] for sample in samples.to_list())
    TrainingCollator(processor, longest).check(samples)
    number = 1 + next(i for i, sample in enumerate(samples) if sample["target_codes"] is not None)
    with pytest.raises(ValueError, match=f"Line {number} cannot be trained on: The sample .* may have {longest - 1}"):
        TrainingCollator(processor, longest - 1).check(samples)
    without = samples.map(lambda row: {"input_image": []})
    with pytest.raises(ValueError, match="Line 1 cannot be trained on: only the projector is trained"):
        collate.check(without, needs_pictures=True)


def test_codes_may_stand_in_place_of_a_picture(data, m3):
    _, model, processor = m3
    codes = model.encode_image(processor.process_target_images([data / "mr.png"]))[0].tolist()
    lines = [json.loads(line) for line in (data / "both.jsonl").read_text().splitlines()]
    assert lines[2].pop("target_image") == "mr.png"
    lines[2]["target_codes"] = codes
    (data / "codes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given, encoded = (
        add_codes(read_samples(data / f"{name}.jsonl", model.config), model, processor)["target_codes"]
        for name in ("codes", "both")
    )
    assert list(given) == list(encoded) and given[2] == codes


@pytest.mark.parametrize(
    "number, change, message",
    [
        (0, {"task": "segmentation"}, "its task is 'segmentation', but the tasks are comprehension, generation"),
        (0, {"instruction": ""}, "needs a text as its instruction"),
        (0, {"response": " "}, "needs a text as its response"),
        (0, {"response": None}, "task 'comprehension' needs a response and nothing else to learn"),
        (0, {"target_image": "ct.png"}, "task 'comprehension' needs a response and nothing else to learn"),
        (
            2,
            {"target_image": None},
            "task 'generation' needs a target_image or a target_codes and nothing else to learn",
        ),
        (2, {"target_codes": [0] * 64}, "task 'generation' needs a target_image or a target_codes and nothing else"),
        (2, {"target_image": None, "target_codes": [0] * 63}, "must be a list of 64 whole numbers from 0 to 63"),
        (
            2,
            {"target_image": None, "target_codes": [0] * 63 + [64]},
            "must be a list of 64 whole numbers from 0 to 63",
        ),
        (0, {"input_image": "missing.png"}, "missing.png"),
        (2, {"target_image": "both.jsonl"}, "both.jsonl.* is not a picture that can be read"),
        (0, {"input_image": "cut.png"}, "cut.png.* is not a picture that can be read"),
        (0, {"task": ["comprehension"]}, r"its task is \['comprehension'\], but the tasks are"),
        (0, {"instruction": "What is <image>?"}, "its instruction has the token <image>"),
        (0, {"response": "See <image> here."}, "its response has the token <image>"),
        (0, {"input_image": {"bytes": "x"}}, "input_image must be a path or a list of paths"),
        (0, {"picture": "ct.png"}, "the fields task, .*, target_codes and no others"),
    ],
)
def test_a_line_that_is_no_sample_is_named(data, m3, number, change, message):
    lines = [json.loads(line) for line in (data / "both.jsonl").read_text().splitlines()]
    lines[number] |= change
    (data / "cut.png").write_bytes((data / "mr.png").read_bytes()[:-200])
    (data / "bad.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=f"Line {number + 1} of .*bad.jsonl is no sample: .*{message}"):
        read_samples(data / "bad.jsonl", m3[1].config)


def test_files_that_are_no_json_lines(data, m3):
    (data / "bad.jsonl").write_text("{]\n")
    with pytest.raises(ValueError, match=r"Line 1 of .* is no sample: Expecting property name"):
        read_samples(data / "bad.jsonl", m3[1].config)
    (data / "bad.jsonl").write_bytes((data / "both.jsonl").read_bytes().splitlines()[0] + b"\n\xff\n")
    with pytest.raises(ValueError, match=r"Line 2 of .* is no sample: 'utf-8' codec can't decode"):
        read_samples(data / "bad.jsonl", m3[1].config)
    (data / "bad.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no samples"):
        read_samples(data / "bad.jsonl", m3[1].config)
