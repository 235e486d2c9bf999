"""
Time of one training step with plain LoRA, the naive mixture of LoRA experts and H-LoRA, all of the same total rank.

    python -m healthgpt.benchmarks.training_step
    python -m healthgpt.benchmarks.training_step --hidden-size 1024 --layers 4 --rank 64 --experts 2 4 8 32

The mixture runs each expert's two thin products and its share of the router by itself, hence 2 n products more per linear than
LoRA; H-LoRA runs two products for all experts and one for the router. A step is forward, backward and AdamW on the adapters of
every linear of a frozen Phi3. The kinds take turns within every round; printed are medians beside plain LoRA and, for four and 32
experts, what the paper reports (H-LoRA 1.00 and 1.01, the mixture 1.49 and about 5.8).
"""

import argparse
import json
import statistics
import time

import torch
from torch import nn
from transformers import AutoModel
from transformers.models.phi3 import Phi3Config

from ..configuration_healthgpt import TaskConfig
from ..modeling_healthgpt import HLoRALinear, route

PUBLISHED = {("LoRA", 1): 1.00, ("mixture", 4): 1.49, ("mixture", 32): 5.8, ("H-LoRA", 4): 1.00, ("H-LoRA", 32): 1.01}


class LoRALinear(nn.Module):
    """W x + B (A x * s)."""

    def __init__(self, base_layer: nn.Linear, rank: int):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)

    def forward(self, hidden_states):
        return self.base_layer(hidden_states) + self.lora_B(self.lora_A(hidden_states) * 2)


class MixtureLinear(nn.Module):
    """W x + sum over experts i of w_i B_i (A_i x * s), expert by expert."""

    def __init__(self, base_layer: nn.Linear, rank: int, num_experts: int):
        super().__init__()
        self.base_layer = base_layer
        self.lora_route = nn.Linear(base_layer.in_features, num_experts, bias=False)
        sizes = base_layer.in_features, rank // num_experts, base_layer.out_features
        self.lora_A = nn.ModuleList(nn.Linear(*sizes[:2], bias=False) for _ in range(num_experts))
        self.lora_B = nn.ModuleList(nn.Linear(*sizes[1:], bias=False) for _ in range(num_experts))

    def forward(self, hidden_states):
        weights = self.lora_route(hidden_states).softmax(dim=-1)
        output = self.base_layer(hidden_states)
        for index, (lora_A, lora_B) in enumerate(zip(self.lora_A, self.lora_B, strict=True)):
            output = output + weights[..., index, None] * lora_B(lora_A(hidden_states) * 2)
        return output


def build(arguments, make_linear) -> nn.Module:
    """A frozen Phi3 whose linears are wrapped."""
    config = Phi3Config(
        vocab_size=100,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        pad_token_id=0,
    )
    model = AutoModel.from_config(config).requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, make_linear(child))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64, help="total rank")
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 32])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rank = arguments.rank
    makers = {("LoRA", 1): lambda base: LoRALinear(base, rank)}
    for n in arguments.experts:
        task = TaskConfig("text", rank, 2 * rank, n, vision_layer=-2)
        makers["mixture", n] = lambda base, n=n: MixtureLinear(base, rank, n)
        makers["H-LoRA", n] = lambda base, task=task: HLoRALinear(base, {"task": task})
    models = {key: build(arguments, make) for key, make in makers.items()}
    optimizers = {}
    for key, model in models.items():
        trained = [value for name, value in model.named_parameters() if "lora_" in name]
        optimizers[key] = torch.optim.AdamW([value.requires_grad_() for value in trained], weight_decay=0.0)
    embeddings = torch.randn(1, arguments.tokens, arguments.hidden_size)
    seconds = {key: [] for key in models}
    for _ in range(arguments.rounds + 1):
        for key, model in models.items():
            start = time.perf_counter()
            with route([("task", None)]):
                model(inputs_embeds=embeddings).last_hidden_state.square().mean().backward()
            optimizers[key].step()
            optimizers[key].zero_grad()
            seconds[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(values[1:]) for key, values in seconds.items()}  # the first round warms up
    results = []
    print("| adapter | experts | seconds a step | beside LoRA | published |\n|---|---|---|---|---|")
    for (kind, n), median in medians.items():
        ratio = median / medians["LoRA", 1]
        results.append({"adapter": kind, "experts": n, "seconds": round(median, 4), "ratio": round(ratio, 3)})
        published = f"{PUBLISHED[kind, n]:.2f}" if (kind, n) in PUBLISHED else ""
        print(f"| {kind} | {n} | {median:.3f} | {ratio:.2f} | {published} |")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
