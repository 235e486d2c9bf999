"""Checkpoints that are quantised when they are exported."""

import json

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from conftest import GOLDEN, sources_of, weights_of
from transformers import AutoModelForImageTextToText

from healthgpt.hub_export import CheckpointError, export
from healthgpt.hub_export.plan import build_plan
from healthgpt.hub_export.quantize import quantization_config, verify_quantized_shard
from healthgpt.hub_export.write import split_into_shards


def test_8_bit_quantises_the_language_models_linears_and_nothing_else(tmp_path, checkpoints):
    export(sources_of(GOLDEN / "m3"), tmp_path / "tiny", quantize="8bit")
    assert not (tmp_path / "tiny/merged").exists()
    whole, quantized = weights_of(checkpoints("m3").folder), weights_of(tmp_path / "tiny")
    for name, tensor in whole.items():
        if name.endswith(".base_layer.weight"):
            assert quantized[name].dtype == torch.int8
        else:
            assert torch.equal(quantized[name], tensor), name
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny", trust_remote_code=True)
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("base_layer")}
    assert kinds == {"Linear8bitLt"}
    picture = model.generate(torch.tensor([[1, 2, 3]]), task="generation")
    assert model.decode_image_tokens(picture).shape == (1, 3, 32, 32)


def test_4_bit_quantises_the_same_linears(tmp_path, checkpoints):
    export(sources_of(checkpoints("made_wide").source), tmp_path / "tiny", quantize="4bit")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny", trust_remote_code=True)
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("base_layer")}
    assert kinds == {"Linear4bit"}
    assert model.config.quantization_config.bnb_4bit_quant_type == "nf4"
    assert model.config.quantization_config.bnb_4bit_use_double_quant
    picture = model.generate(torch.tensor([[1, 2, 3]]), task="generation")
    assert model.decode_image_tokens(picture).shape == (1, 3, 24, 24)


@pytest.mark.skipif(
    not has_avx512bf16(),
    reason="without AVX512-BF16 bitsandbytes multiplies 4-bit linears of any size: there is nothing to refuse",
)
def test_4_bit_where_the_processor_cannot(tmp_path):
    message = r"finished checkpoint cannot be used: .* the 4-bit kernel of this processor takes multiples of 64"
    with pytest.raises(CheckpointError, match=message):
        export(sources_of(GOLDEN / "m3"), tmp_path / "golden", quantize="4bit")
    assert not (tmp_path / "golden").exists()


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_what_is_written_is_what_transformers_quantises_to(tmp_path, checkpoints, quantize):
    made = checkpoints("made_wide")
    settings = quantization_config(quantize, torch.bfloat16)
    model = AutoModelForImageTextToText.from_pretrained(
        made.folder, trust_remote_code=True, quantization_config=settings, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "expected")
    told = []
    sources = sources_of(made.source)
    export(
        sources,
        tmp_path / "tiny",
        "bfloat16",
        quantize,
        progress=lambda stage, total: told.append(stage) or told.append,
    )
    assert [stage for stage in told if isinstance(stage, str)] == ["Checking", "Quantising", "Verifying", "Trying"]
    expected, written = weights_of(tmp_path / "expected"), weights_of(tmp_path / "tiny")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    index = json.loads((tmp_path / "tiny/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())

    [shard, transfers] = next(iter(split_into_shards(build_plan(sources, "bfloat16"), 10**9).items()))
    path = tmp_path / "tiny" / shard
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"differs from what .* gives"):
        verify_quantized_shard(build_plan(sources, "bfloat16"), transfers, path, lambda nbytes: None, quantize)


def test_what_cannot_be_quantised_is_said(tmp_path):
    sources = sources_of(GOLDEN / "m3")
    with pytest.raises(CheckpointError, match="no quantisation '2bit'; choose one of 4bit, 8bit"):
        export(sources, tmp_path / "tiny", quantize="2bit")
    assert not list(tmp_path.iterdir())
