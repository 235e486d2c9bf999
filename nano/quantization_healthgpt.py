# Copyright 2026 The HealthGPT package authors.
# Licensed under the Apache License, Version 2.0 (see the file LICENSE).
"""Which linears quantisers leave alone, and what bitsandbytes needs on CPUs to load and save them."""

import copy

from torch import nn
from transformers.quantizers import AutoQuantizationConfig

from .errors_healthgpt import HealthGPTError
from .precision_healthgpt import linear


class UnquantizedLinear(nn.Linear):
    """
    A linear that keeps its dtype when bitsandbytes quantises: that replaces modules that are exactly `nn.Linear`.

    Projectors, heads and the vision tower are small or sensitive; only the language model's own linears stay plain.
    """

    def forward(self, input):
        return linear(input, self.weight, self.bias)


# The same for other quantisers, which take subclasses too: names as their `modules_to_not_convert` understands them.
UNQUANTIZED_MODULES = ("lm_head", "token_heads", r"(model\.)?(projectors|vision_tower|vqgan)")


def require_kernel(name: str, linear: nn.Module) -> None:
    """
    Raises:
        HealthGPTError: if a 4-bit linear of bitsandbytes has sizes that the kernel of this processor cannot take.
    """
    fits = linear.in_features % 64 == 0 and linear.out_features % 32 == 0
    if linear.weight.device.type == "cpu" and linear.support_avx512bf16_for_cpu and not fits:
        raise HealthGPTError(
            f"{name} has {linear.in_features} inputs and {linear.out_features} outputs, but the 4-bit kernel of this "
            "processor takes multiples of 64 and 32: load the model in 8 bits, or on a GPU."
        )


def keep_scales(linear: nn.Module) -> None:
    """
    Lets a 4-bit linear of bitsandbytes be saved as it was loaded, whatever happened since.

    On processors with AVX512-BF16 the first forward pass packs the weight in another order and rounds its scales. What
    bitsandbytes does when such a linear is saved puts the weight back, but not the scales.
    """
    state = linear.weight.quant_state
    scales = state.as_dict(packed=True)

    def restore(module, tensors, prefix, metadata):
        if module.weight.device.type == "cpu":
            tensors.update({f"{prefix}weight.{name}": tensor for name, tensor in scales.items()})
            module.weight.quant_state = type(state).from_dict(dict(scales), module.weight.device)

    linear.register_state_dict_post_hook(restore)


def keep_unquantized(settings):
    """
    A copy of a quantiser's settings that leaves alone what is no linear of the base, and what a user leaves alone by the names
    that the base gives them, such as `qkv_proj`: its linears are wrapped here.
    """
    if isinstance(settings, dict):
        settings = AutoQuantizationConfig.from_dict(settings)
    settings = copy.copy(settings)
    # bitsandbytes has a name of its own for the list, and needs no further names in it: see `UnquantizedLinear`.
    name, own = "llm_int8_skip_modules", ()
    if hasattr(settings, "modules_to_not_convert"):
        name, own = "modules_to_not_convert", UNQUANTIZED_MODULES
    listed = getattr(settings, name, None) or []
    if listed or own:
        # As expressions from the start: torchao is asked for names of parameters, which end in .weight.
        setattr(settings, name, [*listed, *(rf"(.*\.)?{module}\.base_layer" for module in listed), *own])
    return settings
