"""Routing and attention of an answer at once."""

import torch

from .attention import attention_over_pictures
from .rerun import rerun
from .routing import trace_routing


def look_inside(
    model, inputs, sequences: torch.LongTensor, task: str | list[str] = "comprehension"
) -> tuple[dict[str, dict[str, torch.FloatTensor]], torch.FloatTensor | None]:
    """
    The routers' expert weights and the attention over the pictures, from one more forward pass over what `generate` returned.

    No other thread may use the model meanwhile, see [`attention_over_pictures`].

    Args:
        model (`HealthGPTForConditionalGeneration`): As `from_pretrained` loads it, not compiled.
        inputs (`BatchFeature`): What `generate` was given: `input_ids`, `attention_mask` and, with pictures, `pixel_values`.
        sequences (`torch.LongTensor` of shape `(batch, length)`): What it returned, one row for each prompt, prompts
            included.
        task (`str` or `list[str]`, defaults to `"comprehension"`): One name in `config.tasks`, or one per row.

    Returns:
        `tuple`: The weights that [`trace_routing`] yields, and what [`attention_over_pictures`] returns, `None` without
        pictures.

    Raises:
        HealthGPTError: if `sequences` do not continue the prompts.
    """
    with trace_routing(model) as routing:
        if inputs.get("pixel_values") is not None:
            attention = attention_over_pictures(model, inputs, sequences, task)
        else:
            attention = None
            rerun(model, inputs, sequences, task)
    return routing, attention
