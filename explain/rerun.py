"""One forward pass over what `generate` has written."""

import torch

from ..errors_healthgpt import HealthGPTError


@torch.no_grad()
def rerun(model, inputs, sequences: torch.LongTensor, task: str | list[str]) -> None:
    """
    Runs prompts and answers once more, for those who watch. The last token of an answer is written and never read.

    Args:
        model (`HealthGPTForConditionalGeneration`): As `from_pretrained` loads it.
        inputs (`BatchFeature`): What `generate` was given: `input_ids`, `attention_mask` and, with pictures, `pixel_values`.
        sequences (`torch.LongTensor` of shape `(batch, length)`): What it returned, one row for each prompt, prompts
            included.
        task (`str` or `list[str]`): One name in `config.tasks`, or one per row.

    Raises:
        HealthGPTError: if `sequences` do not continue the prompts.
    """
    prompt_length = inputs["input_ids"].shape[1]
    if not torch.equal(sequences[:, :prompt_length], inputs["input_ids"]):
        raise HealthGPTError(
            "The sequences do not start with the prompts of the inputs: give what generate returned, whole."
        )
    new_tokens = sequences.shape[1] - prompt_length
    if new_tokens == 0:
        raise HealthGPTError("The answer is empty: the sequences end where the prompts of the inputs do.")
    model(
        input_ids=sequences[:, :-1],
        pixel_values=inputs.get("pixel_values"),
        attention_mask=torch.nn.functional.pad(inputs["attention_mask"], (0, new_tokens - 1), value=1),
        task=task,
        use_cache=False,
        logits_to_keep=1,
    )
