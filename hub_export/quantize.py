"""Turning a merged checkpoint into a bitsandbytes one."""

import importlib.util
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import BitsAndBytesConfig

from ..modeling_healthgpt import HealthGPTForConditionalGeneration
from .sources import CheckpointError

QUANTIZATIONS = ("4bit", "8bit")


def require_bitsandbytes(quantize: str) -> None:
    """
    Raises:
        CheckpointError: if the kind of quantisation is unknown or the library is not installed.
    """
    if quantize not in QUANTIZATIONS:
        raise CheckpointError(f"There is no quantisation {quantize!r}; choose one of {', '.join(QUANTIZATIONS)}.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CheckpointError("Quantising needs the package bitsandbytes: pip install healthgpt[quantization].")


def quantize_checkpoint(merged: Path, folder: Path, quantize: str, dtype: torch.dtype) -> None:
    """
    Writes the quantised weights and configuration of a merged checkpoint into `folder` and removes the merged one.

    4 bit is NF4 with double quantisation.

    Only the linears of the language model are quantised; see `UnquantizedLinear` for the others.
    """
    if quantize == "4bit":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    model = HealthGPTForConditionalGeneration.from_pretrained(merged, quantization_config=settings, dtype=dtype)
    quantized = folder / "quantized"
    model.save_pretrained(quantized, max_shard_size="5GB")
    for path in quantized.iterdir():
        path.replace(folder / path.name)
    quantized.rmdir()
    compare_unquantized(merged, folder)
    shutil.rmtree(merged)


def compare_unquantized(merged: Path, folder: Path) -> None:
    """
    Compares every tensor that is not quantised with the merged checkpoint, bit for bit.

    Raises:
        CheckpointError: if they differ.
    """
    written = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            written |= dict.fromkeys(file.keys(), path)
    for path in merged.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name.endswith(".base_layer.weight"):
                    continue
                with safe_open(written[name], framework="pt") as other:
                    if not torch.equal(file.get_tensor(name), other.get_tensor(name)):
                        raise CheckpointError(
                            f"{name} in {written[name]} differs from its source: is the disk in order?"
                        )
