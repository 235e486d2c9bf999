"""The benchmark of the export, on tiny files that lie where it would make those of full size."""

import json
import sys

import pytest
from conftest import GOLDEN
from safetensors import safe_open

from healthgpt.benchmarks import full_size

FILES = {"base": "base", "vision": "vit", "com.bin": "com_hlora_weights.bin", "gen.bin": "gen_hlora_weights.bin"}
FILES |= {"fusion.bin": "fusion_layer_weights.bin", "last.ckpt": "vqgan/last.ckpt", "model.yaml": "vqgan/model.yaml"}


@pytest.mark.parametrize("quantize", [[], ["--quantize", "8bit"]], ids=["whole", "8bit"])
def test_it_exports_answers_and_draws(quantize, tmp_path, monkeypatch, capsys):
    source = tmp_path / "m3-safetensors"
    source.mkdir()
    for name, published in FILES.items():
        (source / name).symlink_to(GOLDEN / "m3" / published)
    with safe_open(GOLDEN / "m3/base/model.safetensors", framework="pt") as file:
        shapes = {name: ["F32", file.get_slice(name).get_shape()] for name in file.keys()}
    (tmp_path / "checkpoint_manifests.json").write_text(json.dumps({"files": {"m3_base": shapes}}))
    arguments = ["full_size", "m3", "--folder", tmp_path, "--shared", tmp_path, "--run", *quantize]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    monkeypatch.setattr(full_size, "in_own_process", lambda function, *arguments: function(*arguments))
    full_size.main()
    result = json.loads(capsys.readouterr().out)
    assert result["picture"] == [1, 3, 32, 32] and (tmp_path / "HealthGPT-m3/config.json").is_file()
    measured = {"cp_seconds", "peak_gigabytes", "bytes_beside_base"}
    measured |= {"Quantising_seconds"} if quantize else {"Writing_seconds", "speed_beside_cp"}
    measured |= {"load_seconds", "comprehension_tokens_per_second", "generation_first_token_seconds"}
    assert measured < result.keys()
