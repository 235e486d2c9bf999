# Copyright 2026 The HealthGPT package authors.
# Licensed under the Apache License, Version 2.0 (see the file LICENSE).
"""
The Gumbel VQGAN that draws HealthGPT's pictures (Esser et al., "Taming Transformers", arXiv 2012.09841).

    codes (batch, grid * grid) -> quantize.embed -> post_quant_conv -> decoder -> pixels in [-1, 1]
    pixels in [-1, 1] -> encoder -> quant_conv -> quantize.proj -> argmax -> codes

Modules carry the names of the published checkpoint, so that its tensors need no renaming. The training losses
(discriminator, LPIPS) and the Gumbel sampling are not here: inference takes the most likely code.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_healthgpt import HealthGPTVQGANConfig
from .precision_healthgpt import compute


def _group_norm(channels):
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = _group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = _group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, hidden_states):
        residual = self.nin_shortcut(hidden_states)
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states)))
        return residual + hidden_states


class AttentionBlock(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, channels):
        super().__init__()
        self.norm = _group_norm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, hidden_states):
        normed = self.norm(hidden_states)
        query, key, value = (
            projection(normed).flatten(2).transpose(1, 2) for projection in (self.q, self.k, self.v)
        )  # (batch, height * width, channels)
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = attended.transpose(1, 2).reshape(hidden_states.shape)
        return hidden_states + self.proj_out(attended)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, hidden_states):
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states):
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """All blocks at one resolution: residual blocks, attention after each if asked for, then a change of size."""

    def __init__(self, in_channels, out_channels, num_blocks, attention):
        super().__init__()
        channels = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(*pair) for pair in itertools.pairwise(channels))
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(num_blocks if attention else 0))

    def forward(self, hidden_states):
        for index, block in enumerate(self.block):
            hidden_states = block(hidden_states)
            if len(self.attn) > 0:
                hidden_states = self.attn[index](hidden_states)
        return hidden_states


class Middle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, hidden_states):
        return self.block_2(self.attn_1(self.block_1(hidden_states)))


class Encoder(nn.Module):
    """Pixels (batch, 3, resolution, resolution) -> latents (batch, latent_channels, grid, grid)."""

    def __init__(self, config: HealthGPTVQGANConfig):
        super().__init__()
        channels = [config.base_channels * multiplier for multiplier in (1, *config.channel_multipliers)]
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        for index in range(len(config.channel_multipliers)):
            attention = config.resolution // 2**index in config.attention_resolutions
            level = Level(channels[index], channels[index + 1], config.num_res_blocks, attention)
            if index < len(config.channel_multipliers) - 1:
                level.downsample = Downsample(channels[index + 1])
            self.down.append(level)
        self.mid = Middle(channels[-1])
        self.norm_out = _group_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, kernel_size=3, padding=1)

    def forward(self, pixels):
        hidden_states = self.conv_in(pixels)
        for level in self.down:
            hidden_states = level(hidden_states)
            if hasattr(level, "downsample"):
                hidden_states = level.downsample(hidden_states)
        hidden_states = self.mid(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class Decoder(nn.Module):
    """Latents (batch, latent_channels, grid, grid) -> pixels (batch, 3, resolution, resolution)."""

    def __init__(self, config: HealthGPTVQGANConfig):
        super().__init__()
        channels = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        channels.append(channels[-1])  # what the deepest level reads
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], kernel_size=3, padding=1)
        self.mid = Middle(channels[-1])
        self.up = nn.ModuleList()  # index 0 is the full resolution, as in the encoder
        for index in range(len(config.channel_multipliers)):
            attention = config.resolution // 2**index in config.attention_resolutions
            level = Level(channels[index + 1], channels[index], config.num_res_blocks + 1, attention)
            if index > 0:
                level.upsample = Upsample(channels[index])
            self.up.append(level)
        self.norm_out = _group_norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, kernel_size=3, padding=1)

    def forward(self, latents):
        hidden_states = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            hidden_states = level(hidden_states)
            if hasattr(level, "upsample"):
                hidden_states = level.upsample(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class Quantizer(nn.Module):
    """The codebook `embed` and the layer `proj` that scores every code at every position."""

    def __init__(self, config: HealthGPTVQGANConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.latent_channels, config.num_codes, kernel_size=1)
        self.embed = nn.Embedding(config.num_codes, config.embed_dim)


class HealthGPTVQGAN(nn.Module):
    """
    The image tokenizer: pictures to codes and back.

    Args:
        config (`HealthGPTVQGANConfig`): Its shape.
    """

    def __init__(self, config: HealthGPTVQGANConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, kernel_size=1)
        self.quantize = Quantizer(config)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, kernel_size=1)
        self.decoder = Decoder(config)

    def code_logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scores (batch, num_codes, grid, grid) of every code for pixels (batch, 3, resolution, resolution)."""
        return compute(self.quantize.proj, compute(self.quant_conv, compute(self.encoder, pixels)))

    def encode(self, pixels: torch.Tensor) -> torch.LongTensor:
        """Codes (batch, grid * grid), row by row, of pixels (batch, 3, resolution, resolution) in [-1, 1]."""
        return self.code_logits(pixels).argmax(dim=1).flatten(1)

    def decode(self, codes: torch.LongTensor) -> torch.Tensor:
        """Pixels (batch, 3, resolution, resolution) in [-1, 1] of codes (batch, grid * grid)."""
        grid = self.config.grid_size
        latents = self.quantize.embed(codes).transpose(1, 2).unflatten(2, (grid, grid))
        return compute(self.decoder, compute(self.post_quant_conv, latents)).clamp(-1, 1)
