"""Figures of what `trace_routing` and `attention_over_pictures` give. Needs matplotlib (`pip install healthgpt[plot]`)."""

import io
from collections import defaultdict

import torch
from matplotlib import colormaps
from matplotlib.colors import ListedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

ROWS, COLUMNS = 8, 6  # panels of attention at most
MAX_TOKENS = ROWS * COLUMNS - 1  # beside the picture

# The brighter part of inferno; what gets no attention stays transparent.
HEAT = ListedColormap(
    [(*colormaps["inferno"](0.4 + 0.6 * share)[:3], 0.9 * share**0.5) for share in torch.linspace(0, 1, 256).tolist()]
)


def plot_inside(
    processor,
    inputs,
    sequences: torch.LongTensor,
    routing: dict[str, torch.FloatTensor],
    attention: torch.FloatTensor | None,
) -> list[Figure]:
    """
    Draws what `look_inside` gives of one conversation.

    Args:
        processor (`HealthGPTProcessor`): The checkpoint's.
        inputs (`BatchFeature`): What `generate` was given.
        sequences (`torch.LongTensor` of shape `(1, length)`): What it returned.
        routing (`dict[str, torch.FloatTensor]`): The weights of the conversation's task.
        attention (`torch.FloatTensor` of shape `(num_images, new tokens, grid, grid)`, *optional*): `None` without pictures.

    Returns:
        `list[Figure]`: As [`plot_routing`], and as [`plot_attention`] for each picture.
    """
    figures = [plot_routing(routing)]
    if attention is not None:
        for pixels, grids in zip(inputs["pixel_values"], attention, strict=True):
            figures.append(plot_attention(processor, pixels, grids, sequences[0]))
    return figures


def as_picture(figure: Figure) -> Image.Image:
    """
    A figure as pixels, 150 of them to an inch.

    Args:
        figure (`Figure`): Any figure of matplotlib.

    Returns:
        `PIL.Image.Image`: Of mode `RGBA`.
    """
    file = io.BytesIO()
    figure.savefig(file, dpi=150)
    return Image.open(file)


def plot_routing(weights: dict[str, torch.FloatTensor]) -> Figure:
    """
    Draws how much every expert weighs in every layer, with a panel for each kind of linear.

    White is an even share, red more and blue less. The weights are means over all rows and tokens given: to see the answer
    alone, give `{linear: tensor[:, prompt_length:] for linear, tensor in weights.items()}`.

    Args:
        weights (`dict[str, torch.FloatTensor]`): Of one task, from `trace_routing`: `(rows, tokens, experts)` by linear.

    Returns:
        `Figure`: `savefig` writes it. Each panel's image is an array `(layers, experts)`.
    """
    kinds = defaultdict(list)
    for linear, tensor in weights.items():
        _, _, kind = linear.split(".", 2)
        kinds[kind].append(tensor.mean(dim=(0, 1)).cpu())
    shares = {kind: torch.stack(layers).numpy() for kind, layers in kinds.items()}
    num_layers, num_experts = next(iter(shares.values())).shape
    even = 1 / num_experts
    norm = TwoSlopeNorm(even, vmin=0, vmax=max(2 * even, *(share.max() for share in shares.values())))
    figure = Figure(figsize=(1.2 + 1.5 * len(shares), 1.5 + 0.16 * max(num_layers, 8)), layout="constrained")
    panels = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    for panel, (kind, share) in zip(panels, shares.items(), strict=True):
        image = panel.imshow(share, norm=norm, cmap="RdBu_r", aspect="auto")
        panel.set_title(kind.rpartition(".")[-1], fontsize=9)
        panel.set_xlabel("expert")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label=f"mean weight (even: {even:.3g})")
    return figure


def plot_attention(
    processor, pixel_values: torch.FloatTensor, attention: torch.FloatTensor, sequence: torch.LongTensor
) -> Figure:
    """
    Draws one picture as the vision tower sees it, and then in grey with the attention over its patches for each token.

    All panels have one scale. A panel's title is the token and, below, the share of its attention that went to this picture.
    Of a long answer the first 47 tokens are drawn, which the figure's title says: give parts of `attention` and `sequence`
    to see others.

    Args:
        processor (`HealthGPTProcessor`): The checkpoint's.
        pixel_values (`torch.FloatTensor` of shape `(3, height, width)`): The picture, as the processor gave it.
        attention (`torch.FloatTensor` of shape `(tokens, grid, grid)`): Of this picture, from `attention_over_pictures`.
        sequence (`torch.LongTensor` of shape `(length,)`): Ids that end with the tokens: a row of what `generate` returned.

    Returns:
        `Figure`: `savefig` writes it. The last image of every panel but the first is an array `(grid, grid)`.
    """
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    picture = (pixel_values.float().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    tokens = sequence[-len(attention) :].tolist()[:MAX_TOKENS]
    grids = attention[:MAX_TOKENS].float().cpu().numpy()
    norm = Normalize(0, grids.max())
    rows = -(-(len(tokens) + 1) // COLUMNS)
    columns = min(len(tokens) + 1, COLUMNS)
    figure = Figure(figsize=(1.2 + 1.6 * columns, 0.3 + 2 * rows), layout="constrained")
    if len(attention) > len(tokens):
        figure.suptitle(f"tokens 1 to {len(tokens)} of {len(attention)}")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.axis("off")
    panels[0].imshow(picture)
    panels[0].set_title("picture", fontsize=9, style="italic")
    for panel, grid, token in zip(panels[1:], grids, tokens, strict=False):
        panel.imshow(picture.mean(axis=-1), cmap="gray", vmin=0, vmax=1, extent=(0, 1, 0, 1))
        heat = panel.imshow(grid, norm=norm, cmap=HEAT, extent=(0, 1, 0, 1))
        text = processor.decode([token])
        name = text.strip() if text.strip() and text.isprintable() else repr(text)
        panel.set_title(f"{name}\n{grid.sum():.0%}", fontsize=9, parse_math=False)
    figure.colorbar(heat, ax=panels, label="attention to a patch", format=PercentFormatter(1))
    return figure
