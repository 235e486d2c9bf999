"""
Time of decoding: what a token and a whole image cost, and the least that they can cost on this machine.

    python -m healthgpt.benchmarks.decoding
    python -m healthgpt.benchmarks.decoding --parts images --batches 1 8 --against ../older/healthgpt
    python -m healthgpt.benchmarks.decoding --parts layers --dtypes float32 bfloat16

The cost model comes first. A pass reads every weight of base, plugin and head once, and the cache of every row; a token takes two
operations with each of them. Neither can be faster than this machine reads memory and multiplies matrices, which is measured. The
cache is taken to hold one input image and half of a drawn one. Not counted are reading the prompt and what runs once for an image
(vision tower, VQGAN). What fits into the processor's caches, as the small model does, is read faster than from memory.

Then everything takes turns in one run, so that other work on the machine disturbs all of it alike; printed are medians, ratios
are medians of the ratios within a turn.

    layers    some decoder layers of the published M3 with random weights: one token with the bare base, with the published formula
              written plainly, and with this package; then a pass over several tokens. It says nothing of heads and loops.
    images    the small model `nano` on phantoms that it has not seen: its five drawing tasks and answers of a fixed length, one
              code a pass and as many as the package chooses, each kind in a process of its own. `--against` adds the package in
              another checkout, whose small model has to have the same weights. How many codes a pass draws depends on the model and its images:
              these passes are not those of an M3.

In float32 all drawings and answers have to be the same, code for code, and the layers' outputs up to rounding; if some are not, the
exit code is 1. The last line is JSON.
"""

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

from .. import HealthGPTConfig, HealthGPTForConditionalGeneration, HealthGPTModel, TaskConfig
from ..errors_healthgpt import HealthGPTError
from ..generation_healthgpt import CACHE_NAME
from ..modeling_healthgpt import HLoRA, HLoRALinear
from ..phantoms import comprehension_sample, drawing_sample
from ..phantoms.samples import INSTRUCTIONS
from ..refusals import temporary_folder
from . import decoding_worker
from .memory import require_memory_figures

PACKAGE = Path(__file__).parent.parent
ONE, MANY, OTHER = "one code a pass", "many codes a pass", "other checkout"
BARE, FORMULA, OURS = "bare base", "published formula", "this package"
ANSWER_TOKENS = 16
QUICK = {"hidden_size": 192, "layers": 1, "tokens": 4, "rounds": 2, "batches": [2], "drawings": 2, "megabytes": 8}


@dataclass
class Machine:
    """
    What this machine can do at best.

    Args:
        bandwidth (`float`): Bytes that are read from memory in a second.
        speed (`float`): Operations in a second, a multiplication and its addition being two, of products with a matrix or
            with a vector, whichever do more: where there are no instructions for a dtype, those with vectors do.
    """

    bandwidth: float
    speed: float


@dataclass
class Cost:
    """
    What a pass of one task reads, in numbers (not bytes).

    Args:
        base (`int`): Weights of the language model without its token tables.
        plugin (`int`): Weights of the task's plugin.
        head (`int`): Weights of the task's head.
        cache (`int`): Keys and values of one row.
    """

    base: int
    plugin: int
    head: int
    cache: int

    def operations(self) -> int:
        """Operations that one token of one row takes."""
        return 2 * (self.base + self.plugin + self.head + self.cache)

    def bytes(self, batch: int, itemsize: int) -> int:
        """Bytes that a pass reads."""
        return (self.base + self.plugin + self.head + batch * self.cache) * itemsize

    def floor(self, machine: Machine, passes: float, tokens: float, batch: int, itemsize: int) -> float:
        """Seconds that passes over so many tokens of every row take at least."""
        reading = passes * self.bytes(batch, itemsize) / machine.bandwidth
        return max(reading, tokens * batch * self.operations() / machine.speed)


def cost_of(config: HealthGPTConfig, task: str) -> Cost:
    """The cost model of a task; the cache holds one input image and, as it does on average, half of a drawn one."""
    with torch.device("meta"):
        sizes = {name: weight.numel() for name, weight in HealthGPTForConditionalGeneration(config).named_parameters()}

    def total(prefix, part):
        return sum(size for name, size in sizes.items() if name.startswith(prefix) and part in name)

    language_model, tables = "model.language_model.", config.tasks[task].token_tables
    text = config.text_config
    width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads  # of a key, all heads together
    context = config.num_image_patches
    if config.tasks[task].kind == "image":
        context += config.num_image_codes // 2
    return Cost(
        base=total(language_model, "") - total(language_model, ".plugins.") - total(language_model, "embed_tokens"),
        plugin=total(language_model, f".plugins.{task}."),
        head=total("lm_head" if tables is None else f"token_heads.{tables}.", ""),
        cache=2 * text.num_hidden_layers * width * context,
    )


def published_config(hidden_size: int = 3072, layers: int = 32) -> HealthGPTConfig:
    """The published M3, or a part of it; the vision tower and the VQGAN, which decoding does without, are small."""
    return HealthGPTConfig(
        text_config={
            "model_type": "phi3",
            "vocab_size": 40206,
            "hidden_size": hidden_size,
            "intermediate_size": hidden_size * 8 // 3,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden_size // 96,
            "num_key_value_heads": hidden_size // 96,
            "pad_token_id": 32000,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 336,
            "patch_size": 14,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        vqgan_config={"base_channels": 32, "num_res_blocks": 1},
        tasks={
            "comprehension": TaskConfig("text", rank=64, alpha=128, num_experts=4, vision_layer=-2),
            "generation": TaskConfig(
                "image", rank=256, alpha=512, num_experts=4, vision_layer=1, token_tables="generation"
            ),
        },
        image_token_id=40206,
        image_start_token_id=32011,
        image_code_offset=32012,
    )


def seconds_of(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_machine(dtypes: list[torch.dtype], megabytes: int) -> dict[torch.dtype, Machine]:
    """The best of five products of a matrix larger than the caches with a vector, and of five of square matrices."""

    def fastest(matrix, other):
        return min(seconds_of(lambda: matrix @ other) for _ in range(5))

    matrix, vector = torch.ones(megabytes * 10**6 // 4096 // 4, 4096), torch.ones(4096)
    bandwidth = matrix.nbytes / fastest(matrix, vector)
    side, machines = 64 * math.isqrt(megabytes), {}
    for dtype in dtypes:
        square = torch.ones(side, side, dtype=dtype)
        with_matrix = 2 * side**3 / fastest(square, square)
        with_vector = 2 * matrix.numel() / fastest(matrix.to(dtype), vector.to(dtype))
        machines[dtype] = Machine(bandwidth, max(with_matrix, with_vector))
    return machines


def floors(config: HealthGPTConfig, dtype: torch.dtype, machine: Machine, name: str) -> list[dict]:
    """A row of the cost model for each task."""
    rows = []
    for task, settings in config.tasks.items():
        cost = cost_of(config, task)
        row = {"model": name, "dtype": name_of(dtype), "task": task}
        for part in ("base", "plugin", "head", "cache"):
            row[f"{part}_bytes"] = getattr(cost, part) * dtype.itemsize
        row["operations_a_token"] = cost.operations()
        row["token_seconds"] = cost.floor(machine, 1, 1, 1, dtype.itemsize)
        # With so many tokens a pass multiplies as long as it reads.
        row["free_tokens"] = cost.bytes(1, dtype.itemsize) / machine.bandwidth / (cost.operations() / machine.speed)
        if settings.kind == "image":
            codes = config.num_image_codes
            row["image_seconds"] = cost.floor(machine, codes, codes, 1, dtype.itemsize)
            row["image_seconds_in_one_pass"] = cost.floor(machine, 1, codes, 1, dtype.itemsize)
        rows.append(row)
    return rows


class PublishedLinear(nn.Module):
    """W x + b + B (softmax(R x), each repeated r / n times, * (A x * s)), with the weights of a plugin."""

    def __init__(self, base_layer: nn.Linear, plugin: HLoRA):
        super().__init__()
        self.base_layer = base_layer
        self.R, self.A, self.B = plugin.lora_route.weight, plugin.lora_A.weight, plugin.lora_B.weight
        self.scaling = plugin.scaling

    def forward(self, hidden_states):
        weights = F.linear(hidden_states, self.R).softmax(dim=-1, dtype=torch.float32).to(hidden_states.dtype)
        weights = weights.repeat_interleave(len(self.A) // len(self.R), dim=-1)
        return self.base_layer(hidden_states) + F.linear(
            weights * (F.linear(hidden_states, self.A) * self.scaling), self.B
        )


def with_linears(language_model: nn.Module, make: Callable[[HLoRALinear], nn.Module]) -> nn.Module:
    """A language model that shares all weights with the given one, with other modules in place of its H-LoRA linears."""
    changed = copy.deepcopy(language_model, {id(weight): weight for weight in language_model.parameters()})
    for parent in list(changed.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, HLoRALinear):
                setattr(parent, name, make(child))
    return changed


def count_calls(function: Callable) -> int:
    """ATen calls, those inside others included."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return sum(event.count for event in profiler.key_averages() if event.key.startswith("aten::"))


def prompt_cache(config: HealthGPTConfig, batch: int, dtype: torch.dtype) -> DynamicCache:
    """A cache as after prompts with one image each, of random numbers."""
    text, cache = config.text_config, DynamicCache(config=config.text_config)
    size = text.hidden_size // text.num_attention_heads
    for layer in range(text.num_hidden_layers):
        keys, values = torch.randn(2, batch, text.num_key_value_heads, config.num_image_patches, size, dtype=dtype)
        cache.update(keys, values, layer)
    return cache


@torch.no_grad()
def measure_layers(arguments, dtype: torch.dtype) -> list[dict]:
    """Passes through a slice of the M3: one token in every batch size, then several tokens."""
    torch.manual_seed(0)
    config = published_config(arguments.hidden_size, arguments.layers)
    model = HealthGPTModel(config).to(dtype).eval()
    for name, weight in model.named_parameters():
        if name.endswith("lora_B.weight"):  # zeros in a new plugin
            weight.normal_(std=0.02)
    models = {(BARE, None): (with_linears(model.language_model, lambda linear: linear.base_layer), {})}
    for task in config.tasks:
        formula = with_linears(
            model.language_model, lambda linear, task=task: PublishedLinear(linear.base_layer, linear.plugins[task])
        )
        models[FORMULA, task] = formula, {}
        models[OURS, task] = model, {"task": task}
    num_linears = sum(isinstance(module, HLoRALinear) for module in model.modules())
    rows = []
    for batch, width in [*((batch, 1) for batch in arguments.batches), (1, arguments.tokens)]:
        cache = prompt_cache(config, batch, dtype)
        embeddings = torch.randn(batch, width, arguments.hidden_size, dtype=dtype)

        def run(key, cache=cache, embeddings=embeddings):
            network, settings = models[key]
            output = network(inputs_embeds=embeddings, **{CACHE_NAME: cache}, **settings).last_hidden_state
            cache.crop(-embeddings.shape[1])
            return output

        outputs = {key: run(key) for key in models}
        calls = {key: count_calls(lambda key=key, run=run: run(key)) for key in models}
        seconds = {key: [] for key in models}
        for _ in range(arguments.rounds):
            for key in models:
                seconds[key].append(seconds_of(lambda key=key, run=run: run(key)))
        for kind, task in models:
            row = {"dtype": name_of(dtype), "batch": batch, "tokens": width, "kind": kind, "task": task}
            row["seconds"] = statistics.median(seconds[kind, task])
            row["ratio"] = median_ratio(seconds[kind, task], seconds[BARE, None])
            row["calls_a_linear"] = (calls[kind, task] - calls[BARE, None]) / num_linears
            if kind == OURS:
                expected = outputs[FORMULA, task]
                row["error"] = ((outputs[kind, task] - expected).norm() / expected.norm()).item()
            rows.append(row)
    return rows


class Worker:
    """A process that answers and draws with one package; see `decoding_worker.py`."""

    def __init__(self, package: Path, dtype: str, settings: dict, folder: str, stack: ExitStack):
        self.package = package
        self.settings = settings
        command = [sys.executable, decoding_worker.__file__, str(package), dtype]
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_MODULES_CACHE": folder}
        self.process = stack.enter_context(
            subprocess.Popen(command, env=os.environ | quiet, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )

    def ask(self, request: dict) -> dict:
        """
        Raises:
            HealthGPTError: if the process ended, over what it has said itself.
        """
        request = request | {"settings": request["settings"] | self.settings}
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            raise HealthGPTError(f"The package in {self.package} could not answer or draw.") from error


def requests_of(kind: str, batch: int, count: int, folder: str) -> list[dict]:
    """As many whole batches of unseen phantoms as `count` needs, for a drawing task or `"answer"`."""
    requests = []
    for first in range(0, count, batch):
        texts, images = [], []
        for number in range(first, first + batch):
            if kind == "answer":
                sample = comprehension_sample("test", number, "report")
            else:
                sample = drawing_sample("test", number, kind)
            texts.append(sample["instruction"])
            path = Path(folder, f"{kind}-{number}.png")
            if sample["input_image"] is not None:
                sample["input_image"].save(path)
            images.append(None if sample["input_image"] is None else str(path))
        answers = kind == "answer"
        settings = {"max_new_tokens": ANSWER_TOKENS, "min_new_tokens": ANSWER_TOKENS} if answers else {}
        task = "comprehension" if answers else "generation"
        requests.append({"task": task, "texts": texts, "images": images, "settings": settings})
    return requests


def measure_images(arguments, dtype: torch.dtype, machine: Machine) -> list[dict]:
    """
    Drawings of the five tasks, and answers, of the small model.

    Raises:
        HealthGPTError: if one of the packages cannot do it, or nothing tells how much memory is used.
    """
    require_memory_figures()
    kinds = {ONE: (PACKAGE, {"codes_per_pass": 1}), MANY: (PACKAGE, {})}
    if arguments.against is not None:
        kinds[OTHER] = arguments.against, {}
    config = HealthGPTConfig.from_pretrained(PACKAGE / "nano")
    costs = {task: cost_of(config, task) for task in config.tasks}
    rows = []
    with temporary_folder() as folder, ExitStack() as stack:
        workers = {
            kind: Worker(package, name_of(dtype), settings, folder, stack)
            for kind, (package, settings) in kinds.items()
        }
        for batch in arguments.batches:
            for subject in [*INSTRUCTIONS, "answer"]:
                requests = requests_of(subject, batch, arguments.drawings, folder)
                for worker in workers.values():
                    worker.ask(requests[0])  # to warm up
                found = {kind: [] for kind in workers}
                for request in requests:
                    for kind, worker in workers.items():
                        found[kind].append(worker.ask(request))
                cost = costs[requests[0]["task"]]
                for kind in kinds:
                    row = {"dtype": name_of(dtype), "batch": batch, "subject": subject, "kind": kind}
                    row |= summarise(found, kind, batch)
                    floor = cost.floor(machine, row["passes"], row["tokens_read"], batch, dtype.itemsize)
                    rows.append(row | {"floor_seconds": floor / batch})
    return rows


def summarise(found: dict[str, list[dict]], kind: str, batch: int) -> dict:
    """
    What one kind needs for an image or an answer.

    Args:
        found (`dict[str, list[dict]]`): What the workers gave for the same requests, by their kind.
        kind (`str`): Which.
        batch (`int`): Rows of a request.
    """
    own, reference = found[kind], found[OTHER if OTHER in found else ONE]

    def each(name, answers=own):
        return [answer[name] for answer in answers]

    pairs = [
        pair
        for answer, expected in zip(own, found[ONE], strict=True)
        for pair in zip(answer["ids"], expected["ids"], strict=True)
    ]
    lengths = [len(answer["ids"][0]) - 1 for answer in own]
    after = [
        (answer["seconds"] - answer["first_seconds"]) / length for answer, length in zip(own, lengths, strict=True)
    ]
    return {
        "passes": statistics.mean(each("passes")),
        "tokens_read": statistics.mean(each("tokens_read")),
        "first_seconds": statistics.median(each("first_seconds")),
        "token_seconds": statistics.median(after),
        "seconds": statistics.median(each("seconds")) / batch,
        "ratio": median_ratio(each("seconds"), each("seconds", reference)),
        "peak_ratio": max(each("peak_gigabytes")) / max(each("peak_gigabytes", reference)),
        "peak_gigabytes": max(each("peak_gigabytes")),
        "equal": sum(own == expected for own, expected in pairs),
        "compared": len(pairs),
    }


def median_ratio(seconds: list[float], reference: list[float]) -> float:
    return statistics.median(own / other for own, other in zip(seconds, reference, strict=True))


def failures_of(layers: list[dict], images: list[dict]) -> list[str]:
    """What should be equal in float32 and is not, a sentence for each row."""
    failures = [
        f"{row['task']}, batch {row['batch']}, {row['tokens']} tokens: the layers are off the formula by {row['error']:.1e}."
        for row in layers
        if row["dtype"] == "float32" and not row.get("error", 0) < 1e-5
    ]
    return failures + [
        f"{row['subject']}, batch {row['batch']}, {row['kind']}: {row['equal']} of {row['compared']} are equal."
        for row in images
        if row["dtype"] == "float32" and row["equal"] < row["compared"]
    ]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    if name not in ("float32", "bfloat16", "float16"):
        raise argparse.ArgumentTypeError(f"{name!r} is none of float32, bfloat16 and float16")
    return getattr(torch, name)


def checkout(path: str) -> Path:
    folder = Path(path).resolve()
    for part in ("__init__.py", "nano/config.json"):
        if not (folder / part).is_file():
            raise argparse.ArgumentTypeError(f"{path} is no checkout of the package: it has no {part}")
    if weight_files(folder) != weight_files(PACKAGE):
        raise argparse.ArgumentTypeError(f"the small model of {path} has other weights, so that it draws otherwise")
    return folder


def weight_files(package: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in package.glob("nano/*.safetensors")}


def hidden_size(text: str) -> int:
    if positive(text) % 96 > 0:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of 96, the size of a head")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def print_tables(title: str, rows: list[dict], columns: dict[str, Callable[[dict], str]]) -> None:
    """A table for each dtype."""
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        table = Table(title=f"{title}, {dtype}", title_justify="left", title_style="bold")
        for number, name in enumerate(columns):
            table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
        for row in rows:
            if row["dtype"] == dtype:
                table.add_row(*(cell(row) for cell in columns.values()))
        Console(width=140).print(table)


def column(name: str, factor: float = 1) -> Callable[[dict], str]:
    """The cells of a column: a number of three digits or whole, where there is one."""

    def cell(row):
        if name not in row:
            return ""
        value = row[name] * factor
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    return cell


def print_costs(rows: list[dict]) -> None:
    columns = {"model, task": lambda row: f"{row['model']}, {row['task']}"}
    for part in ("base", "plugin", "head", "cache"):
        columns[f"{part} MB"] = column(f"{part}_bytes", 1e-6)
    columns |= {
        "million operations": column("operations_a_token", 1e-6),
        "token ms": column("token_seconds", 1e3),
        "image s": column("image_seconds"),
        "in one pass s": column("image_seconds_in_one_pass"),
        "free tokens": column("free_tokens"),
    }
    print_tables(
        "The least that a token and an image can take, batch 1 (a pass over the free tokens takes no longer)",
        rows,
        columns,
    )


def print_layers(rows: list[dict]) -> None:
    columns = {
        "kind": lambda row: row["kind"] if row["task"] is None else f"{row['kind']}, {row['task']}",
        "batch": lambda row: str(row["batch"]),
        "tokens": lambda row: str(row["tokens"]),
        "ms": column("seconds", 1e3),
        "beside bare": lambda row: f"{row['ratio']:.3f}",
        "ATen calls more a linear": lambda row: f"{row['calls_a_linear']:.1f}",
        "off the formula": lambda row: f"{row['error']:.1e}" if "error" in row else "",
    }
    print_tables("A pass through layers of the M3", rows, columns)


def print_images(rows: list[dict], reference: str) -> None:
    columns = {
        "subject, kind": lambda row: f"{row['subject']}, {row['kind']}",
        "batch": lambda row: str(row["batch"]),
        "passes": column("passes"),
        "first ms": column("first_seconds", 1e3),
        "token ms": column("token_seconds", 1e3),
        "each ms": column("seconds", 1e3),
        "floor ms": column("floor_seconds", 1e3),
        "time beside": lambda row: f"{row['ratio']:.3f}",
        "memory beside": lambda row: f"{row['peak_ratio']:.3f}",
        "equal": lambda row: f"{row['equal']} of {row['compared']}",
    }
    print_tables(f"Images and answers of the small model; beside: {reference}", rows, columns)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["layers", "images"], default=["layers", "images"])
    parser.add_argument("--dtypes", nargs="+", type=dtype_of, default=[torch.float32])
    parser.add_argument("--batches", nargs="+", type=positive, default=[1, 2, 4, 8, 16])
    parser.add_argument("--hidden-size", type=hidden_size, default=3072, help="of the layers")
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--tokens", type=positive, default=32, help="of the pass over several tokens")
    parser.add_argument("--rounds", type=positive, default=15, help="turns of the layers")
    parser.add_argument(
        "--drawings", type=positive, default=20, help="images of each task, rounded up to whole batches"
    )
    parser.add_argument("--against", type=checkout, help="folder of the package in another checkout")
    parser.add_argument(
        "--megabytes", type=positive, default=512, help="of the matrix that is read; more than the caches"
    )
    parser.add_argument("--quick", action="store_true", help="sizes that only show that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler tells of every start and stop
    load_before = os.getloadavg()[0]
    machines = measure_machine(arguments.dtypes, arguments.megabytes)
    costs, layers, images = [], [], []
    small = HealthGPTConfig.from_pretrained(PACKAGE / "nano")
    for dtype, machine in machines.items():
        print(
            f"{name_of(dtype)}: {machine.bandwidth / 1e9:.1f} GB/s are read, {machine.speed / 1e9:.1f} billion operations "
            f"a second, {torch.get_num_threads()} threads, load {load_before:.1f}."
        )
        costs += floors(published_config(), dtype, machine, "M3") + floors(small, dtype, machine, "nano")
    print_costs(costs)
    if "layers" in arguments.parts:
        for dtype in machines:
            layers += measure_layers(arguments, dtype)
        print_layers(layers)
    if "images" in arguments.parts:
        for dtype, machine in machines.items():
            images += measure_images(arguments, dtype, machine)
        print_images(images, ONE if arguments.against is None else OTHER)
    failures = failures_of(layers, images)
    for failure in failures:
        print(failure)
    machine = {
        "threads": torch.get_num_threads(),
        "load": [load_before, os.getloadavg()[0]],
        "bandwidth": next(iter(machines.values())).bandwidth,
        "speed": {name_of(dtype): machine.speed for dtype, machine in machines.items()},
    }
    result = {"machine": machine, "costs": costs, "layers": layers, "images": images, "failures": failures}
    print(json.dumps(result))
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HealthGPTError as error:
        sys.exit(str(error))
