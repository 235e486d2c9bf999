"""
A pass of an M3 on this machine's processor, in each format that a CPU may run it in.

    OMP_WAIT_POLICY=passive python -m healthgpt.benchmarks.cpu
    OMP_WAIT_POLICY=passive python -m healthgpt.benchmarks.cpu --layers 4 --tokens 1 64

Builds the published M3 with random weights in bfloat16 (12 GB of memory; `--layers` makes less of it) and times passes over 1, 16 and
64 tokens after a prompt with one image, for both tasks: in bfloat16 with torch's own products, as the package computes bfloat16, and
with OpenVINO (`pip install healthgpt[openvino]`). Prints medians, what they are beside torch's own products, and one JSON line last.
"""

import argparse
import json
import statistics
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from .. import precision_healthgpt
from ..drafting_healthgpt import CACHE_NAME
from ..modeling_healthgpt import HealthGPTForConditionalGeneration
from ..openvino_linears import use_openvino
from .decoding import hidden_size, positive, prompt_cache, published_config, seconds_of

OWN, WIDENED, OPENVINO = "bfloat16, torch's products", "bfloat16", "OpenVINO, 8 bits"


def random_model(hidden_size: int, layers: int) -> HealthGPTForConditionalGeneration:
    """A slice of the published M3, with random weights in bfloat16."""
    torch.manual_seed(0)
    config = published_config(hidden_size, layers)
    with torch.device("meta"):
        model = HealthGPTForConditionalGeneration(config).bfloat16()
    model = model.to_empty(device="cpu").eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    model.model.language_model.rotary_emb.__init__(config.text_config)  # its buffers are no weights
    return model


@torch.no_grad()
def measure(model: HealthGPTForConditionalGeneration, tokens: list[int], rounds: int) -> dict[tuple[str, int], float]:
    """Median seconds of a pass by task and number of tokens."""
    config, seconds = model.config, {}
    for task in config.tasks:
        for number in tokens:
            cache = prompt_cache(config, 1, model.dtype)
            ids = torch.randint(0, 32000, (1, number))

            def run(task=task, cache=cache, ids=ids):
                model(input_ids=ids, task=task, **{CACHE_NAME: cache})
                cache.crop(-ids.shape[1])

            run()
            seconds[task, number] = statistics.median(seconds_of(run) for _ in range(rounds))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=hidden_size, default=3072)
    parser.add_argument("--layers", type=positive, default=32)
    parser.add_argument("--tokens", type=positive, nargs="+", default=[1, 16, 64], help="tokens of a pass")
    parser.add_argument("--rounds", type=positive, default=3)
    arguments = parser.parse_args()
    model = random_model(arguments.hidden_size, arguments.layers)
    found = {}
    with patch.object(precision_healthgpt, "CPU_DTYPES", {torch.bfloat16, torch.float32}):
        found[OWN] = measure(model, arguments.tokens, arguments.rounds)
    found[WIDENED] = measure(model, arguments.tokens, arguments.rounds)
    found[OPENVINO] = measure(use_openvino(model), arguments.tokens, arguments.rounds)
    table = Table("format", "task", "tokens", "milliseconds", "times as fast")
    rows = []
    for name, seconds in found.items():
        for (task, number), value in seconds.items():
            rows.append({"format": name, "task": task, "tokens": number, "seconds": value})
            rows[-1]["speedup"] = found[OWN][task, number] / value
            table.add_row(name, task, str(number), f"{value * 1000:.0f}", f"{rows[-1]['speedup']:.2f}")
    Console().print(table)
    settings = {"layers": arguments.layers, "hidden_size": arguments.hidden_size, "threads": torch.get_num_threads()}
    print(json.dumps(settings | {"capability": torch.backends.cpu.get_cpu_capability(), "rows": rows}))


if __name__ == "__main__":
    main()
