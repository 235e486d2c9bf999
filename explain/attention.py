"""The attention of an answer's tokens over the pictures of its prompt."""

import torch

from ..errors_healthgpt import HealthGPTError
from .rerun import rerun


def attention_over_pictures(
    model,
    inputs,
    sequences: torch.LongTensor,
    task: str | list[str] = "comprehension",
    layer: int | None = None,
) -> torch.FloatTensor:
    """
    How much attention went to every patch of the pictures when each new token was written.

    Runs what `generate` returned once more, in one forward pass with eager attention, the only kind that knows its weights; the
    implementation that the language model had is put back. No other thread may use the model meanwhile. One layer's weights
    are held at a time, so that long answers and drawings fit.

    Args:
        model (`HealthGPTForConditionalGeneration`): As `from_pretrained` loads it.
        inputs (`BatchFeature`): What `generate` was given: `input_ids`, `attention_mask` and `pixel_values`.
        sequences (`torch.LongTensor` of shape `(batch, length)`): What it returned, one row for each prompt, prompts
            included.
        task (`str` or `list[str]`, defaults to `"comprehension"`): One name in `config.tasks`, or one per row.
        layer (`int`, *optional*): Index of the decoder layer to look at. `None` means the mean of all.

    Returns:
        `torch.FloatTensor` of shape `(num_images, new tokens, grid, grid)`: In the order of `pixel_values`, the mean over the
        heads. Entry t is of the position that wrote new token t, which is the one before it; a sum over the grid is the share
        of its attention that went to the picture. What follows the end of a shorter answer means nothing.

    Raises:
        HealthGPTError: if there is no picture, or `sequences` do not continue the prompts.
    """
    input_ids = inputs["input_ids"]
    prompt_length = input_ids.shape[1]
    if inputs.get("pixel_values") is None:
        raise HealthGPTError(
            "There is no picture whose attention could be looked at: the inputs have no pixel_values."
        )
    language_model = model.model.language_model
    layers = language_model.layers if layer is None else [language_model.layers[layer]]
    rows, columns = (input_ids == model.config.image_token_id).nonzero(as_tuple=True)
    total = 0

    def add(module, inputs, outputs):
        nonlocal total
        weights = outputs[1][:, :, prompt_length - 1 :].float().mean(dim=1)
        total = total + weights[rows.to(weights.device), :, columns.to(weights.device)].to(sequences.device)

    implementation = language_model.config._attn_implementation
    hooks = [block.self_attn.register_forward_hook(add) for block in layers]
    language_model.set_attn_implementation("eager")
    try:
        rerun(model, inputs, sequences, task)
    finally:
        language_model.set_attn_implementation(implementation)
        for hook in hooks:
            hook.remove()
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    grids = (total / len(layers)).unflatten(0, (-1, side * side))
    return grids.transpose(1, 2).unflatten(-1, (side, side))
