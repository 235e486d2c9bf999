"""
What a GPU makes of HealthGPT, in at most 5 minutes and with nothing but this repository.

    bash benchmarks/gpu.sh

Exports the golden checkpoint of `tests/golden` and compares its logits, answers and images, in float32 on the GPU, with those of the
published computation. Then builds an M3 of full size with random weights in bfloat16 on the GPU and times answers and drawings: each
pass run as Python asks for it (`eager`) or compiled (`cache_implementation="static"`), drawings with one code a pass or many. Prints
one JSON line last, as far as it came if time runs out:

    device                 the GPU's name
    bandwidth              bytes a second that a large copy reads and writes
    golden                 largest difference of a logit or pixel (of a width of 2), and cases whose ids are not the published ones
    tokens_per_second      of an answer after its first token
    seconds_per_image      of a whole image with its prompt; extrapolated if the drawing was stopped after a time
    codes_per_pass         drawn codes by passes
    share_of_bandwidth     bytes of weights that the passes read, by the time and the bandwidth
    peak_gigabytes         of the GPU's memory
    first_seconds          of the first call, which compiles
    graphs, graph_breaks   that torch compiled; passes that could not become CUDA graphs are `cudagraph_skips`

No random model draws an image that anything could expect. The images here are made up: code 0, and at random places, a share of 1 in
11, code 1. The model predicts code 0 everywhere (its head is zero), so that passes over many codes draw about 11 of them, as those of
the small model do.
"""

import argparse
import functools
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, Phi3Config
from transformers.generation import CompileConfig, LogitsProcessor
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from .. import HealthGPTConfig, HealthGPTForConditionalGeneration, HealthGPTProcessor, HealthGPTVQGANConfig
from ..hub_export import ExportSources, export

GOLDEN = Path(__file__).parent.parent / "tests/golden"
SECONDS = 290  # of all
EAGER_SECONDS = 20  # of a drawing with one code a pass
SURPRISES = 1 / 11  # share of codes that a draft lacks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="try all of it on the CPU, with a tiny model")
    tiny = parser.parse_args().tiny
    device = torch.device("cpu" if tiny else "cuda")
    result = {"device": "cpu" if tiny else torch.cuda.get_device_name(), "torch": torch.__version__, "complete": False}

    def stop():
        print(json.dumps(result), flush=True)
        os._exit(1)

    timer = threading.Timer(SECONDS, stop)
    timer.daemon = True
    timer.start()
    disable_progress_bar()
    set_verbosity_error()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    config = CompileConfig(fullgraph=True)
    if tiny:
        config = CompileConfig(fullgraph=True, backend="eager", mode=None)
        config._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": config}
    result["bandwidth"] = copy_bandwidth(device, 2**20 if tiny else 2**30)
    for key, step in steps(device, result["bandwidth"], compiled, tiny):
        print(f"{key} ...", flush=True)
        result[key] = step()
    counters = torch._dynamo.utils.counters
    result |= {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
        "complete": True,
    }
    timer.cancel()
    print(json.dumps(result))


def steps(device: torch.device, bandwidth: float, compiled: dict, tiny: bool):
    """What is measured, by its name and in the order of what is worth most."""
    yield "golden", functools.partial(golden, device, compiled)
    bench = Bench(random_model(device, tiny), bandwidth, 8 if tiny else 128)
    yield "answer_eager", bench.answer
    yield "drawing_eager_many", bench.draw
    yield "drawing_eager_one", functools.partial(bench.draw, codes_per_pass=1, max_time=EAGER_SECONDS)
    yield "drawing_compiled_many", functools.partial(bench.draw, **compiled)
    yield "answer_compiled", functools.partial(bench.answer, **compiled)
    yield "drawing_compiled_one", functools.partial(bench.draw, codes_per_pass=1, **compiled)


def sources_of(source: Path) -> ExportSources:
    """The arguments with which a folder of published files, such as those of `tests/golden`, is exported."""
    content = json.loads((source / "cases.json").read_text())
    plugins = content["plugins"]
    optional = {
        "generation": source / "gen_hlora_weights.bin",
        "fusion": source / "fusion_layer_weights.bin",
        "vqgan": source / "vqgan/last.ckpt",
        "vqgan_config": source / "vqgan/model.yaml",
    }
    optional = {name: path for name, path in optional.items() if path.exists()}
    num_codes = None
    if "vqgan" not in optional:  # no file tells how many codes the vocabulary of such a checkpoint has
        num_codes = content.get("num_codes", plugins["comprehension"].get("n_new_tokens", 0) - 3)
    return ExportSources(
        source / "base",
        source / "vit",
        source / "com_hlora_weights.bin",
        comprehension_alpha=plugins["comprehension"]["alpha"],
        generation_alpha=plugins["generation"]["alpha"] if "generation" in plugins else None,
        num_codes=num_codes if num_codes and num_codes > 0 else None,
        **optional,
    )


@torch.no_grad()
def golden(device: torch.device, compiled: dict) -> dict:
    """The cases of the golden M3 on a device, eager and compiled: how far its numbers are from the published ones."""
    source = GOLDEN / "m3"
    expected = load_file(source / "expected.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        export(sources_of(source), Path(folder) / "m3")
        model = HealthGPTForConditionalGeneration.from_pretrained(Path(folder) / "m3", dtype=torch.float32).to(device)
        processor = HealthGPTProcessor.from_pretrained(Path(folder) / "m3")
    differences, wrong = [], []
    for case in json.loads((source / "cases.json").read_text())["cases"]:
        names = case["image"] or []
        names = [names] if isinstance(names, str) else names
        images = [Image.open(GOLDEN / f"images/{name}.png") for name in names]
        inputs = processor(images or None, case["prompt"], return_tensors="pt").to(device)
        name, task = case["name"], case["task"]
        logits = model(**inputs, task=task).logits[0]
        differences.append((logits.cpu() - expected[f"{name}/logits"]).abs().max().item())
        for options in (compiled | {"max_cache_len": 256}, {}):
            sequences = model.generate(**inputs, task=task, max_new_tokens=case["max_new_tokens"], **options)
            if sequences[0, inputs["input_ids"].shape[1] :].tolist() != case["generated_ids"]:
                wrong.append(f"{name} {'compiled' if options else 'eager'}")
        if f"{name}/decoded" in expected:
            pixels = model.decode_image_tokens(sequences).cpu()
            differences.append((pixels - expected[f"{name}/decoded"].clamp(-1, 1)).abs().max().item())
    return {"largest_difference": max(differences), "wrong_ids": wrong}


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes a second that a copy reads and writes; the best of some."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / min(timed(device, target.copy_, source)[0] for _ in range(10))


def timed(device: torch.device, function, *arguments, **options) -> tuple[float, object]:
    """Seconds that a call takes, to the end of what it started on the device, and what it returns."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else int
    synchronize()
    start = time.perf_counter()
    returned = function(*arguments, **options)
    synchronize()
    return time.perf_counter() - start, returned


def random_model(device: torch.device, tiny: bool) -> HealthGPTForConditionalGeneration:
    """An M3 with random weights, made on the device; a head of zeros, so that it would draw code 0 everywhere."""
    text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4) if tiny else {}
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=56)
    if not tiny:
        vision = dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336
        )
    vqgan = dict(resolution=64, base_channels=32, num_codes=64, attention_resolutions=[]) if tiny else {}
    vqgan = HealthGPTVQGANConfig(**vqgan)
    rows = 32014 + vqgan.num_codes  # 40206 at full size, as published
    config = HealthGPTConfig(
        text_config=Phi3Config(**text, vocab_size=rows, sliding_window=2048),
        vision_config=CLIPVisionConfig(**vision, patch_size=14, hidden_act="quick_gelu"),
        vqgan_config=vqgan,
        tasks={
            "comprehension": dict(kind="text", rank=64, alpha=128, num_experts=4, vision_layer=-2),
            "generation": dict(
                kind="image", rank=256, alpha=512, num_experts=4, vision_layer=1, token_tables="generation"
            ),
        },
        image_token_id=rows,
        image_start_token_id=32011,
        image_code_offset=32012,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    torch.nn.init.zeros_(model.token_heads["generation"].weight)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    return model


class MadeUpImage(LogitsProcessor):
    """Writes the same image whatever the model predicts: code 0, and at random places code 1."""

    def __init__(self, model, prompt_length: int):
        self.prompt_length = prompt_length
        self.first = model.config.image_code_offset
        generator = torch.Generator().manual_seed(0)
        self.codes = (torch.rand(model.config.num_image_codes, generator=generator) < SURPRISES).long().tolist()

    def __call__(self, input_ids, scores):
        code = self.first + self.codes[input_ids.shape[1] - self.prompt_length]
        scores[:, code] = torch.finfo(scores.dtype).max
        return scores


class Bench:
    """
    Times a model that has been built on its device.

    Args:
        model (`HealthGPTForConditionalGeneration`): The model, whose passes are counted from now on.
        bandwidth (`float`): Bytes a second that its device reads at most.
        new_tokens (`int`): Tokens of an answer.
    """

    def __init__(self, model, bandwidth: float, new_tokens: int):
        self.model, self.bandwidth, self.new_tokens = model, bandwidth, new_tokens
        self.passes = 0
        prepare = model.prepare_inputs_for_generation

        @functools.wraps(prepare)
        def counted(*arguments, **options):
            self.passes += 1
            return prepare(*arguments, **options)

        model.prepare_inputs_for_generation = counted
        config = model.config
        ids = torch.arange(3, 40).tolist()
        ids = [1, *[config.image_token_id] * config.num_image_patches, *ids]
        size = config.vision_config.image_size
        self.prompt = torch.tensor([ids], device=model.device)
        self.pixel_values = torch.randn(1, 3, size, size, device=model.device, dtype=model.dtype)

    def answer(self, **options) -> dict:
        """Times an answer: all of it, without what its first token takes."""
        length = dict(min_new_tokens=self.new_tokens, max_new_tokens=self.new_tokens)
        call = functools.partial(self.run, self.prompt, task="comprehension", **options)
        first, *_ = call(**length)
        prompt, *_ = call(max_new_tokens=1)
        seconds, _, passes = call(**length)
        row = {"tokens_per_second": (self.new_tokens - 1) / (seconds - prompt)}
        return self.finish(row, first, seconds - prompt, passes, "comprehension")

    def draw(self, max_time: float | None = None, **options) -> dict:
        """Times a drawing; the second one, unless the first is stopped by its time."""
        start = torch.tensor([[self.model.config.image_start_token_id]], device=self.model.device)
        prompt = torch.cat([self.prompt, start], dim=1)
        call = functools.partial(
            self.run,
            prompt,
            task="generation",
            max_time=max_time,
            logits_processor=[MadeUpImage(self.model, prompt.shape[1])],
            **options,
        )
        first, drawn, passes = call()
        seconds = first
        if max_time is None:
            seconds, drawn, passes = call()
        num_codes = self.model.config.num_image_codes
        row = {"seconds_per_image": seconds * num_codes / drawn, "codes_per_pass": drawn / passes}
        return self.finish(row, first, seconds, passes, "generation")

    def run(self, input_ids, **options) -> tuple[float, int, int]:
        """Seconds, new tokens and passes of a call of `generate`."""
        self.passes = 0
        if "cache_implementation" in options:  # room for both kinds, so that neither is compiled twice
            options["max_cache_len"] = (
                self.prompt.shape[1] + 1 + max(self.new_tokens, self.model.config.num_image_codes)
            )
        seconds, sequences = timed(
            self.model.device,
            self.model.generate,
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=self.pixel_values,
            do_sample=False,
            **options,
        )
        return seconds, sequences.shape[1] - input_ids.shape[1], self.passes

    def finish(self, row: dict, first: float, seconds: float, passes: int, task: str) -> dict:
        """A row with what all have."""
        row["share_of_bandwidth"] = self.nbytes(task) * passes / seconds / self.bandwidth
        row["first_seconds"] = first
        if self.model.device.type == "cuda":
            row["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        return {name: float(f"{value:.3g}") for name, value in row.items()}

    def nbytes(self, task: str) -> int:
        """Bytes of the weights that a pass reads."""
        model = self.model
        tables = model.config.tasks[task].token_tables
        head = model.lm_head if tables is None else model.token_heads[tables]
        read = [
            weight
            for name, weight in model.model.language_model.named_parameters()
            if "embed_tokens" not in name and (".plugins." not in name or f".plugins.{task}." in name)
        ]
        return sum(weight.nbytes for weight in (head.weight, *read))


if __name__ == "__main__":
    main()
