"""Linears that OpenVINO multiplies, beside the same arithmetic written out in torch."""

import copy
import logging

import pytest
import torch
from conftest import inputs_of
from transformers import BitsAndBytesConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from healthgpt import HealthGPTForConditionalGeneration, HealthGPTProcessor, openvino_linears
from healthgpt.app.common import NANO
from healthgpt.conversations import conversation, prepare
from healthgpt.errors_healthgpt import HealthGPTError
from healthgpt.modeling_healthgpt import HLoRALinear
from healthgpt.openvino_linears import OpenVINOLinear, use_openvino
from healthgpt.phantoms import drawing_sample

EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture(autouse=True)
def passive(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


class Quantized(torch.Tensor):
    pass


def load(folder, **settings):
    return HealthGPTForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **settings)


def rounded(model):
    """The model in float32, with the weights of its linears rounded to 255 levels an output."""
    for layer in model.modules():
        if isinstance(layer, HLoRALinear):
            weight = layer.base_layer.weight.data
            step = weight.abs().max(dim=1, keepdim=True).values / 127
            layer.base_layer.weight.data = (weight / step).round() * step
    return model


@pytest.mark.parametrize("shape", [(7,), (1, 7), (40, 7), (2, 3, 7)])
@pytest.mark.parametrize("bias", [None, torch.arange(5.0)])
def test_products_are_those_of_torch(shape, bias):
    torch.manual_seed(0)
    whole, scales = torch.randint(-127, 128, (5, 7), dtype=torch.int8), torch.rand(5)
    inputs = torch.randn(shape)
    expected = torch.nn.functional.linear(inputs, whole * scales[:, None], bias)
    torch.testing.assert_close(OpenVINOLinear(whole, scales, bias)(inputs), expected)
    weight = torch.randn(5, 7)
    torch.testing.assert_close(
        OpenVINOLinear(weight, bias=bias)(inputs), torch.nn.functional.linear(inputs, weight, bias)
    )


@pytest.mark.parametrize("name", ["m3", "l14", "xl32"])
def test_logits_are_those_of_rounded_weights(checkpoints, name):
    checkpoint = checkpoints(name)
    expected, model = rounded(load(checkpoint.folder)), use_openvino(load(checkpoint.folder))
    processor = HealthGPTProcessor.from_pretrained(checkpoint.folder)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32} == {model.dtype}
    for case in checkpoint.cases[:4]:
        inputs = inputs_of(processor, case)
        with torch.no_grad():
            torch.testing.assert_close(
                model(**inputs, task=case["task"]).logits, expected(**inputs, task=case["task"]).logits
            )


def test_answers_and_drawings_of_the_small_model():
    expected, model = rounded(load(NANO)), use_openvino(load(NANO))
    processor = HealthGPTProcessor.from_pretrained(NANO)
    samples = [drawing_sample("test", index, "reconstruction") for index in range(2)]
    messages = [conversation([sample["input_image"]], sample["instruction"]) for sample in samples]
    tasks = ["generation", "comprehension"]
    inputs = prepare(processor, messages, tasks)
    sequences = model.generate(**inputs, task=tasks, max_new_tokens=70)
    assert torch.equal(sequences, model.generate(**inputs, task=tasks, max_new_tokens=70, codes_per_pass=1))
    assert torch.equal(sequences, expected.generate(**inputs, task=tasks, max_new_tokens=70))


def test_the_small_model_is_nearer_to_float32_than_in_8_bits_of_bitsandbytes():
    whole, given = load(NANO), load(NANO, quantization_config=EIGHT_BITS)
    models = {"bitsandbytes": given, "OpenVINO": use_openvino(load(NANO))}
    processor, divergences = HealthGPTProcessor.from_pretrained(NANO), {name: [] for name in models}
    for kind in ("ct_to_mri", "reconstruction"):
        sample = drawing_sample("test", 0, kind)
        inputs = prepare(processor, conversation([sample["input_image"]], sample["instruction"]), "generation")
        length = inputs["input_ids"].shape[1]
        sequences = whole.generate(**inputs, task="generation")
        inputs |= {"input_ids": sequences, "attention_mask": torch.ones_like(sequences)}
        with torch.no_grad():
            target = whole(**inputs, task="generation").logits[:, length - 1 : -1].double().log_softmax(-1)
            for name, model in models.items():
                found = model(**inputs, task="generation").logits[:, length - 1 : -1].double().log_softmax(-1)
                each = torch.where(target.isfinite(), target.exp() * (target - found), 0)
                divergences[name].append(each.sum(-1).mean())
    assert sum(divergences["OpenVINO"]) < sum(divergences["bitsandbytes"]) / 2


def test_other_dtypes_of_activations_and_no_tokens():
    model, ids = use_openvino(load(NANO)), torch.arange(1, 9)[None]
    expected = model(input_ids=ids).logits
    model.to(torch.bfloat16)
    logits = model(input_ids=ids).logits
    assert logits.dtype == torch.bfloat16 and (logits - expected).abs().max() < 0.2 * expected.abs().max()
    assert model(input_ids=ids, logits_to_keep=torch.tensor([], dtype=torch.long)).logits.shape[1] == 0


def test_models_with_their_own_copy_of_the_code_are_taken_over():
    own = get_class_from_dynamic_module("modeling_healthgpt.HealthGPTForConditionalGeneration", NANO)
    assert own is not HealthGPTForConditionalGeneration
    model, other = use_openvino(own.from_pretrained(NANO)), use_openvino(load(NANO))
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
    assert (
        sum(isinstance(module, OpenVINOLinear) for module in model.modules())
        == 4 * model.config.text_config.num_hidden_layers + 2
    )


@pytest.mark.parametrize("used", [False, True])
def test_8_bits_of_bitsandbytes_are_taken_over(used):
    given = load(NANO, quantization_config=EIGHT_BITS)
    layer = next(layer for layer in given.modules() if isinstance(layer, HLoRALinear)).base_layer
    matrix = layer.weight.data * (layer.weight.SCB.float() / 127)[:, None]
    inputs = torch.randn(3, layer.in_features)
    if used:
        with torch.no_grad():
            given(input_ids=torch.arange(1, 9)[None])
    model = use_openvino(given)
    layer = next(layer for layer in model.modules() if isinstance(layer, HLoRALinear)).base_layer
    torch.testing.assert_close(layer(inputs), inputs @ matrix.T)


def test_what_openvino_has_is_neither_trained_nor_saved_nor_moved(tmp_path):
    model = use_openvino(load(NANO))
    assert not model(input_ids=torch.arange(1, 9)[None]).logits.requires_grad
    with pytest.raises(HealthGPTError, match="no gradients"):
        model(inputs_embeds=torch.randn(1, 3, model.config.text_config.hidden_size, requires_grad=True))
    for save in (lambda: model.save_pretrained(tmp_path / "saved"), model.state_dict):
        with pytest.raises(HealthGPTError, match="cannot be saved"):
            save()
    assert not list(tmp_path.iterdir())
    with pytest.raises(HealthGPTError, match="already"):
        use_openvino(model)
    with pytest.raises(HealthGPTError, match="is on meta"):
        model.lm_head(torch.empty(1, model.lm_head.in_features, device="meta"))


def test_what_openvino_cannot_take_stays_as_it_is():
    model = load(NANO, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    before = [type(module) for module in model.modules()]
    with pytest.raises(HealthGPTError, match="Linear4bit"):
        use_openvino(model)
    assert [type(module) for module in model.modules()] == before
    model = load(NANO)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data.as_subclass(Quantized))
    with pytest.raises(HealthGPTError, match="Linear with Quantized"):
        use_openvino(model)
    model = load(NANO)
    model.lm_head = copy.deepcopy(model.lm_head).to("meta")
    with pytest.raises(HealthGPTError, match="without device_map"):
        use_openvino(model)
    with pytest.raises(HealthGPTError, match="got a HealthGPTModel"):
        use_openvino(model.model)
    assert not any(isinstance(module, OpenVINOLinear) for module in model.modules())


@pytest.mark.parametrize("policy", ["passive", "PASSIVE", "active", None])
def test_threads_that_spin_are_warned_of(policy, monkeypatch, caplog):
    if policy is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(openvino_linears.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        use_openvino(load(NANO))
    assert ("OMP_WAIT_POLICY" in caplog.text) == (policy in ("active", None))
