#!/usr/bin/env bash
# transformers 5.24.0 with torchao 0.18.0 and bitsandbytes 0.50.2, seen on 2026-11-28 (CPU).
#
# modules_to_not_convert of TorchAoConfig does nothing for a module's short name. The library asks one and the same function
# for all quantisers whether a name is on the list, by prefix, expression or suffix; bitsandbytes asks with the names of modules,
# torchao with the names of parameters, which end in .weight, so that the suffix never fits. "q_proj" keeps q_proj whole with
# bitsandbytes and is quantised with torchao, without a word; and since a list was given, the head is quantised as well:
#
#   bitsandbytes, q_proj: down_proj gate_proj k_proj lm_head o_proj up_proj v_proj
#   torchao, q_proj: down_proj gate_proj k_proj lm_head o_proj q_proj up_proj v_proj
#
# The whole name, or an expression from the start such as ".*q_proj", works with both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 torchao==0.18.0 bitsandbytes==0.50.2 accelerate==1.15.0
cat > "$folder/try.py" <<'PYTHON'
import sys

from torchao.quantization import Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(sys.argv[1])


def quantised(settings):
    model = LlamaForCausalLM.from_pretrained(sys.argv[1], quantization_config=settings)
    found = []
    for name, module in model.named_modules():
        kinds = {type(module).__name__, type(getattr(module, "weight", None)).__name__}
        if kinds & {"Linear8bitLt", "Int8Tensor"}:
            found.append(name.split(".")[-1])
    return " ".join(sorted(found))


for skipped in ("q_proj", ".*q_proj"):
    print(f"bitsandbytes, {skipped}:", quantised(BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[skipped])))
    print(f"torchao, {skipped}:", quantised(TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[skipped])))
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder/model" 2> "$folder/log" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
bitsandbytes, q_proj: down_proj gate_proj k_proj lm_head o_proj up_proj v_proj
torchao, q_proj: down_proj gate_proj k_proj lm_head o_proj q_proj up_proj v_proj
bitsandbytes, .*q_proj: down_proj gate_proj k_proj lm_head o_proj up_proj v_proj
torchao, .*q_proj: down_proj gate_proj k_proj lm_head o_proj up_proj v_proj
SEEN
