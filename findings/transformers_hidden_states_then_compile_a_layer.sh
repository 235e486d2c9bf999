#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0, seen on 2026-11-28 (CPU).
#
# A model that has once been called with output_hidden_states=True keeps forward hooks on its layers. They read a ContextVar,
# which torch.compile cannot trace. The model as a whole still compiles with fullgraph=True, because its own forward tells the
# hooks that a compilation is going on; a single layer, which compiled before that call, does not any more:
#
#   layer before: compiles
#   model after: compiles
#   layer after: Unsupported
#
# Hurt are regional compilation (layer by layer), pipelines that call blocks themselves, and vision towers of which only the
# first blocks run. The first call that asks for hidden states decides, in whatever thread or part of a program it is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cat > "$folder/try.py" <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
ids, states = torch.tensor([[1, 2, 3]]), torch.randn(1, 3, 32)
layer, rotary = model.model.layers[0], model.model.rotary_emb(states, torch.arange(3)[None])


def outcome(function, inputs):
    torch._dynamo.reset()
    try:
        torch.compile(function, fullgraph=True, backend="eager")(inputs)
    except torch._dynamo.exc.Unsupported as error:
        assert "ContextVar" in str(error)
        return "Unsupported"
    return "compiles"


with torch.no_grad():
    print("layer before:", outcome(lambda inputs: layer(inputs, position_embeddings=rotary), states))
    model(ids, output_hidden_states=True)
    print("model after:", outcome(model.forward, ids))
    print("layer after:", outcome(lambda inputs: layer(inputs, position_embeddings=rotary), states))
PYTHON
"$folder/venv/bin/python" "$folder/try.py" 2> "$folder/log" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
layer before: compiles
model after: compiles
layer after: Unsupported
SEEN
