"""PyTorch layers that the twins share, in the layout that Core ML runs fastest.

Tokens are (B, C, 1, N), channels first and the N tokens of a grid in raster order; pictures and
latents are (B, C, H, W). Every linear layer is a 1x1 convolution, as in SnapGen++ on the phone and
as Apple recommends for the Neural Engine.

Norms divide their input by `norm_scale` before they square it. An engine may square or sum in
float16, whose largest number is 65504, and the residual's sums of squares reach 8 million at t = 1.
The divisor is a power of two, so in float32 no bit of the result changes.
"""

import math

import torch
from torch import Tensor, nn

LEAST_T = 0.05
"""See `velocity_to`."""


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    """A linear layer over channels."""
    return nn.Conv2d(inputs, outputs, 1, bias=bias)


def norm_scale(channels: int) -> int:
    """A power of two: x / scale has squares whose sum is at most a sixteenth of x's mean square."""
    return 2 ** (2 + math.ceil(math.log2(channels) / 2))


def normalized(x: Tensor, channels: int, *, eps: float, dim: int = 1) -> Tensor:
    """LayerNorm over the `channels` of `dim`, without affine parameters."""
    scale = norm_scale(channels)
    x = x * (1 / scale)
    x = x - x.mean(dim, keepdim=True)
    return x * torch.rsqrt((x * x).mean(dim, keepdim=True) + eps / scale**2)


class LayerNorm(nn.Module):
    """LayerNorm over channels: x (B, C, 1, N), or (B, heads, C, N) with dim 2."""

    def __init__(self, channels: int, dim: int = 1, eps: float = 1e-5):
        super().__init__()
        shape = [1] * 4
        shape[dim] = channels
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.channels, self.dim, self.eps = channels, dim, eps

    def forward(self, x: Tensor) -> Tensor:
        x = normalized(x, self.channels, eps=self.eps, dim=self.dim)
        return x * self.weight + self.bias


class RMSNorm(nn.Module):
    """Root mean square norm over the channels of x (B, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.scale = norm_scale(channels)
        self.eps = eps / self.scale**2

    def forward(self, x: Tensor) -> Tensor:
        x = x * (1 / self.scale)
        return x * torch.rsqrt((x * x).mean(1, keepdim=True) + self.eps) * self.weight


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, heads * D, 1, N) -> (B, heads, D, N)."""
    b, channels, _, n = x.shape
    return x.reshape(b, heads, channels // heads, n)


def keys_of(x: Tensor, heads: int) -> Tensor:
    """(B, heads * D, 1, N) -> (B, N, heads, D), the layout of keys (see `Attend`)."""
    return split_heads(x, heads).permute(0, 3, 1, 2)


def text_bias(mask: Tensor) -> Tensor:
    """Mask (B, L), 1 or true where a token counts -> `bias` of attention, within fp16's range."""
    return (mask.to(torch.float32)[:, :, None, None] - 1) * 1e4


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, H * W)."""
    return x.reshape(x.shape[0], x.shape[1], 1, x.shape[2] * x.shape[3])


def velocity_to(x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v = (x_t - x0) / max(t, 0.05) of predicted clean latents x0 (B, C, H, W), t (B,)."""
    return (x_t - x0) / t.clamp(min=LEAST_T).reshape(-1, 1, 1, 1).to(x_t.dtype)
