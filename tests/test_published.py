"""The restatement of the published computation gives the golden numbers; only then may it speak for other checkpoints."""

import json

import pytest
import torch
from conftest import GOLDEN, pictures_of
from published import IMAGE, Published, build_prompt, prompt_ids, to_uint8
from safetensors.torch import load_file


@pytest.mark.parametrize("name", ["m3", "l14", "xl32"])
def test_restatement_gives_the_golden_numbers(name):
    content = json.loads((GOLDEN / name / "cases.json").read_text())
    expected = load_file(GOLDEN / name / "expected.safetensors")
    published = Published(GOLDEN / name, content["template"])
    if content["plugins"]["comprehension"]["n_new_tokens"]:
        published.add_image_tokens(content["vqgan"]["n"])
    for case in content["cases"]:
        task, pictures = case["task"], pictures_of(case)
        prompt = build_prompt(content["template"], case["question"], len(pictures), task == "generation")
        assert prompt == case["prompt"]
        ids = prompt_ids(published.tokenizer, prompt)
        assert ids == case["input_ids"] and ids.count(IMAGE) == len(pictures)
        logits = published.logits(ids, pictures, task)
        torch.testing.assert_close(logits, expected[case["name"] + "/logits"], atol=1e-4, rtol=0)
        if "loss" in case:
            assert abs(published.loss(ids, pictures, case["generated_ids"], task).item() - case["loss"]) < 1e-4
        if "decoded_png" in case:
            pixels = published.vqgan.decode(torch.tensor(case["indices_from_text"]))
            torch.testing.assert_close(pixels, expected[case["name"] + "/decoded"], atol=1e-4, rtol=0)
            assert to_uint8(pixels).shape[-1] == 3
    if name == "m3":
        logits = published.vqgan.code_logits(expected["vqgan/input"])
        torch.testing.assert_close(logits, expected["vqgan/code_logits"], atol=1e-4, rtol=0)
