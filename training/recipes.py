"""
The stages of HealthGPT's training as recipes (paper section 4.3 and its table of hyper-parameters).

    1 alignment     each task alone: pictures become words of the language model
    2 fusion        all tasks together: one pair of token tables with the image codes in it
    3 instruction   each task alone: what users ask for

What a recipe does not name is frozen. AdamW without weight decay and sequences of 2048 tokens throughout; the paper gives no
number of epochs and no length of the warm-up.
"""

from dataclasses import dataclass, replace

from ..hub_export.presets import PRESETS


@dataclass(frozen=True)
class Recipe:
    """
    Hyper-parameters of one stage.

    Args:
        learning_rates (`dict[str, float]`): Peak learning rate of each part that is trained: `"projector"`, `"plugin"`
            (the H-LoRA of every linear), `"token_tables"`.
        batch_size (`int`): Samples of one optimiser step, over all processes.
        dropout (`float`): Share of the inputs of H-LoRA's factors that is zeroed.
        schedule (`str`): Name of a schedule of transformers.
    """

    learning_rates: dict[str, float]
    batch_size: int
    dropout: float = 0.05
    schedule: str = "constant_with_warmup"


STAGES = ("alignment", "fusion", "instruction")

FUSION = Recipe({"token_tables": 2e-4}, 32, schedule="constant")
RECIPES = {
    ("alignment", "text"): Recipe({"projector": 1e-3}, 256, dropout=0.0),
    ("alignment", "image"): Recipe({"projector": 2e-5, "plugin": 2e-4}, 64),
    ("fusion", "text"): FUSION,  # both kinds are fused together
    ("fusion", "image"): FUSION,
    ("instruction", "text"): Recipe({"projector": 2e-5, "plugin": 2e-4}, 128),
    ("instruction", "image"): Recipe({"projector": 2e-5, "plugin": 2e-4}, 64),
}


def recipe_of(stage: str, kind: str, config) -> Recipe:
    """
    The recipe of a stage for tasks of a kind, as published for a model of this size: the first stage of drawing of an L14 runs
    at half the rate.

    Args:
        stage (`str`): One of `STAGES`.
        kind (`str`): `"text"` or `"image"`.
        config (`HealthGPTConfig`): Of the model.
    """
    recipe = RECIPES[stage, kind]
    sizes = config.text_config.num_hidden_layers, config.text_config.hidden_size
    if (stage, kind) == ("alignment", "image") and sizes == PRESETS["l14"].sizes:
        return replace(recipe, learning_rates=recipe.learning_rates | {"plugin": 1e-4})
    return recipe
