"""The published hyper-parameters."""

import pytest

from healthgpt.training import recipe_of


@pytest.mark.parametrize(
    "stage, kind, rates, batch_size",
    [
        ("alignment", "text", {"projector": 1e-3}, 256),
        ("alignment", "image", {"projector": 2e-5, "plugin": 2e-4}, 64),
        ("fusion", "text", {"token_tables": 2e-4}, 32),
        ("instruction", "text", {"projector": 2e-5, "plugin": 2e-4}, 128),
        ("instruction", "image", {"projector": 2e-5, "plugin": 2e-4}, 64),
    ],
)
def test_rates_and_batches(m3, stage, kind, rates, batch_size):
    config = m3[1].config
    recipe = recipe_of(stage, kind, config)
    assert (recipe.learning_rates, recipe.batch_size) == (rates, batch_size)


def test_the_first_stage_of_drawing_of_an_l14(m3, monkeypatch):
    config = m3[1].config
    monkeypatch.setattr(config.text_config, "num_hidden_layers", 40)
    assert recipe_of("alignment", "image", config).learning_rates == {"projector": 2e-5, "plugin": 1e-4}
    assert recipe_of("instruction", "image", config).learning_rates["plugin"] == 2e-4
