"""
Exports HealthGPT at full size from synthetic files with the published names, shapes and dtypes.

    python -m healthgpt.benchmarks.full_size m3 --folder /tmp/full --run
    python -m healthgpt.benchmarks.full_size l14 --folder /tmp/full --quantize 4bit --run
    python -m healthgpt.benchmarks.full_size xl32 --folder /tmp/full

Makes the files if they are not there, exports them in a process of its own, copies the result with `cp`, and prints one JSON
line: seconds per stage, peak memory, speed beside that of `cp`, bytes beside those of the bare base. With `--run` the checkpoint
is then loaded, answers and draws once. M3's files hold random numbers; those of L14 and XL32 are sparse files of zeros, which take no room on the disk.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path

import torch
import yaml
from PIL import Image

from .. import HealthGPTForConditionalGeneration, HealthGPTProcessor
from ..conversations import conversation, prepare
from ..hub_export import ExportSources
from ..hub_export import export as export_checkpoint
from .memory import Clock, gigabytes, in_own_process

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
PLUGINS = {
    "m3": {"comprehension": "m3_com_hlora_weights", "generation": "m3_gen_hlora_weights"},
    "l14": {"comprehension": "l14_com_hlora_weights_phi4"},
    "xl32": {"comprehension": "xl32_com_hlora_weights_QWEN_32B"},
}
# Tokens before those that the export adds; the last ones are special.
VOCABULARY = {"l14": (100352, "GPT2Tokenizer"), "xl32": (151665, "Qwen2Tokenizer")}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"]
SHARD_BYTES = 5 * 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=PLUGINS)
    parser.add_argument("--folder", type=Path, required=True, help="where the files are made")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="holds checkpoint_manifests.json")
    parser.add_argument("--base-format", choices=["safetensors", "bin"], default="safetensors")
    parser.add_argument("--quantize", choices=["8bit", "4bit"], help="as in healthgpt export")
    parser.add_argument("--run", action="store_true", help="load the checkpoint, answer and draw once")
    arguments = parser.parse_args()
    manifests = json.loads((arguments.shared / "checkpoint_manifests.json").read_text())
    source = arguments.folder / f"{arguments.model}-{arguments.base_format}"
    output = arguments.folder / f"HealthGPT-{arguments.model}"
    if not source.exists():
        made = source.with_suffix(".making")
        shutil.rmtree(made, ignore_errors=True)
        make_files(made, arguments.model, arguments.base_format, manifests, arguments.shared)
        made.rename(source)
    shutil.rmtree(output, ignore_errors=True)
    result = {"model": arguments.model, "base_format": arguments.base_format}
    os.sync()  # neither waits for what was written before it
    result |= in_own_process(export, source, output, arguments.quantize)
    os.sync()
    result["cp_seconds"] = time_cp(output)
    base = manifests["files"][f"{arguments.model}_base"].values()
    base = sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in base)
    result["bytes_beside_base"] = round(result["gigabytes"] * 1e9 / base, 2)
    if arguments.quantize is None:  # quantising takes longer than the disk
        result["speed_beside_cp"] = round(result["cp_seconds"] / result["Writing_seconds"], 2)
    if arguments.run:
        result |= in_own_process(run, output)
    print(json.dumps(result))


def peak_gigabytes() -> float:
    return round(gigabytes("VmHWM"), 3)


def export(source: Path, output: Path, quantize: str | None) -> dict:
    optional = {
        "generation": source / "gen.bin",
        "fusion": source / "fusion.bin",
        "vqgan": source / "last.ckpt",
        "vqgan_config": source / "model.yaml",
    }
    optional = {name: path for name, path in optional.items() if path.exists()}
    stages = []

    def progress(stage, total):
        stages.append((stage, time.perf_counter()))
        return lambda nbytes: None

    start = time.perf_counter()
    export_checkpoint(
        ExportSources(source / "base", source / "vision", source / "com.bin", **optional),
        output,
        quantize=quantize,
        skip_forward=True,
        progress=progress,
    )
    ends = [begin for _, begin in stages[1:]] + [time.perf_counter()]
    result = {f"{stage}_seconds": round(end - begin, 1) for (stage, begin), end in zip(stages, ends, strict=True)}
    nbytes = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    result |= {"seconds": round(time.perf_counter() - start, 1), "gigabytes": round(nbytes / 1e9, 2)}
    return result | {"peak_gigabytes": peak_gigabytes()}


def run(folder: Path) -> dict:
    start = time.perf_counter()
    model = HealthGPTForConditionalGeneration.from_pretrained(folder)
    processor = HealthGPTProcessor.from_pretrained(folder)
    result = {"load_seconds": round(time.perf_counter() - start, 1), "loaded_gigabytes": peak_gigabytes()}
    picture = Image.radial_gradient("L")
    for task, settings in model.config.tasks.items():
        inputs = prepare(processor, conversation([picture], "Reconstruct the image."), task)
        clock = Clock()
        start = time.perf_counter()
        sequences = model.generate(**inputs, task=task, max_new_tokens=32, min_new_tokens=32, streamer=clock)
        times = clock.times[1:]  # the first call brings the prompt
        result[f"{task}_first_token_seconds"] = round(times[0] - start, 2)
        result[f"{task}_tokens_per_second"] = round((len(times) - 1) / (times[-1] - times[0]), 2)
        if settings.kind == "image":
            pixels = model.decode_image_tokens(sequences)
            result["picture"] = list(pixels.shape)
    return result | {"run_peak_gigabytes": peak_gigabytes()}


def time_cp(folder: Path) -> float:
    """Seconds that `cp` takes for the same bytes; where the disk cannot hold them twice, one file after the other."""
    copy = folder.with_name("copy")
    copy.mkdir()
    files = sorted(folder.glob("*.safetensors"))
    keep = shutil.disk_usage(folder).free > 1.1 * sum(path.stat().st_size for path in files)
    seconds = 0.0
    for path in files:
        start = time.perf_counter()
        subprocess.run(["cp", path, copy / path.name], check=True)
        seconds += time.perf_counter() - start
        if not keep:
            (copy / path.name).unlink()
    shutil.rmtree(copy)
    return round(seconds, 1)


def make_files(folder: Path, model: str, base_format: str, manifests: dict, shared: Path) -> None:
    files, configs = manifests["files"], manifests["configs"]
    make = random_tensor if model == "m3" else None
    (folder / "base").mkdir(parents=True)
    (folder / "vision").mkdir()
    write_json(folder / "base/config.json", configs[model])
    write_sharded(folder / "base", files[f"{model}_base"], base_format, make)
    if model == "m3":
        for path in (shared / "golden/phi3_tokenization/tokenizer").iterdir():
            shutil.copyfile(path, folder / "base" / path.name)
    else:
        write_vocabulary(folder / "base", *VOCABULARY[model])

    write_json(folder / "vision/config.json", {"model_type": "clip", "vision_config": configs["vision"]})
    size = configs["vision"]["image_size"]
    write_json(
        folder / "vision/preprocessor_config.json",
        {
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )
    torch.save(tensors_of(files["clip-vit-large-patch14-336"]), folder / "vision/pytorch_model.bin")
    for short, name in {"com": "comprehension", "gen": "generation"}.items():
        if name in PLUGINS[model]:
            torch.save(tensors_of(files[PLUGINS[model][name]]), folder / f"{short}.bin")
    if model == "m3":
        torch.save(tensors_of(files["m3_fusion_layer_weights"]), folder / "fusion.bin")
        torch.save({"state_dict": tensors_of(files["vqgan_gumbel_f8_8192"])}, folder / "last.ckpt")
        shape = dict(z_channels=256, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 1, 2, 4])
        shape |= dict(num_res_blocks=2, attn_resolutions=[32])
        params = {"n_embed": 8192, "embed_dim": 256, "ddconfig": shape}
        (folder / "model.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


BLOCK = torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 0.02


def random_tensor(name: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Weights of a plausible size: drawing 10 GB of true noise would take longer than the export."""
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, dtype=dtype)
    count = math.prod(shape)
    start = hash_of(name) % 1000
    block = BLOCK[start : start + count].to(dtype, copy=True)
    return block.repeat(-(-count // len(block)))[:count].clone().view(shape)


def hash_of(name: str) -> int:
    return sum(ord(letter) * (index + 1) for index, letter in enumerate(name))


def tensors_of(manifest: dict) -> dict[str, torch.Tensor]:
    return {name: random_tensor(name, shape, DTYPES[dtype]) for name, (dtype, shape) in manifest.items()}


def write_sharded(folder: Path, manifest: dict, base_format: str, make) -> None:
    """A base as the Hub has it: shards of 5 GB and their index; without `make`, sparse files of zeros."""
    shards, size = [{}], 0
    for name, (dtype, shape) in manifest.items():
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape)
        size += nbytes
    weight_map = {}
    stem, ending = ("model", "safetensors") if base_format == "safetensors" else ("pytorch_model", "bin")
    for number, shard in enumerate(shards, 1):
        path = folder / f"{stem}-{number:05d}-of-{len(shards):05d}.{ending}"
        weight_map |= dict.fromkeys(shard, path.name)
        if base_format == "bin":
            torch.save(tensors_of(shard), path)
        else:
            write_safetensors(path, shard, make)
    write_json(folder / f"{stem}.{ending}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_safetensors(path: Path, shard: dict, make) -> None:
    header, offset = {}, 0
    for name, (dtype, shape) in shard.items():
        end = offset + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if make is None:
            file.truncate(8 + len(text) + offset)
            return
        for name, (dtype, shape) in shard.items():
            file.write(make(name, shape, DTYPES[dtype]).view(torch.uint8).numpy())


def write_vocabulary(folder: Path, count: int, tokenizer_class: str) -> None:
    """A byte-level vocabulary of the true size: the bytes, then words that no merge leads to."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = sorted(ByteLevel.alphabet())
    words += [f"word{index}" for index in range(count - len(SPECIAL) - len(words))]
    write_json(folder / "vocab.json", {word: index for index, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {
        str(len(words) + index): {"content": token, "normalized": False, "special": True}
        for index, token in enumerate(SPECIAL)
    }
    settings = {"tokenizer_class": tokenizer_class, "added_tokens_decoder": added, "model_max_length": 16384}
    settings |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", settings)


if __name__ == "__main__":
    main()
