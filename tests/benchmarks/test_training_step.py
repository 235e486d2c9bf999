"""The adapters that the benchmark compares are what their names say."""

import subprocess
import sys

import torch

from healthgpt import TaskConfig
from healthgpt.benchmarks.training_step import LoRALinear, MixtureLinear
from healthgpt.modeling_healthgpt import HLoRALinear, route


def test_the_mixture_is_h_lora_expert_by_expert():
    torch.manual_seed(0)
    base, n, rank = torch.nn.Linear(6, 5), 3, 12
    wide = HLoRALinear(base, {"task": TaskConfig("text", rank, 2 * rank / n, n, vision_layer=-2)})
    mixture, plugin = MixtureLinear(base, rank, n), wide.plugins["task"]
    mixture.lora_route.weight = plugin.lora_route.weight
    for index, part in enumerate(range(0, rank, rank // n)):
        mixture.lora_A[index].weight = torch.nn.Parameter(plugin.lora_A.weight[part : part + rank // n])
        mixture.lora_B[index].weight = torch.nn.Parameter(plugin.lora_B.weight[:, part : part + rank // n])
    x = torch.randn(2, 4, 6)
    with route([("task", None)]):
        torch.testing.assert_close(wide(x), mixture(x))
    single = MixtureLinear(base, rank, 1)  # one expert, whose weight is 1
    lora = LoRALinear(base, rank)
    single.lora_A[0], single.lora_B[0] = lora.lora_A, lora.lora_B
    torch.testing.assert_close(lora(x), single(x))


def test_it_runs():
    options = [
        "--hidden-size",
        "32",
        "--layers",
        "1",
        "--rank",
        "32",
        "--experts",
        "2",
        "4",
        "8",
        "32",
        "--tokens",
        "8",
        "--rounds",
        "1",
    ]
    command = [sys.executable, "-m", "healthgpt.benchmarks.training_step", *options]
    table = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:11]]
    published = {(adapter, int(experts)): figure for adapter, experts, _, _, figure in rows}
    assert published == {("LoRA", 1): "1.00"} | {
        ("mixture", 2): "",
        ("H-LoRA", 2): "",
        ("mixture", 4): "1.49",
        ("H-LoRA", 4): "1.00",
        ("mixture", 8): "",
        ("H-LoRA", 8): "",
        ("mixture", 32): "5.80",
        ("H-LoRA", 32): "1.01",
    }
    assert rows[0][3] == "1.00" and all(float(seconds) > 0 for _, _, seconds, _, _ in rows)
