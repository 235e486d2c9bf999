#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0, seen on 2026-11-28.
#
# A cache says of itself whether it can be cropped, which is what code that drafts tokens and takes them back asks. Of a model with a
# sliding window the answer is yes, whatever was read so far. It can be cropped while the window is not full; from then on only if
# `activate_past_recording()` was called before the tokens were read, and nothing in the answer tells whether it was. So drafting
# works with short prompts and raises with long ones:
#
#   no window, 12 tokens, not recording: croppable True, crop leaves 9
#   window of 8, 5 tokens, not recording: croppable True, crop leaves 2
#   window of 8, 12 tokens, not recording: croppable True, crop raises RuntimeError
#   window of 8, 12 tokens, recording: croppable True, crop leaves 9
#
# Ask `any(cache.is_sliding)` too, and record from the first pass on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0
cat > "$folder/try.py" <<'PYTHON'
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

SIZES = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=2, num_key_value_heads=2)


@torch.no_grad()
def attempt(window, tokens, records):
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)).eval()
    cache = DynamicCache(config=model.config)
    if records:
        cache.activate_past_recording()
    model(torch.arange(tokens)[None], cache=cache)
    croppable = cache.is_croppable
    try:
        cache.crop(-3)
        result = f"leaves {cache.get_seq_length()}"
    except RuntimeError as error:
        result = f"raises {type(error).__name__}"
    name = "no window" if window is None else f"window of {window}"
    recording = "recording" if records else "not recording"
    print(f"{name}, {tokens} tokens, {recording}: croppable {croppable}, crop {result}")


attempt(None, 12, False)
attempt(8, 5, False)
attempt(8, 12, False)
attempt(8, 12, True)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
no window, 12 tokens, not recording: croppable True, crop leaves 9
window of 8, 5 tokens, not recording: croppable True, crop leaves 2
window of 8, 12 tokens, not recording: croppable True, crop raises RuntimeError
window of 8, 12 tokens, recording: croppable True, crop leaves 9
SEEN
