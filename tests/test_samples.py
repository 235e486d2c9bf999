"""Samples in JSON lines: what is read, and what is refused by its line."""

import json

import pytest

from healthgpt.samples import pictures_of, read_samples


def test_what_is_read(data, m3, monkeypatch):
    """Also with the mark that some editors put before UTF-8, and with words that only look like tokens."""
    _, model, processor = m3
    monkeypatch.setattr("healthgpt.samples.PART", 2)
    told = []
    lines = [json.loads(line) for line in (data / "both.jsonl").read_text().splitlines()]
    del lines[0]["task"]
    lines[0] |= {"group": "CT", "instruction": "Is <b>5 < 6 in [image]</b>, <idx>?", "response": "Schädel ÷ 2"}
    codes = [code % model.config.vqgan_config.num_codes for code in range(model.config.num_image_codes)]
    lines.append({"task": "generation", "instruction": "Draw.", "target_codes": codes})
    (data / "more.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8-sig")
    samples = read_samples(data / "more.jsonl", model.config, processor, "comprehension", told.append)
    assert len(samples) == len(lines) and sum(told) == (data / "more.jsonl").stat().st_size
    first, second, *_, last = samples
    assert first == {
        "task": "comprehension",
        "instruction": lines[0]["instruction"],
        "response": "Schädel ÷ 2",
        "input_image": [str(data / "ct.png")],
        "target_image": None,
        "target_codes": None,
        "group": "CT",
    }
    assert second["input_image"] == [str(data / "ct.png"), str(data / "mr.png")]
    assert pictures_of(samples) == {str(data / f"{name}.png") for name in ("ct", "mr", "retina")}
    assert last["target_codes"] == codes and last["response"] is None and last["group"] is None


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
        (0, {"response": "Yes.<|end|>"}, r"its response has <\|end\|>, a token that only the processor writes"),
        (2, {"instruction": "Draw <idx_5>."}, "its instruction has <idx_5>, a token that only the processor writes"),
        (0, {"response": "\ud800"}, "'utf-8' codec can't encode character '.ud800' in position"),
        (2, {"target_image": None, "target_codes": [True] * 64}, r"must be a list of \d+ whole numbers"),
        (2, {"target_image": None, "target_codes": [1.0] * 64}, r"must be a list of \d+ whole numbers"),
        (
            0,
            {"group": ""},
            "group must be a name without .*, and none of all, closed, open, choice, open recall, got ''",
        ),
        (0, {"group": " all "}, "group must be a name .* none of all, .*, got ' all '"),
        (0, {"group": 3}, "group must be a name .*, got 3"),
        (0, {"group": "CT | head"}, r"group must be a name without \| and line breaks, .*, got 'CT \| head'"),
        (0, {"input_image": {"bytes": "x"}}, "input_image must be a path or a list of paths"),
        (0, {"picture": "ct.png"}, "it has the field 'picture'; samples have fields of task, .*, group alone"),
        (0, {"input_image": ""}, "input_image must be a path or a list of paths"),
        (
            0,
            {"task": None},
            "it names no task, and none is named for such lines; the tasks are comprehension, generation",
        ),
    ],
)
def test_a_line_that_is_no_sample_is_named(data, m3, number, change, message):
    lines = [json.loads(line) for line in (data / "both.jsonl").read_text().splitlines()]
    lines[number] |= change
    (data / "cut.png").write_bytes((data / "mr.png").read_bytes()[:-200])
    (data / "bad.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=f"Line {number + 1} of .*bad.jsonl is no sample: .*{message}"):
        read_samples(data / "bad.jsonl", m3[1].config, m3[2])


def test_files_that_are_no_json_lines(data, m3):
    (data / "bad.jsonl").write_text("{]\n")
    with pytest.raises(
        ValueError,
        match=r"Line 1 of .* is no sample: it must be one JSON object, in UTF-8 and on a line of its own \(Expecting",
    ):
        read_samples(data / "bad.jsonl", m3[1].config, m3[2])
    (data / "bad.jsonl").write_bytes((data / "both.jsonl").read_bytes().splitlines()[0] + b"\n\xff\n")
    with pytest.raises(ValueError, match=r"Line 2 of .* is no sample: it must be .* \('utf-8' codec can't decode"):
        read_samples(data / "bad.jsonl", m3[1].config, m3[2])
    (data / "bad.jsonl").write_text((data / "both.jsonl").read_text().splitlines()[0] + "\n\n")
    with pytest.raises(ValueError, match=r"Line 2 of .* is no sample: it is empty"):
        read_samples(data / "bad.jsonl", m3[1].config, m3[2])
    (data / "bad.jsonl").write_text((data / "both.jsonl").read_text(), encoding="utf-16")
    with pytest.raises(ValueError, match=r"Line 1 of .* is no sample: it must be .* \('utf-8' codec can't decode"):
        read_samples(data / "bad.jsonl", m3[1].config, m3[2])
    (data / "bad.jsonl").write_text("[]")
    with pytest.raises(ValueError, match=r"Line 1 of .* is no sample: it must be a JSON object, but is list"):
        read_samples(data / "bad.jsonl", m3[1].config, m3[2])
    (data / "bad.jsonl").write_text("[" * 100_000)
    with pytest.raises(
        ValueError, match=r"Line 1 of .* is no sample: it must be .* \(maximum recursion depth exceeded"
    ):
        read_samples(data / "bad.jsonl", m3[1].config, m3[2])
    (data / "bad.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no samples"):
        read_samples(data / "bad.jsonl", m3[1].config, m3[2])
