"""Parts that run once per image: in float32 on processors that have no instructions for the dtype of their weights."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import inputs_of

from healthgpt import HealthGPTForConditionalGeneration, HealthGPTProcessor, precision_healthgpt

NOTHING_BUT_FLOAT32 = frozenset({torch.float32})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_are_those_of_float32_and_weights_stay(dtype, checkpoints, monkeypatch, tmp_path):
    checkpoint = checkpoints("m3")
    model = HealthGPTForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=dtype)
    whole = HealthGPTForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=dtype).float()
    inputs = inputs_of(HealthGPTProcessor.from_pretrained(checkpoint.folder), checkpoint.cases[0])
    pixels, codes = inputs["pixel_values"], torch.arange(64).reshape(1, 64) + model.config.image_code_offset
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    monkeypatch.setattr(precision_healthgpt, "CPU_DTYPES", NOTHING_BUT_FLOAT32)
    drawn = model.decode_image_tokens(codes)
    assert torch.equal(drawn, whole.decode_image_tokens(codes))
    assert torch.equal(model.encode_image(drawn.to(dtype).float()), whole.encode_image(drawn.to(dtype).float()))
    with torch.no_grad():
        for task in model.config.tasks:
            features, expected = (part.get_image_features(pixels, task) for part in (model, whole))
            assert features.last_hidden_state.dtype == features.pooler_output.dtype == dtype
            assert torch.equal(features.last_hidden_state, expected.last_hidden_state.to(dtype))
            assert torch.equal(features.pooler_output, expected.pooler_output.to(dtype))
    after = model.state_dict()
    assert all(after[name].dtype == dtype and torch.equal(after[name], stored[name]) for name in stored)


def test_where_there_are_instructions_weights_are_not_widened(checkpoints, monkeypatch):
    model = HealthGPTForConditionalGeneration.from_pretrained(checkpoints("m3").folder, dtype=torch.bfloat16)
    seen = []
    model.model.vqgan.decoder.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for dtypes in (NOTHING_BUT_FLOAT32, NOTHING_BUT_FLOAT32 | {torch.bfloat16}):
        monkeypatch.setattr(precision_healthgpt, "CPU_DTYPES", dtypes)
        model.decode_image_tokens(torch.arange(64) + model.config.image_code_offset)
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variable limits oneDNN's instructions on x86-64 alone")
def test_a_processor_with_avx2_alone_has_no_instructions_for_half_precision():
    """Any x86-64 processor becomes one by oneDNN's own variable."""
    script = "from healthgpt.precision_healthgpt import CPU_DTYPES; print(sorted(map(str, CPU_DTYPES)))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout == "['torch.float32', 'torch.float64']\n", result.stderr
