"""DC-AE, SANA's deep compression autoencoder (arXiv 2410.10733, 2410.10629): 1/32 of a side.

diffusers' AutoencoderDC, as SANA uses it. Every change of resolution has a shortcut without
weights: a 2x2 cell becomes one pixel of four times the channels, or the reverse, and means or
copies of channels give their number. The blocks at the three coarsest resolutions are those of
EfficientViT: linear attention over the whole picture, and a gated convolution. Module names are the
public ones.
"""

import itertools
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.tiling import TILE, Stage, run_stages, upsample
from mlx_snapgen.networks.exponentials import silu
from mlx_snapgen.networks.layers import pack, split, unpack

LEVELS = 6
"""Resolutions, from the picture's to 1/32 of it."""
LOCAL_LEVELS = 3
"""The finest resolutions; their blocks have only convolutions."""
HEAD_DIM = 32
SCALE = 5
"""Side of the kernel of the attention's second scale."""
EPS = 1e-15
"""Of the sum of the attention's weights, which is zero where no query or no key is positive."""


class RMSNorm(nn.RMSNorm):
    """Root mean square norm over channels, with a bias."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-5)
        self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) + self.bias


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = RMSNorm(channels)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.norm(self.conv2(silu(self.conv1(x))))


@mx.compile
def _row_of_depthwise(x: mx.array, weight: mx.array) -> mx.array:
    width = x.shape[2] - len(weight) + 1
    out = x[:, :, :width] * weight[0]
    for i in range(1, len(weight)):
        out = out + x[:, :, i : i + width] * weight[i]
    return out


def depthwise(x: mx.array, weight: mx.array) -> mx.array:
    """Convolution of each channel of x (B, H, W, C) with its own kernel: weight (C, k, k, 1).

    On the CPU, where MLX's is slow, this is a sum of shifted pictures: 4 to 8 times faster.
    """
    channels, side, _, _ = weight.shape
    if mx.default_device().type == mx.DeviceType.gpu:
        return mx.conv2d(x, weight, padding=side // 2, groups=channels)
    height, edge = x.shape[1], (side // 2, side // 2)
    x = mx.pad(x, [(0, 0), edge, edge, (0, 0)])
    rows = weight[..., 0].transpose(1, 2, 0)
    out = _row_of_depthwise(x[:, :height], rows[0])
    for i in range(1, side):
        out = out + _row_of_depthwise(x[:, i : i + height], rows[i])
    return out


class DepthwiseConv(nn.Module):
    def __init__(self, channels: int, side: int, *, bias: bool):
        super().__init__()
        self.weight = mx.random.uniform(-1 / side, 1 / side, (channels, side, side, 1))
        if bias:
            self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        x = depthwise(x, self.weight)
        return x + self.bias if "bias" in self else x


class GroupedLinear(nn.Module):
    """A linear layer for each `HEAD_DIM` channels; weight (channels, HEAD_DIM)."""

    def __init__(self, channels: int):
        super().__init__()
        bound = HEAD_DIM**-0.5
        self.weight = mx.random.uniform(-bound, bound, (channels, HEAD_DIM))

    def __call__(self, x: mx.array) -> mx.array:
        shape = x.shape
        weight = self.weight.reshape(-1, HEAD_DIM, HEAD_DIM).swapaxes(1, 2)
        x = x.reshape(-1, len(weight), HEAD_DIM).swapaxes(0, 1) @ weight
        return x.swapaxes(0, 1).reshape(shape)


class Scale(nn.Module):
    """Queries, keys and values of another scale: means of their neighbors, mixed per head."""

    def __init__(self, channels: int):
        super().__init__()
        self.proj_in = DepthwiseConv(channels, SCALE, bias=False)
        self.proj_out = GroupedLinear(channels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj_out(self.proj_in(x))


class LinearAttention(nn.Module):
    """Attention with the weights relu(q) . relu(k), of every pixel to every pixel, at two scales.

    Its cost grows with the number of pixels, since keys and values are summed first.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_qkv_multiscale = [Scale(3 * channels)]
        self.to_out = nn.Linear(2 * channels, channels, bias=False)
        self.norm_out = RMSNorm(channels)

    def __call__(self, x: mx.array) -> mx.array:
        b, h, w, _ = x.shape
        qkv = self.to_qkv(x)
        qkv = mx.concatenate([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], axis=-1)
        # Each run of 3 * HEAD_DIM channels is a head; the sums need float32.
        qkv = qkv.reshape(b, h * w, -1, 3, HEAD_DIM).transpose(3, 0, 2, 1, 4).astype(mx.float32)
        q, k, v = nn.relu(qkv[0]), nn.relu(qkv[1]), qkv[2]
        total = q @ k.sum(axis=2)[..., None]
        out = q @ (k.swapaxes(2, 3) @ v) / (total + EPS)
        out = out.transpose(0, 2, 1, 3).reshape(b, h, w, -1).astype(x.dtype)
        return x + self.norm_out(self.to_out(out))


class GatedConv(nn.Module):
    """Four times the channels, a 3x3 convolution of each, and a gate."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = 4 * channels
        self.conv_inverted = nn.Linear(channels, 2 * hidden)
        self.conv_depth = DepthwiseConv(2 * hidden, 3, bias=True)
        self.conv_point = nn.Linear(hidden, channels, bias=False)
        self.norm = RMSNorm(channels)

    def __call__(self, x: mx.array) -> mx.array:
        h, gate = split(self.conv_depth(silu(self.conv_inverted(x))), 2, axis=-1)
        return x + self.norm(self.conv_point(h * silu(gate)))


class EfficientViTBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.attn = LinearAttention(channels)
        self.conv_out = GatedConv(channels)

    def __call__(self, x: mx.array, tile: int | None = None) -> mx.array:
        """x (B, H, W, C), where larger than `tile` with the convolution in tiles."""
        return run_stages([Stage(self.conv_out, 1, 1)], self.attn(x), tile=tile)


def average_channels(x: mx.array, channels: int) -> mx.array:
    """(B, H, W, C) -> (B, H, W, channels): the means of equal runs of channels."""
    return x.reshape(*x.shape[:3], channels, -1).mean(axis=-1)


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        b, h, w, _ = x.shape
        cells = pack(x, 2).reshape(b, h // 2, w // 2, -1)
        x = self.conv(x)
        return x + average_channels(cells, x.shape[-1])


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        b, h, w, in_channels = x.shape
        out = self.conv(upsample(x))
        cells = mx.repeat(x, 4 * out.shape[-1] // in_channels, axis=-1)
        return out + unpack(cells.reshape(b, h * w, -1), (h, w), patch=2)


def _blocks(level: int, channels: int, *, count: int) -> list[nn.Module]:
    kind = ResidualBlock if level < LOCAL_LEVELS else EfficientViTBlock
    return [kind(channels) for _ in range(count)]


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels, blocks = config.encoder_channels, config.encoder_blocks
        _check("encoder", channels, blocks=blocks, latents=config.latent_channels)
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks: list[list[nn.Module]] = []
        for i, count in enumerate(blocks):
            self.down_blocks.append(_blocks(i, channels[i], count=count))
            if i + 1 < LEVELS:
                self.down_blocks[i].append(Downsample(channels[i], channels[i + 1]))
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def __call__(self, pictures: mx.array) -> tuple[mx.array, None]:
        """(B, H, W, 3) -> latents (B, H/32, W/32, C) and None: they have no variance."""
        x = self.conv_in(pictures)
        for block in itertools.chain(*self.down_blocks):
            x = block(x)
        latents = self.conv_out(x)
        return latents + average_channels(x, latents.shape[-1]), None


class Decoder(nn.Module):
    """Its `up_blocks` are listed from fine to coarse, and run in reverse order."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels, blocks = config.decoder_channels[::-1], config.decoder_blocks[::-1]
        _check("decoder", channels, blocks=blocks, latents=config.latent_channels)
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.up_blocks: list[list[nn.Module]] = []
        for i, count in enumerate(blocks):
            self.up_blocks.append(_blocks(i, channels[i], count=count))
            if i + 1 < LEVELS:
                self.up_blocks[i].insert(0, Upsample(channels[i + 1], channels[i]))
        self.norm_out = RMSNorm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def __call__(self, latents: mx.array, tile: int | None = TILE) -> mx.array:
        """(B, h, w, C) -> (B, 32h, 32w, 3).

        Args:
            tile: longest side of a tile, in pixels of 1/8 of the picture's side (see `run_stages`);
                None decodes all at once. Attention always covers the whole picture.
        """
        x = self.conv_in(latents)
        x = x + mx.repeat(latents, x.shape[-1] // latents.shape[-1], axis=-1)
        for block in itertools.chain(*reversed(self.up_blocks[LOCAL_LEVELS:])):
            x = block(x, tile) if isinstance(block, EfficientViTBlock) else block(x)
        return run_stages(self._stages(), x, tile=tile)

    def _stages(self) -> list[Stage]:
        def run(x: mx.array, level: int) -> mx.array:
            for block in self.up_blocks[level]:
                x = block(x)
            return x if level else self.conv_out(nn.relu(self.norm_out(x)))

        # A 3x3 convolution after up-sampling, two in each block, and one at the end.
        return [
            Stage(lambda x, i=i: run(x, i), 2, 2 * len(self.up_blocks[i]) - (1 if i else 0))
            for i in reversed(range(LOCAL_LEVELS))
        ]


class DCAutoencoder(Autoencoder):
    """`AutoencoderConfig.kind` "dc-ae"."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config, encoder=Encoder(config), decoder=Decoder(config))


def _check(part: str, channels: Sequence[int], *, blocks: Sequence[int], latents: int) -> None:
    """`UserError` unless the sizes, from fine to coarse, fit each other."""
    if len(channels) != LEVELS or len(blocks) != LEVELS or min(blocks) < 1:
        raise UserError(
            f"DC-AE has six resolutions with blocks: {part}_channels {tuple(channels)} and "
            f"{part}_blocks {tuple(blocks)} need six numbers each"
        )
    pairs = [(4 * fine, coarse) for fine, coarse in itertools.pairwise(channels)]
    heads = [(count, HEAD_DIM) for count in channels[LOCAL_LEVELS:]]
    for count, of in (*pairs, *heads, (channels[-1], latents)):
        if count % of:
            raise UserError(
                f"{part}_channels {tuple(channels)} of DC-AE do not fit each other, heads of "
                f"{HEAD_DIM} and {latents} latent channels: {count} does not divide by {of}"
            )
