"""
Where every tensor of every published file goes.

A rule is a pattern of source names and the name it becomes, or None and the reason why it is dropped. A source name that
no rule covers is an error, and so is a tensor of the model that no source fills: see `merge.build_plan`.
"""

import re
from dataclasses import dataclass

LINEAR = r"(layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)"


@dataclass(frozen=True)
class Rule:
    """`pattern` matches a whole source name; `target` is its replacement, or None to drop it because of `reason`."""

    pattern: str
    target: str | None
    reason: str = ""

    def rename(self, name: str) -> str:
        return re.fullmatch(self.pattern, name).expand(self.target)


# Phi3ForCausalLM and Qwen2ForCausalLM
BASE = [
    Rule(r"model\.embed_tokens\.weight", "model.language_model.embed_tokens.weight"),
    Rule(r"lm_head\.weight", "lm_head.weight"),
    Rule(rf"model\.{LINEAR}\.(weight|bias)", r"model.language_model.\1.base_layer.\2"),
    Rule(r"model\.(layers\.\d+\.\w+_layernorm\.weight)", r"model.language_model.\1"),
    Rule(r"model\.(norm\.weight)", r"model.language_model.\1"),
    Rule(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", None, "follows from the configuration"),
]

TIED_HEAD = Rule(r"lm_head\.weight", None, "the same as the embeddings, to which it is tied")

# CLIPModel or CLIPVisionModel
VISION = [
    Rule(r"vision_model\.embeddings\.position_ids", None, "follows from the configuration"),
    Rule(r"(vision_model\..+)", r"model.vision_tower.\1"),
    Rule(r"text_model\..+|text_projection\.weight", None, "CLIP's text encoder is not used"),
    Rule(r"visual_projection\.weight|logit_scale", None, "CLIP's contrastive head is not used"),
]

# GumbelVQ of taming-transformers
VQGAN = [
    Rule(r"((?:encoder|decoder|quantize|quant_conv|post_quant_conv)\..+)", r"model.vqgan.\1"),
    Rule(r"loss\..+", None, "discriminator and perceptual loss of the VQGAN's own training"),
]


def plugin(task: str) -> list[Rule]:
    """Rules for `com_hlora_weights.bin` and `gen_hlora_weights.bin`."""
    return [
        Rule(
            rf"base_model\.model\.model\.{LINEAR}\.(lora_route|lora_A|lora_B)\.weight",
            rf"model.language_model.\1.plugins.{task}.\2.weight",
        ),
        Rule(r"base_model\.model\.model\.mm_projector\.(\d+)\.(weight|bias)", rf"model.projectors.{task}.\1.\2"),
    ]


def fusion(tables: str) -> list[Rule]:
    """Rules for `fusion_layer_weights.bin`."""
    return [
        Rule(r"base_model\.model\.model\.embed_tokens\.weight", f"model.token_embeddings.{tables}.weight"),
        Rule(r"base_model\.model\.lm_head\.weight", f"token_heads.{tables}.weight"),
    ]


def find(rules: list[Rule], name: str) -> Rule | None:
    """The rule that covers a source name, or None."""
    return next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
