"""Two processes, each with half of every linear and plugin, give the logits, answers and pictures of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, inputs_of
from safetensors.torch import load_file

PROGRAM = """
import json, sys, torch
from conftest import inputs_of
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.distributed import DistributedConfig

folder, cases, output = sys.argv[1:]
parallel = DistributedConfig(tp_size=2, tp_plan="auto")
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, distributed_config=parallel)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
results = {}
for case in json.loads(open(cases).read())["cases"]:
    inputs = inputs_of(processor, case)
    with torch.no_grad():
        results[f"{case['name']} logits"] = model(**inputs, task=case["task"]).logits.contiguous()
    ids = model.generate(**inputs, task=case["task"], max_new_tokens=case["max_new_tokens"])
    results[f"{case['name']} ids"] = ids[0, inputs["input_ids"].shape[1] :].contiguous()
    if model.config.tasks[case["task"]].kind == "image":
        results[f"{case['name']} pixels"] = model.decode_image_tokens(ids)
for name, parameter in model.named_parameters():
    if ".layers.0." in name and hasattr(parameter, "to_local"):
        results[f"{name} share"] = torch.tensor(parameter.to_local().numel() / parameter.numel())
if torch.distributed.get_rank() == 0:
    save_file(results, output)
"""


@pytest.mark.parametrize("name", ["m3", "xl32"])
def test_two_processes_give_what_one_gives(checkpoints, load, tmp_path, name):
    checkpoint = checkpoints(name)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [tmp_path / "program.py", checkpoint.folder, GOLDEN / name / "cases.json", tmp_path / "results"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    results = load_file(tmp_path / "results")
    model, processor = load(name)
    for case in json.loads((GOLDEN / name / "cases.json").read_text())["cases"]:
        assert results[f"{case['name']} ids"].tolist() == case["generated_ids"]
        inputs = inputs_of(processor, case)
        with torch.no_grad():
            logits = model(**inputs, task=case["task"]).logits
        assert (results[f"{case['name']} logits"] - logits).abs().max() < 5e-5
        if model.config.tasks[case["task"]].kind == "image":
            codes = torch.tensor([case["generated_ids"]])
            torch.testing.assert_close(results[f"{case['name']} pixels"], model.decode_image_tokens(codes))
    shared = {key.split(".layers.0.")[1].removesuffix(" share") for key in results if key.endswith(" share")}
    for task in model.config.tasks:
        assert f"mlp.down_proj.plugins.{task}.lora_A.weight" in shared
        assert f"self_attn.o_proj.plugins.{task}.lora_route.weight" in shared
        first = (
            "self_attn.qkv_proj"
            if hasattr(model.model.language_model.layers[0].self_attn, "qkv_proj")
            else "self_attn.q_proj"
        )
        assert f"{first}.plugins.{task}.lora_B.weight" in shared and f"{first}.base_layer.weight" in shared
    # Half of every dimension that two divides, else the larger half is held by the first process.
    assert all(0.5 <= value.item() < 0.7 for key, value in results.items() if key.endswith(" share"))
