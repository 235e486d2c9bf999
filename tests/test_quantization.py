"""Models in 8 and 4 bits: which linears, what they do, and that saving them changes nothing."""

import pytest
import torch
from conftest import inputs_of, weights_of
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TorchAoConfig, pipeline
from transformers.utils import is_torchao_available

needs_torchao = pytest.mark.skipif(not is_torchao_available(), reason="torchao stands apart: make test-torchao")


def torchao(bits, skipped=None):
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig

    settings = Int8WeightOnlyConfig() if bits == 8 else PrototypeInt4WeightOnlyConfig(group_size=32)
    return TorchAoConfig(settings, modules_to_not_convert=skipped)


def bits_and_bytes(bits, skipped=None, double=False):
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)


SETTINGS = [
    pytest.param(lambda: bits_and_bytes(8), id="8bit"),
    pytest.param(lambda: bits_and_bytes(4), id="nf4"),
    pytest.param(lambda: bits_and_bytes(4, double=True), id="nf4_double"),
    pytest.param(lambda: torchao(8), id="torchao_8bit", marks=needs_torchao),
]


@pytest.fixture(params=SETTINGS)
def quantized(request, checkpoints):
    """A checkpoint whose sizes every kernel takes, its model in fewer bits, its processor, the settings."""
    checkpoint = checkpoints("made_wide")
    return checkpoint, load(checkpoint.folder, request.param()), load_processor(checkpoint.folder)


def load(folder, settings=None):
    options = {"quantization_config": settings} if settings else {}
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16, **options)


def load_processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def case_of(checkpoint, task):
    return next(case for case in checkpoint.cases if case["task"] == task)


def logits_of(model, processor, checkpoint):
    """Logits of one prompt of each task."""
    found = []
    for task in model.config.tasks:
        inputs = inputs_of(processor, case_of(checkpoint, task))
        with torch.no_grad():
            found.append(model(**inputs.to(torch.bfloat16), task=task).logits)
    return found


def is_quantized(module):
    kinds = type(module).__name__, type(getattr(module, "weight", None)).__name__
    return not {"Linear4bit", "Linear8bitLt", "Int8Tensor", "Int4OpaqueTensor"}.isdisjoint(kinds)


def test_only_the_linears_of_the_language_model_change(quantized):
    checkpoint, model, _ = quantized
    names = {name for name, module in model.named_modules() if is_quantized(module)}
    layers = model.model.language_model.layers
    assert names and names == {name for name, _ in model.named_modules() if name.endswith(".base_layer")}
    assert len(names) == len(layers) * len([name for name in names if ".layers.0." in name])
    whole = weights_of(checkpoint.folder)
    for name, parameter in model.named_parameters():
        if not name.endswith(".base_layer.weight"):
            stored = whole.get(name, whole.get(name.replace("vision_tower.", "vision_tower.vision_model.")))
            assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, stored.bfloat16()), name


@pytest.mark.parametrize("quantizer", [bits_and_bytes, pytest.param(torchao, marks=needs_torchao)])
def test_a_users_own_list_is_left_alone_too(quantizer, checkpoints):
    model = load(checkpoints("made_wide").folder, quantizer(8, ["model.language_model.layers.0"]))
    names = [name for name, module in model.named_modules() if is_quantized(module)]
    assert names and all(
        name.startswith("model.language_model.layers.") and ".layers.0." not in name for name in names
    )
    assert all(name.endswith(".base_layer") for name in names)


def as_dictionary(bits, skipped):
    return {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": skipped}


@pytest.mark.parametrize("quantizer", [bits_and_bytes, as_dictionary, pytest.param(torchao, marks=needs_torchao)])
@pytest.mark.parametrize("skipped", [["qkv_proj"], ["down_proj", "self_attn.o_proj"], ["layers.1.mlp.gate_up_proj"]])
def test_a_users_list_names_linears_as_the_base_does(quantizer, skipped, checkpoints):
    model = load(checkpoints("made_wide").folder, quantizer(8, skipped))
    wrapped = {name.removesuffix(".base_layer") for name, _ in model.named_modules() if name.endswith(".base_layer")}
    whole = {
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if name.endswith(".base_layer") and not is_quantized(module)
    }
    assert whole == {name for name in wrapped if name.endswith(tuple(skipped))}
    assert whole and whole != wrapped


@needs_torchao
def test_4_bits_of_torchao_are_near_the_whole(checkpoints):
    checkpoint = checkpoints("made_wide")
    whole, model, processor = (
        load(checkpoint.folder),
        load(checkpoint.folder, torchao(4)),
        load_processor(checkpoint.folder),
    )
    names = {name for name, module in model.named_modules() if is_quantized(module)}
    assert names and names == {name for name, _ in model.named_modules() if name.endswith(".base_layer")}
    for logits, expected in zip(*(logits_of(m, processor, checkpoint) for m in (model, whole)), strict=True):
        assert 0 < (logits - expected).float().norm() < 0.2 * expected.float().norm()


def test_both_tasks_alone_together_and_in_pipelines(quantized, tmp_path):
    _, model, processor = quantized
    picture = Image.radial_gradient("L")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    tasks = ["comprehension", "generation"]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]] * 2,
        task=tasks,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    inputs = inputs.to(torch.bfloat16)
    with torch.no_grad():
        together = model(**inputs, task=tasks).logits[:, -1].float()
        for row, task in enumerate(tasks):
            one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            alone = model(**one, task=task).logits[0, -1].float()
            assert (together[row] - alone).norm() < 0.05 * alone.norm()
    sequences = model.generate(**inputs, task=tasks, max_new_tokens=5)
    drawn = model.decode_image_tokens(sequences[1:])
    assert drawn.shape[1:] == (3, 24, 24)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    draw = pipeline("any-to-any", model=str(tmp_path / "saved"), trust_remote_code=True)
    piped = draw(text=[{"role": "user", "content": content}], generation_mode="image")[0]["generated_image"]
    assert piped.size == (24, 24)
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    answer = ask(text=[{"role": "user", "content": content}], return_full_text=False, max_new_tokens=3)
    assert isinstance(answer[0]["generated_text"], str)


def test_saved_before_and_after_a_forward_pass(quantized, tmp_path):
    checkpoint, model, processor = quantized
    model.save_pretrained(tmp_path / "before")
    logits = logits_of(model, processor, checkpoint)
    model.save_pretrained(tmp_path / "after")
    before, after = weights_of(tmp_path / "before"), weights_of(tmp_path / "after")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for again in (model, load(tmp_path / "after")):
        assert all(map(torch.equal, logits_of(again, processor, checkpoint), logits))


def test_a_plugin_added_afterwards_is_saved_with_the_rest(quantized, tmp_path):
    checkpoint, model, processor = quantized
    logits_of(model, processor, checkpoint)
    model.add_task("ct_to_mri", {"kind": "image", "rank": 8, "alpha": 16.0, "num_experts": 4, "vision_layer": 1})
    model.add_task("copy", dict(vars(model.config.tasks["generation"])), init_from="generation")
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    saved = weights_of(tmp_path / "saved")
    assert any(".plugins.ct_to_mri." in name for name in saved)
    inputs = inputs_of(processor, case_of(checkpoint, "generation")).to(torch.bfloat16)
    with torch.no_grad():
        expected = model(**inputs, task="generation").logits
        assert torch.equal(model(**inputs, task="copy").logits, expected)
        assert torch.equal(again(**inputs, task="copy").logits, expected)
        assert torch.equal(again(**inputs, task="ct_to_mri").logits, model(**inputs, task="ct_to_mri").logits)
