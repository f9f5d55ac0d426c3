"""PyTorch layers that the twins share, in the layout that Core ML runs fastest.

Tokens are (B, C, 1, N), channels first and the N tokens of a grid in raster order; pictures and
latents are (B, C, H, W). Every linear layer is a 1x1 convolution, as in SnapGen++ on the phone and
as Apple recommends for the Neural Engine.
"""

import torch
from torch import Tensor, nn


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    """A linear layer over channels."""
    return nn.Conv2d(inputs, outputs, 1, bias=bias)


def normalized(x: Tensor, eps: float, dim: int = 1) -> Tensor:
    """LayerNorm over `dim` without affine parameters."""
    x = x - x.mean(dim, keepdim=True)
    return x * torch.rsqrt((x * x).mean(dim, keepdim=True) + eps)


class LayerNorm(nn.Module):
    """LayerNorm over channels: x (B, C, 1, N), or (B, heads, C, N) with dim 2."""

    def __init__(self, channels: int, dim: int = 1, eps: float = 1e-5):
        super().__init__()
        shape = [1] * 4
        shape[dim] = channels
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.dim, self.eps = dim, eps

    def forward(self, x: Tensor) -> Tensor:
        return normalized(x, self.eps, self.dim) * self.weight + self.bias


class RMSNorm(nn.Module):
    """Root mean square norm over the channels of x (B, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
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
