"""The decoder of DC-AE in PyTorch: the twin of `networks.autoencoders.dc_ae.Decoder`.

Names, and the order of the heads' channels, are those of the MLX network, where the parts are
explained; the layout is that of `convert.pytorch.layers`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert.pytorch.layers import RMSNorm, linear
from convert.pytorch.parts import LatentDecoder
from mlx_snapgen.config import AutoencoderConfig

# Of the MLX network, whose module a user of PyTorch may not be able to import.
LOCAL_LEVELS, HEAD_DIM, SCALE = 3, 32, 5

LEAST = 2**-14
"""The smallest normal number in fp16, and the least divisor of the attention."""


class Norm(RMSNorm):
    """Root mean square norm with a bias."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = Norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(F.silu(self.conv1(x))))


class Scale(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.proj_in = nn.Conv2d(
            channels, channels, SCALE, padding=SCALE // 2, groups=channels, bias=False
        )
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=channels // HEAD_DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(x))


class LinearAttention(nn.Module):
    """Linear attention whose sums over all pixels stay in fp16's range.

    A factor of one query, or of all keys, does not change the result: the largest number of each is
    made 1. Keys and values share the factor 1 / pixels, so that their products' sum is a mean.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.to_qkv = linear(channels, 3 * channels, bias=False)
        self.to_qkv_multiscale = nn.ModuleList([Scale(3 * channels)])
        self.to_out = linear(2 * channels, channels, bias=False)
        self.norm_out = Norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        qkv = self.to_qkv(x)
        qkv = torch.cat([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], 1)
        q, k, v = qkv.reshape(b, qkv.shape[1] // (3 * HEAD_DIM), 3 * HEAD_DIM, h * w).chunk(3, 2)
        q, k, share = F.relu(q), F.relu(k), (h * w) ** -0.5
        q = q / q.amax(2, keepdim=True).clamp(min=LEAST)
        k = k / k.amax((2, 3), keepdim=True).clamp(min=LEAST) * share
        total = (k.sum(3, keepdim=True) * share).transpose(2, 3) @ q
        out = (v * share) @ k.transpose(2, 3) @ q / total.clamp(min=LEAST)
        return x + self.norm_out(self.to_out(out.reshape(b, 2 * x.shape[1], h, w)))


class GatedConv(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        hidden = 4 * channels
        self.conv_inverted = linear(channels, 2 * hidden)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = linear(hidden, channels, bias=False)
        self.norm = Norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, 1)
        return x + self.norm(self.conv_point(h * F.silu(gate)))


class EfficientViTBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.attn = LinearAttention(channels)
        self.conv_out = GatedConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


def repeat_channels(x: Tensor, times: int) -> Tensor:
    """Each channel of x (B, C, H, W) `times` times, next to each other."""
    b, channels, h, w = x.shape
    x = x.reshape(b, channels, 1, h * w).expand(-1, -1, times, -1)
    return x.reshape(b, channels * times, h, w)


class Upsample(nn.Module):
    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.times = 4 * channels // in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out + F.pixel_shuffle(repeat_channels(x, self.times), 2)


class Decoder(LatentDecoder):
    """Normalized latents (B, C, h, w) -> pictures (B, 3, 32h, 32w), about [-1, 1], not clipped."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config)
        channels, blocks = config.decoder_channels[::-1], config.decoder_blocks[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.times = channels[-1] // config.latent_channels
        levels: list[nn.ModuleList] = []
        for i, count in enumerate(blocks):
            kind = ResidualBlock if i < LOCAL_LEVELS else EfficientViTBlock
            level = nn.ModuleList(kind(channels[i]) for _ in range(count))
            if i + 1 < len(channels):
                level.insert(0, Upsample(channels[i + 1], channels[i]))
            levels.append(level)
        self.up_blocks = nn.ModuleList(levels)
        self.norm_out = Norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        latents = self.denormalize(latents)
        x = self.conv_in(latents) + repeat_channels(latents, self.times)
        for level in reversed(list(self.up_blocks.children())):
            for block in level.children():
                x = block(x)
        return self.conv_out(F.relu(self.norm_out(x)))
