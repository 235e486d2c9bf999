"""Parts that run once per image: in float32 on processors that have no instructions for the dtype of their weights."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import inputs_of

from healthgpt import HealthGPTForConditionalGeneration, HealthGPTProcessor, precision_healthgpt
from healthgpt.precision_healthgpt import call_linear, is_widened

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


def test_checkpointed_blocks_of_the_tower_train(checkpoints, monkeypatch):
    monkeypatch.setattr(precision_healthgpt, "CPU_DTYPES", NOTHING_BUT_FLOAT32)
    checkpoint = checkpoints("m3")
    inputs = inputs_of(HealthGPTProcessor.from_pretrained(checkpoint.folder), checkpoint.cases[0])
    gradients = []
    for is_checkpointed in (False, True):
        model = HealthGPTForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=torch.bfloat16).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model(**inputs, task="comprehension").logits.float().logsumexp(-1).sum().backward()
        assert model.is_gradient_checkpointing == is_checkpointed
        assert (
            any(
                part.gradient_checkpointing
                for part in model.model.vision_tower.modules()
                if hasattr(part, "gradient_checkpointing")
            )
            == is_checkpointed
        )
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("vision_tower" in name for name in gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_features", [5, 600])
def test_linears_over_many_tokens_are_rounded_once(dtype, out_features, monkeypatch):
    monkeypatch.setattr(precision_healthgpt, "CPU_DTYPES", NOTHING_BUT_FLOAT32)
    monkeypatch.setattr(precision_healthgpt, "BLOCK", 300 * 250)  # three blocks of 600 outputs, the last a smaller one
    torch.manual_seed(0)
    module = torch.nn.Linear(300, out_features).to(dtype)
    with torch.no_grad():
        for shape in ((16, 300), (3, 40, 300), (2, 2, 5, 300)):
            inputs = torch.randn(shape).to(dtype)
            product = call_linear(module, inputs)
            exact = inputs.double() @ module.weight.double().t() + module.bias.double()
            assert product.dtype == dtype and product.shape == exact.shape
            half_a_unit = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5
            assert ((product.double() - exact).abs() <= half_a_unit).all()
            few = inputs.reshape(-1, 300)[:15]
            assert torch.equal(call_linear(module, few), module(few))


def test_a_linear_that_something_hangs_on_is_called(monkeypatch):
    monkeypatch.setattr(precision_healthgpt, "CPU_DTYPES", NOTHING_BUT_FLOAT32)
    module, inputs, calls = torch.nn.Linear(8, 8).bfloat16(), torch.randn(32, 8).bfloat16(), []
    handle = module.register_forward_hook(lambda *call: calls.append(call))
    call_linear(module, inputs)
    handle.remove()
    assert len(calls) == 1
    call_linear(module, inputs).sum().backward()  # wanted gradients are torch's own
    assert module.weight.grad.shape == (8, 8)


def test_weights_of_a_class_of_their_own_multiply_as_they_do(monkeypatch):
    class Quantized(torch.Tensor):
        pass

    monkeypatch.setattr(precision_healthgpt, "CPU_DTYPES", NOTHING_BUT_FLOAT32)
    inputs, weight = torch.randn(32, 8).bfloat16(), torch.randn(8, 8).bfloat16()
    assert is_widened(inputs, weight) and is_widened(inputs, torch.nn.Parameter(weight, requires_grad=False))
    assert not is_widened(inputs, weight.as_subclass(Quantized))


def test_a_prompt_in_bfloat16_is_as_near_to_float32(checkpoints, monkeypatch):
    checkpoint = checkpoints("m3")
    model = HealthGPTForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=torch.bfloat16)
    wide = HealthGPTForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=torch.bfloat16).float()
    ids = torch.arange(1, 61).reshape(2, 30)
    products = []
    monkeypatch.setattr(precision_healthgpt.functional, "linear", spy(products, precision_healthgpt.functional.linear))
    with torch.no_grad():
        expected = wide(input_ids=ids, task=["comprehension", "generation"]).logits
        errors, widened = [], []
        for dtypes in (NOTHING_BUT_FLOAT32 | {torch.bfloat16}, NOTHING_BUT_FLOAT32):
            monkeypatch.setattr(precision_healthgpt, "CPU_DTYPES", dtypes)
            products.clear()
            logits = model(input_ids=ids, task=["comprehension", "generation"]).logits
            assert logits.dtype == torch.bfloat16
            seen = torch.isfinite(expected) & torch.isfinite(logits)
            errors.append((logits.float() - expected)[seen].pow(2).mean())
            widened.append(torch.float32 in products)
    assert widened == [False, True] and errors[1] < 1.2 * errors[0]


def spy(products, function):
    """The function, which notes the dtype of what it multiplies."""

    def multiply(inputs, *rest):
        products.append(inputs.dtype)
        return function(inputs, *rest)

    return multiply
