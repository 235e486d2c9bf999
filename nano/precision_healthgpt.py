# Copyright 2026 The HealthGPT package authors.
# Licensed under the Apache License, Version 2.0 (see the file LICENSE).
"""
The dtype that a part is computed in, where that is not the dtype of its weights.

A processor without instructions for bfloat16 or float16 takes many times as long for products and convolutions in them as in
float32. Parts that run once per image (vision tower, projectors, VQGAN) are computed in float32 there: their weights are
widened for the duration of a call and stay as they are. So are linears of the language model in passes over many tokens, a few
rows of their weights at a time.
"""

import torch
from torch import nn
from torch.nn import functional


def dtypes_with_instructions() -> set[torch.dtype]:
    """
    The floating-point dtypes that this processor multiplies in, as oneDNN sees it (`ONEDNN_MAX_CPU_ISA` limits it).

    oneDNN takes bfloat16 from AVX512 on, but without AVX512-BF16 it computes in float32 and converts back and forth.
    """
    found = {torch.float32, torch.float64}
    if not torch.backends.mkldnn.is_available():
        return found
    emulates = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
    if torch.ops.mkldnn._is_mkldnn_bf16_supported() and not emulates:
        found.add(torch.bfloat16)
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        found.add(torch.float16)
    return found


CPU_DTYPES = dtypes_with_instructions()
BLOCK = 2**20  # weights that are widened at a time: they stay in the processor's cache
FEWEST_TOKENS = 16  # from which on the products gain more than widening costs


def compute(module: nn.Module, inputs: torch.Tensor, **kwargs) -> torch.Tensor:
    """
    Calls a module in the dtype of its weights, or in float32 if this processor has no instructions for that dtype.

    While it runs in float32, a copy of its weights takes 4 bytes for each of them. Modules on other devices, and those that
    accelerate has offloaded, run as they are.

    Args:
        module (`nn.Module`): The module; all its parameters have one dtype.
        inputs (`torch.Tensor`): Its input, in any floating-point dtype.
        kwargs: Further arguments of the module.

    Returns:
        `torch.Tensor`: Its output, in the dtype that it was computed in.
    """
    weights = dict(module.named_parameters())
    dtype = next(iter(weights.values())).dtype
    if dtype in CPU_DTYPES or any(weight.device.type != "cpu" for weight in weights.values()):
        return module(inputs.to(dtype), **kwargs)
    widened = {name: weight.float() for name, weight in weights.items()}
    # What runs once more in the backward pass would find the weights as they are.
    checkpointed = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in checkpointed:
        part.gradient_checkpointing = False
    try:
        return torch.func.functional_call(module, widened, (inputs.float(),), kwargs)
    finally:
        for part in checkpointed:
            part.gradient_checkpointing = True


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """
    The product of a linear. Over many tokens, where this processor has no instructions for the dtype, it is computed in float32
    and rounded once. Where gradients are wanted it is torch's own product.

    Args:
        inputs (`torch.Tensor` of shape `(..., in_features)`): Inputs in the dtype of the weight.
        weight (`torch.Tensor` of shape `(out_features, in_features)`): The weight.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*): Added to the product.

    Returns:
        `torch.Tensor` of shape `(..., out_features)`: The product, in the dtype of the inputs.
    """
    if not is_widened(inputs, weight):
        return functional.linear(inputs, weight, bias)
    rows = max(1, BLOCK // weight.shape[1])
    wide, weights = inputs.float(), weight.split(rows)
    biases = [None] * len(weights) if bias is None else bias.float().split(rows)
    parts = [functional.linear(wide, part.float(), added) for part, added in zip(weights, biases, strict=True)]
    return torch.cat([part.to(inputs.dtype) for part in parts], dim=-1)


def is_widened(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """
    Whether [`linear`] computes a product in float32: not with weights of a class of their own, such as quantisers make, and not
    where torch compiles or exports it.
    """
    many = inputs.numel() >= FEWEST_TOKENS * inputs.shape[-1]
    if not many or inputs.dtype in CPU_DTYPES or inputs.dtype != weight.dtype or weight.device.type != "cpu":
        return False
    wants_gradients = torch.is_grad_enabled() and (inputs.requires_grad or weight.requires_grad)
    is_plain = type(weight) in (torch.Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    return is_plain and not wants_gradients


def call_linear(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Calls a linear, by [`linear`] where that gains something and nothing hangs on the module's calls."""
    plain = type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks)
    if plain and "forward" not in vars(module) and is_widened(inputs, module.weight):
        return linear(inputs, module.weight, module.bias)
    return module(inputs)
