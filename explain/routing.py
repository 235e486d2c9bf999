"""The routers' expert weights of every H-LoRA linear, per token."""

import threading
from collections import defaultdict
from contextlib import contextmanager

import torch
from transformers import GenerationConfig


@contextmanager
def trace_routing(model):
    """
    Records the expert weights of one `forward` or one `generate` that this thread runs in the block.

    ```python
    with trace_routing(model) as routing:
        sequences = model.generate(**inputs, task="comprehension")
    routing["comprehension"]["layers.0.self_attn.qkv_proj"]  # (1, sequences.shape[1] - 1, experts)
    ```

    Tasks have numbers of experts of their own, so the weights come by task. The rows are those of the batch that ran with
    it, in their order. The steps of `generate`, which needs its cache for that, are joined: position t belongs to the id
    `sequences[:, t]`. The last id is written and not run, so it has none. Positions that are padding, on the left of shorter
    prompts and after the end of shorter answers, hold what the router says there, which means nothing. With beams the rows
    are the beams, in the order that each step had them in.

    Args:
        model (`HealthGPTForConditionalGeneration` or `HealthGPTModel`): As `from_pretrained` loads it, not compiled.

    Yields:
        `dict[str, dict[str, torch.FloatTensor]]`: By task and by linear, named within the language model, the weights `(rows,
        tokens, experts)` in float32; those of a token sum to one. Filled when the block ends without an error.
    """
    steps = defaultdict(lambda: defaultdict(list))
    thread = threading.get_ident()

    def recorders(task, linear):
        def record(module, inputs, logits):
            if threading.get_ident() == thread:
                steps[task][linear].append(logits.detach().softmax(dim=-1, dtype=torch.float32))

        def restore_rows(module, inputs, output):
            if threading.get_ident() == thread:
                steps[task][linear].append(steps[task][linear].pop().view(*inputs[0].shape[:-1], -1))

        return record, restore_rows

    hooks = []
    for name, module in model.base_model.language_model.named_modules():
        if hasattr(module, "lora_route"):
            linear, _, task = name.rsplit(".", 2)
            record, restore_rows = recorders(task, linear)
            hooks.append(module.lora_route.register_forward_hook(record))
            hooks.append(module.register_forward_hook(restore_rows))
    weights = {}
    config = getattr(model, "generation_config", GenerationConfig())
    codes_per_pass = getattr(config, "codes_per_pass", None)
    config.codes_per_pass = 1  # passes over drafts hold tokens that are not written
    try:
        yield weights
    finally:
        config.codes_per_pass = codes_per_pass
        for hook in hooks:
            hook.remove()
    for task, linears in steps.items():
        weights[task] = {linear: torch.cat(pieces, dim=1) for linear, pieces in linears.items()}
