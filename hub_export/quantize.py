"""
Writing a plan as a bitsandbytes checkpoint, linear by linear, and reading back what was written.

Only the linears of the language model are quantised; `UnquantizedLinear` tells bitsandbytes the same when the checkpoint is
loaded.
"""

import importlib.util
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import BitsAndBytesConfig

from .confine import CheckpointError
from .plan import Plan, Transfer
from .write import Advance, save_tensors

QUANTIZATIONS = ("4bit", "8bit")
MAX_QUANTIZED_SHARD_BYTES = 5 * 10**8  # before quantising; what comes of them is held in memory
BASE_WEIGHT = ".base_layer.weight"
BYTES_PER_WEIGHT = {"4bit": 0.52, "8bit": 1.01}  # with their scales; rounded up


def require_bitsandbytes(quantize: str) -> None:
    """
    Raises:
        CheckpointError: if the kind of quantisation is unknown or the library is not installed.
    """
    if quantize not in QUANTIZATIONS:
        raise CheckpointError(f"There is no quantisation {quantize!r}; choose one of {', '.join(QUANTIZATIONS)}.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CheckpointError("Quantising needs the package bitsandbytes: pip install healthgpt[quantization].")


def quantization_config(quantize: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What loading the checkpoint needs to know: 8 bits, or NF4 with double quantisation."""
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def stored_bytes(plan: Plan, quantize: str | None) -> int:
    """About how much room the weights of a plan take on the disk."""
    if quantize is None:
        return plan.total_bytes
    linears = sum(plan.nbytes(transfer) for transfer in plan.transfers if transfer.target.endswith(BASE_WEIGHT))
    return plan.total_bytes - linears + int(linears / plan.config.dtype.itemsize * BYTES_PER_WEIGHT[quantize])


def quantized_tensors(plan: Plan, transfer: Transfer, quantize: str) -> dict[str, torch.Tensor]:
    """A tensor of the plan as it is stored: as it is, or what bitsandbytes makes of the weight of a linear."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    weight = transfer.read(plan.config.dtype)
    if not transfer.target.endswith(BASE_WEIGHT):
        return {transfer.target: weight}
    if quantize == "8bit":
        linear = Linear8bitLt(1, 1, bias=False, has_fp16_weights=False)
        linear.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    else:
        linear = Linear4bit(1, 1, bias=False, quant_type="nf4")
        linear.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=linear).to("cpu")
    prefix = transfer.target.removesuffix("weight")
    return {f"{prefix}{name}": tensor for name, tensor in linear.state_dict().items()}


def write_quantized_shard(plan: Plan, transfers: list[Transfer], path: Path, advance: Advance, quantize: str) -> None:
    """Writes one weight file; it has its name only once it is whole."""
    tensors = {}
    for transfer in transfers:
        tensors |= quantized_tensors(plan, transfer, quantize)
        advance(plan.nbytes(transfer))
    unfinished = path.with_suffix(".unfinished")
    save_tensors(tensors, unfinished)
    unfinished.rename(path)


def verify_quantized_shard(plan: Plan, transfers: list[Transfer], path: Path, advance: Advance, quantize: str) -> None:
    """
    Quantises the sources of a written file once more and compares every tensor, bit for bit.

    Raises:
        CheckpointError: if they differ.
    """
    with safe_open(path, framework="pt") as file:
        unread = set(file.keys())
        for transfer in transfers:
            for name, tensor in quantized_tensors(plan, transfer, quantize).items():
                if name not in unread or not torch.equal(file.get_tensor(name), tensor):
                    raise CheckpointError(
                        f"{name} in {path} differs from what {transfer.origin} gives: the source was changed meanwhile, "
                        "or the disk is not in order."
                    )
                unread.remove(name)
            advance(plan.nbytes(transfer))
