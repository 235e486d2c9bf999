"""PEFT's adapters on top of a checkpoint: around the base's linears, merged and taken off again."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from healthgpt import HealthGPTForConditionalGeneration

IDS = torch.tensor([[1, 5, 9]])


def logits_of(model):
    with torch.no_grad():
        return [model(input_ids=IDS, task=task).logits for task in ("comprehension", "generation")]


@pytest.mark.parametrize(
    "target", [["qkv_proj.base_layer", "o_proj.base_layer"], r".*\.layers\.1\..*\.base_layer", "all-linear"]
)
def test_adapters_are_those_of_the_base_and_come_off_again(target, load):
    model, _ = load("m3")
    before, parameters = logits_of(model), dict(model.named_parameters())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=target))
    adapters = {name for name, module in adapted.named_modules() if hasattr(module, "lora_embedding_A")}
    assert adapters and not any(".plugins." in name for name in adapters)
    assert all(".default." in name for name, tensor in adapted.named_parameters() if tensor.requires_grad)
    for name, tensor in adapted.named_parameters():
        if ".lora_B.default." in name:
            torch.nn.init.normal_(tensor)
    changed = logits_of(adapted)
    assert all(not torch.allclose(*pair) for pair in zip(changed, before, strict=True))

    merged = adapted.merge_and_unload()
    assert isinstance(merged, HealthGPTForConditionalGeneration)
    assert dict(merged.named_parameters()).keys() == parameters.keys()
    for pair in zip(logits_of(merged), changed, strict=True):
        torch.testing.assert_close(*pair, atol=1e-3, rtol=1e-4)


def test_targets_are_named_as_the_documentation_says(load):
    """The base's linears by pattern, or all linears without the others; the name of a linear with its plugins is none."""
    for options in (
        dict(target_modules=r".*\.base_layer"),
        dict(target_modules="all-linear", exclude_modules=r".*(vision_tower|projectors|token_heads).*"),
    ):
        model, _ = load("m3")
        linears = {name for name, _ in model.named_modules() if name.endswith(".base_layer")}
        peft_model = get_peft_model(model, LoraConfig(r=2, **options))
        names = {name for name, module in peft_model.named_modules() if hasattr(module, "lora_embedding_A")}
        assert {name.removeprefix("base_model.model.") for name in names} == linears
    with pytest.raises(ValueError, match="HLoRALinear"):
        get_peft_model(load("m3")[0], LoraConfig(r=2, target_modules=["qkv_proj"]))


def test_unloading_leaves_the_model_as_it_was(load, tmp_path):
    model, _ = load("m3")
    before = logits_of(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert not torch.allclose(logits_of(adapted)[0], before[0])
    unloaded = adapted.unload()
    assert all(torch.equal(*pair) for pair in zip(logits_of(unloaded), before, strict=True))
    unloaded.save_pretrained(tmp_path)
    again = HealthGPTForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(*pair) for pair in zip(logits_of(again), before, strict=True))


def test_a_saved_adapter_loads_and_leaves_plugins_as_they_were(load, tmp_path):
    config = LoraConfig(r=2, target_modules=r".*\.base_layer", init_lora_weights=False)
    adapted = get_peft_model(load("m3")[0], config)
    expected = logits_of(adapted.eval())
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load("m3")[0], tmp_path)
    assert all(torch.equal(*pair) for pair in zip(logits_of(again), expected, strict=True))
    model, _ = load("m3")
    plugins = {name: value.clone() for name, value in model.named_parameters() if ".plugins." in name}
    model.load_adapter(str(tmp_path))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in plugins.items())
    for pair in zip(logits_of(model), expected, strict=True):
        torch.testing.assert_close(*pair, atol=1e-3, rtol=1e-4)
