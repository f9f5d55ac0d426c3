"""Qwen-Image's autoencoder for single pictures, f8 with 16 channels (SnapGen++ section 2).

The public network (diffusers' AutoencoderKLQwenImage) is made for video, of convolutions that are
causal in time. A picture is its first frame: only zeros lie before it, so each 3-D kernel acts
through its last temporal slice alone, and the convolutions that change the frame rate never run.
What is left is this 2-D network; module names are the public ones.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.tiling import TILE, Stage, run_stages, upsample

MAX_SCORES = 2**26
"""Attention scores held at a time: 256 MiB in float32, where 2048 px would take 16 GiB."""


def channel_norm(channels: int) -> nn.RMSNorm:
    """x / max(|x|, 1e-12) * sqrt(C) * gamma."""
    return nn.RMSNorm(channels, eps=1e-24)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.norm1 = channel_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = channel_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        if in_channels != channels:
            self.conv_shortcut = nn.Linear(in_channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        skip = self.conv_shortcut(x) if "conv_shortcut" in self else x
        x = self.conv1(nn.silu(self.norm1(x)))
        return skip + self.conv2(nn.silu(self.norm2(x)))


class AttentionBlock(nn.Module):
    """Single-head attention of every pixel to every pixel.

    The scores are computed in pieces. With `in_turn` each piece is evaluated before the next one
    begins; otherwise MLX may hold several at once.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = channel_norm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def __call__(self, x: mx.array, in_turn: bool = False) -> mx.array:
        b, h, w, c = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(b, 1, h * w, 3 * c)
        q, k, v = mx.split(qkv, 3, axis=-1)
        rows = max(1, MAX_SCORES // (b * h * w))
        out = []
        for i in range(0, h * w, rows):
            piece = q[:, :, i : i + rows]
            out.append(mx.fast.scaled_dot_product_attention(piece, k, v, scale=c**-0.5))
            if in_turn:
                mx.eval(out[-1])
        return x + self.proj(mx.concatenate(out, axis=2).reshape(b, h, w, c))


class MidBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.resnets = [ResidualBlock(channels, channels) for _ in range(2)]
        self.attentions = [AttentionBlock(channels)]

    def __call__(self, x: mx.array, in_turn: bool = False) -> mx.array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x), in_turn))


class Downsample(nn.Module):
    """Half the side; padded below and on the right only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    """Twice the side, half the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels // 2, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(upsample(x))


class QwenEncoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        check_levels("encoder", config.encoder_channels, config.encoder_blocks)
        channels = config.encoder_channels[0]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down_blocks = []
        for i, count in enumerate(config.encoder_blocks):
            for _ in range(count):
                self.down_blocks.append(ResidualBlock(channels, config.encoder_channels[i]))
                channels = config.encoder_channels[i]
            if i < 3:
                self.down_blocks.append(Downsample(channels))
        self.mid_block = MidBlock(channels)
        self.norm_out = channel_norm(channels)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)
        self.quant_conv = nn.Linear(2 * config.latent_channels, 2 * config.latent_channels)

    def __call__(self, pictures: mx.array) -> tuple[mx.array, mx.array]:
        """(B, H, W, 3) -> mean and log-variance of the latents, each (B, H/8, W/8, C)."""
        x = self.conv_in(pictures)
        for block in self.down_blocks:
            x = block(x)
        x = self.conv_out(nn.silu(self.norm_out(self.mid_block(x))))
        mean, log_var = mx.split(self.quant_conv(x), 2, axis=-1)
        return mean, mx.clip(log_var, -30.0, 20.0)


class UpBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, count: int, last: bool):
        super().__init__()
        self.resnets = [
            ResidualBlock(channels if i else in_channels, channels) for i in range(count)
        ]
        if not last:
            self.upsamplers = [Upsample(channels)]

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.resnets:
            x = block(x)
        return self.upsamplers[0](x) if "upsamplers" in self else x


class QwenDecoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        check_levels("decoder", config.decoder_channels, config.decoder_blocks)
        channels = config.decoder_channels[0]
        self.post_quant_conv = nn.Linear(config.latent_channels, config.latent_channels)
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid_block = MidBlock(channels)
        self.up_blocks = []
        for i, count in enumerate(config.decoder_blocks):
            in_channels = channels if i == 0 else channels // 2
            channels = config.decoder_channels[i]
            self.up_blocks.append(UpBlock(in_channels, channels, count, last=i == 3))
        self.norm_out = channel_norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def __call__(self, latents: mx.array, tile: int | None = TILE) -> mx.array:
        """(B, h, w, C) -> (B, 8h, 8w, 3).

        Args:
            tile: longest side of a tile, in latents (see `run_stages`); None decodes all at once.
                Attention, at the latents' own resolution, always sees the whole picture.
        """
        tiled = tile is not None and max(latents.shape[1:3]) > tile
        x = self.mid_block(self.conv_in(self.post_quant_conv(latents)), in_turn=tiled)
        return run_stages(self._stages(), x, tile=tile)

    def _stages(self) -> list[Stage]:
        *upward, last = self.up_blocks
        # Two 3x3 convolutions a block, one more after up-sampling or at the end.
        stages = [Stage(block, 2, 4 * len(block.resnets) + 1) for block in upward]
        return [
            *stages,
            Stage(lambda x: self._to_pixels(last(x)), 1, 2 * len(last.resnets) + 1),
        ]

    def _to_pixels(self, x: mx.array) -> mx.array:
        return self.conv_out(nn.silu(self.norm_out(x)))


class QwenAutoencoder(Autoencoder):
    """`AutoencoderConfig.kind` "qwen-image"."""

    encoder_class, decoder_class = QwenEncoder, QwenDecoder


def check_levels(part: str, channels: Sequence[int], blocks: Sequence[int]) -> None:
    """`UserError` unless there are channels and blocks for four resolutions."""
    if len(channels) != 4 or len(blocks) != 4:
        raise UserError(
            f"this autoencoder has four resolutions: {part}_channels {tuple(channels)} and "
            f"{part}_blocks {tuple(blocks)} need four numbers each"
        )
