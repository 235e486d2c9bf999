"""The published hyper-parameters."""

import inspect
from dataclasses import replace

import pytest

from healthgpt.app.train import train
from healthgpt.training import RECIPES, STAGES, Recipe, TrainingCollator, recipe_of

PLUGIN = {"projector": 2e-5, "plugin": 2e-4}
PUBLISHED = {
    ("alignment", "text"): Recipe({"projector": 1e-3}, 256, 0.0, "constant_with_warmup"),
    ("alignment", "image"): Recipe(PLUGIN, 64, 0.05, "constant_with_warmup"),
    ("fusion", "text"): Recipe({"token_tables": 2e-4}, 32, 0.05, "constant"),
    ("fusion", "image"): Recipe({"token_tables": 2e-4}, 32, 0.05, "constant"),
    ("instruction", "text"): Recipe(PLUGIN, 128, 0.05, "constant_with_warmup"),
    ("instruction", "image"): Recipe(PLUGIN, 64, 0.05, "constant_with_warmup"),
}


@pytest.mark.parametrize("stage, kind", PUBLISHED)
def test_recipes_are_the_published_ones(m3, stage, kind):
    assert recipe_of(stage, kind, m3[1].config) == PUBLISHED[stage, kind]
    assert {stage for stage, _ in RECIPES} == set(STAGES) and len(RECIPES) == len(PUBLISHED)


def test_sequences_have_2048_tokens(m3):
    assert TrainingCollator(m3[2]).max_length == 2048
    assert inspect.signature(train).parameters["max_length"].default == 2048


def test_the_first_stage_of_drawing_of_an_l14(m3, monkeypatch):
    config = m3[1].config
    monkeypatch.setattr(config.text_config, "num_hidden_layers", 40)
    assert recipe_of("alignment", "image", config) == PUBLISHED["alignment", "image"]  # another model of 40 layers
    monkeypatch.setattr(config.text_config, "hidden_size", 5120)
    slower = replace(PUBLISHED["alignment", "image"], learning_rates={"projector": 2e-5, "plugin": 1e-4})
    assert recipe_of("alignment", "image", config) == slower
    assert recipe_of("instruction", "image", config) == PUBLISHED["instruction", "image"]
