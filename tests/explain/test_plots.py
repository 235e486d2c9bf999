"""The figures: what is drawn is what was given."""

import numpy as np
import pytest
import torch
from conftest import inputs_of

from healthgpt.explain.plots import MAX_TOKENS, as_picture, plot_attention, plot_routing


def images_of(figure):
    """Panel by panel, the arrays that are drawn in it; the last axes are the scale's."""
    return [[image.get_array() for image in axes.images] for axes in figure.axes[:-1]]


@pytest.mark.parametrize("num_experts", [1, 2, 5])
def test_routing_is_drawn_by_kind_of_linear_and_layer(num_experts, tmp_path):
    torch.manual_seed(0)
    kinds = ("self_attn.qkv_proj", "mlp.down_proj")
    weights = {
        f"layers.{layer}.{kind}": torch.randn(2, 9, num_experts).mul(4).softmax(-1)
        for layer in range(3)
        for kind in kinds
    }
    figure = plot_routing(weights)
    panels = images_of(figure)
    assert [axes.get_title() for axes in figure.axes[:-1]] == ["qkv_proj", "down_proj"]
    for [drawn], kind in zip(panels, kinds, strict=True):
        expected = [weights[f"layers.{layer}.{kind}"].mean(dim=(0, 1)).numpy() for layer in range(3)]
        np.testing.assert_array_equal(drawn, np.stack(expected))
    scales = [axes.images[0].norm for axes in figure.axes[:-1]]
    assert scales[0] is scales[1] and scales[0](1 / num_experts) == 0.5 and scales[0].vmin == 0
    assert scales[0].vmax >= max(drawn.max() for [drawn] in panels)
    figure.savefig(tmp_path / "routing.png")


@pytest.mark.parametrize("num_tokens", [1, 5, 8])
def test_attention_is_drawn_over_what_the_tower_sees(num_tokens, m3, tmp_path):
    checkpoint, _, processor = m3
    case = checkpoint.cases[0]
    [pixels] = inputs_of(processor, case)["pixel_values"]
    torch.manual_seed(0)
    attention = torch.rand(num_tokens, 4, 4) / 16
    sequence = torch.tensor([*case["input_ids"], 369, 19, 467])
    figure = plot_attention(processor, pixels, attention, sequence)
    [picture], *panels = images_of(figure)[: num_tokens + 1]
    settings = processor.image_processor
    again = (np.asarray(picture) - settings.image_mean) / settings.image_std
    np.testing.assert_allclose(again.transpose(2, 0, 1), pixels, atol=1e-5)
    for (grey, heat), expected in zip(panels, attention, strict=True):
        np.testing.assert_allclose(grey, picture.mean(axis=-1))
        np.testing.assert_array_equal(heat, expected.numpy())
    assert not any(images_of(figure)[num_tokens + 1 :])
    titles = [axes.get_title() for axes in figure.axes[1 : num_tokens + 1]]
    names = ["u", "re", "?", "<|end|>", "<|assistant|>", "ema", "'\\x10'", "<|end|>"][-num_tokens:]
    assert titles == [f"{name}\n{grid.sum():.0%}" for name, grid in zip(names, attention, strict=True)]
    # a token such as $$ is no formula
    assert not any(axes.title.get_parse_math() for axes in figure.axes[1 : num_tokens + 1])
    figure.savefig(tmp_path / "attention.png")


def test_of_a_long_answer_the_first_tokens_are_drawn(m3):
    checkpoint, _, processor = m3
    [pixels] = inputs_of(processor, checkpoint.cases[0])["pixel_values"]
    attention = torch.rand(1024, 4, 4) / 16
    sequence = torch.arange(100, 100 + 1024) % 400
    figure = plot_attention(processor, pixels, attention, torch.cat([torch.tensor([7, 8]), sequence]))
    assert figure.get_suptitle() == "tokens 1 to 47 of 1024"
    [_], *panels = images_of(figure)
    assert len(panels) == MAX_TOKENS
    for (_, heat), expected in zip(panels, attention, strict=False):
        np.testing.assert_array_equal(heat, expected.numpy())
    last = processor.decode([sequence[46]]).strip()
    assert figure.axes[MAX_TOKENS].get_title() == f"{last}\n{attention[46].sum():.0%}"
    picture = as_picture(figure)
    assert picture.width * picture.height < 5_000_000
    assert plot_attention(processor, pixels, attention[1000:], sequence).get_suptitle() == ""
