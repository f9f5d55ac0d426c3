"""The tiny autoencoder of the TAEHV family for single pictures: fast previews of large latents.

The public `taew2_1` weights take the normalized latents of Qwen-Image (and Wan 2.1), as the
diffusion model does. The public network is for video: memory blocks also read the previous frame,
the decoder computes four frames from a latent and keeps the last of the first four, and the encoder
computes one latent from four frames. A picture is a video of one latent, or of four equal frames.
Only what its one frame needs is computed here. Where a single frame is processed, the memory is
zero and its half of the kernel is dropped; at half resolution two frames are processed.
"""

import itertools
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.tiling import TILE, Stage, run_stages, upsample
from mlx_snapgen.networks.layers import split


class Block(nn.Module):
    """Three 3x3 convolutions and a skip; with `memory` the first also reads the previous frame."""

    def __init__(self, channels: int, memory: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels * (2 if memory else 1), channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array, before: mx.array | None = None) -> mx.array:
        seen = x if before is None else mx.concatenate([x, before], axis=-1)
        return nn.relu(x + self.conv3(nn.relu(self.conv2(nn.relu(self.conv1(seen))))))


def run_frames(blocks: Sequence[Block], frames: Sequence[mx.array]) -> list[mx.array]:
    """Two frames through blocks with memory, which is empty at the first frame."""
    first, second = frames
    for block in blocks:
        first, second = block(first, mx.zeros_like(first)), block(second, first)
    return [first, second]


class TinyEncoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        _check_levels("encoder", config.encoder_channels, blocks=config.encoder_blocks)
        channels = config.encoder_channels
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        # The first pool joins two equal frames, the second two different ones.
        self.pools = [
            nn.Linear(channels[0], channels[0], bias=False),
            nn.Linear(2 * channels[1], channels[1], bias=False),
            nn.Linear(channels[2], channels[2], bias=False),
        ]
        self.downs = [
            nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False)
            for a, b in itertools.pairwise(channels)
        ]
        self.blocks = [
            [Block(channels[i + 1], memory=i == 0) for _ in range(count)]
            for i, count in enumerate(config.encoder_blocks)
        ]
        self.conv_out = nn.Conv2d(channels[3], config.latent_channels, 3, padding=1)

    def __call__(self, pictures: mx.array) -> tuple[mx.array, None]:
        """(B, H, W, 3) in [-1, 1] -> latents (B, H/8, W/8, C) and None: they have no variance."""
        x = nn.relu(self.conv_in((pictures + 1) / 2))
        x = self.downs[0](self.pools[0](x))
        x = mx.concatenate(run_frames(self.blocks[0], [x, x]), axis=-1)
        for pool, down, blocks in zip(self.pools[1:], self.downs[1:], self.blocks[1:], strict=True):
            x = down(pool(x))
            for block in blocks:
                x = block(x)
        return self.conv_out(x), None


class TinyDecoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        _check_levels("decoder", config.decoder_channels, blocks=config.decoder_blocks)
        channels = config.decoder_channels
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.blocks = [
            [Block(channels[i], memory=i == 2) for _ in range(count)]
            for i, count in enumerate(config.decoder_blocks)
        ]
        # The second computes two frames from one. Only the last frame of the third is used.
        self.grows = [
            nn.Linear(channels[0], channels[0], bias=False),
            nn.Linear(channels[1], 2 * channels[1], bias=False),
            nn.Linear(channels[2], channels[2], bias=False),
        ]
        self.ups = [
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(channels)
        ]
        self.conv_out = nn.Conv2d(channels[3], 3, 3, padding=1)

    def __call__(self, latents: mx.array, tile: int | None = TILE) -> mx.array:
        """(B, h, w, C) -> (B, 8h, 8w, 3) in about [-1, 1].

        Args:
            tile: longest side of a tile, in latents (see `run_stages`); None decodes all at once.
        """
        # One 3x3 convolution, then three a block; the last stage has two.
        reaches = [1 + 3 * len(blocks) for blocks in self.blocks]
        stages = [
            Stage(self._eighth, 1, reaches[0]),
            Stage(self._quarter, 2, reaches[1]),
            Stage(self._half, 2, reaches[2]),
            Stage(self._full, 2, 2),
        ]
        return run_stages(stages, latents, tile=tile)

    def _eighth(self, latents: mx.array) -> mx.array:
        x = nn.relu(self.conv_in(mx.tanh(latents / 3) * 3))
        for block in self.blocks[0]:
            x = block(x)
        return x

    def _quarter(self, x: mx.array) -> mx.array:
        x = self._up(0, x)
        for block in self.blocks[1]:
            x = block(x)
        return x

    def _half(self, x: mx.array) -> mx.array:
        frames = split(self.grows[1](x), 2, axis=-1)
        frames = [self.ups[1](upsample(frame)) for frame in frames]
        return run_frames(self.blocks[2], frames)[1]

    def _full(self, x: mx.array) -> mx.array:
        return 2 * self.conv_out(nn.relu(self._up(2, x))) - 1

    def _up(self, level: int, x: mx.array) -> mx.array:
        # Before up-sampling, a linear layer over channels costs a quarter and gives the same
        # result.
        return self.ups[level](upsample(self.grows[level](x)))


class TinyAutoencoder(Autoencoder):
    """`AutoencoderConfig.kind` "taehv"."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config, encoder=TinyEncoder(config), decoder=TinyDecoder(config))


def _check_levels(part: str, channels: Sequence[int], *, blocks: Sequence[int]) -> None:
    if len(channels) != 4 or len(blocks) != 3:
        raise UserError(
            f"this autoencoder takes {part}_channels at four resolutions and {part}_blocks at "
            f"three, got {tuple(channels)} and {tuple(blocks)}"
        )
